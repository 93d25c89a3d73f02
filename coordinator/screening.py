"""Reports that no honest device sends: rejected with a reason, counted, and in the end shut out.

Shapes, names, NaN, infinity and single absurd elements are the aggregation's to refuse
(aggregation/base.py). Here is what needs no knowledge of the adapter: how long an update is, and
how many examples it claims to stand for. The bounds do not depend on what came before, so that what
is accepted does not depend on the order of arrival nor on a restart.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np

from coordinator.aggregation.base import UpdateError
from coordinator.store.devices import DeviceStatus, DeviceStore
from protocol import limits
from protocol.messages import Report
from protocol.tensors import NamedTensors

log = logging.getLogger("pf2lora.coordinator")

# An element of an adapter moves by about its learning rate a step: 0.001 to 0.05 a round.
UPDATE_RMS_MAX: Final = 1.0
QUARANTINE_AFTER: Final = 3
DEVICES_MAX: Final = 100_000  # of whom something is remembered

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a report may be; `update_rms_max` is the root mean square of an update's elements."""

    update_rms_max: float = UPDATE_RMS_MAX
    examples_max: int = limits.EXAMPLES_MAX
    quarantine_after: int = QUARANTINE_AFTER


class Screening:
    """Looks at the reports of all devices of a federation, and remembers who sends bad ones."""

    def __init__(self, devices: DeviceStore, bounds: Bounds) -> None:
        self._devices = devices
        self._bounds = bounds
        self._examples: dict[str, int] = {}  # of devices, as they said at their last check-in
        self._counted: dict[str, str] = {}  # device -> assignment of its last rejected report

    def ineligible(self, device: str, examples: int) -> str | None:
        """Why a device with so many examples cannot take part; what it says is remembered."""
        if examples > self._bounds.examples_max:
            most = self._bounds.examples_max
            return f"the device has {examples} examples, the coordinator takes {most} at most"
        _remember(self._examples, device, examples)
        return None

    def misfit(self, device: str, report: Report) -> str | None:
        """Why a report cannot be used whatever its bytes, if so.

        What was said at a check-in is forgotten with the process, or when DEVICES_MAX others have
        checked in since: then the bound alone holds.
        """
        most = self._examples.get(device, self._bounds.examples_max)
        if report.examples > most:
            return f"it claims {report.examples} examples, the device had {most}"
        return None

    def check(self, update: NamedTensors) -> None:
        """Refuse an update that is longer than training makes any.

        Raises:
            UpdateError: naming its size.
        """
        flat = update.flat()
        if not len(flat):
            return
        rms = float(np.sqrt(np.dot(flat, flat) / len(flat)))
        if not rms <= self._bounds.update_rms_max:
            raise UpdateError(
                f"its elements have a root mean square of {rms:.3g}, over "
                f"{self._bounds.update_rms_max:g}"
            )

    def count(self, device: str, assignment: str, reason: str) -> None:
        """A report has been rejected; once a report, however often its receipt is asked for."""
        if self._counted.get(device) == assignment:
            return
        _remember(self._counted, device, assignment)
        after = self._bounds.quarantine_after
        record = self._devices.count_rejection(device, reason, after)
        log.warning("report of %s rejected: %s", device, reason)
        if record and record.status is DeviceStatus.QUARANTINED:
            log.warning("device %s is quarantined after %d rejected", device, record.rejected)


def _remember(memory: dict[str, Value], device: str, value: Value) -> None:
    """As the latest; of too many the one that was longest unheard of is forgotten."""
    memory.pop(device, None)
    memory[device] = value
    if len(memory) > DEVICES_MAX:
        del memory[next(iter(memory))]
