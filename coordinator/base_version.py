"""The current base version: how devices receive it, and the sum of the updates that move it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from coordinator.aggregation import aggregation_for, report_weight
from coordinator.aggregation.base import Reports
from coordinator.aggregation.staleness import damped
from coordinator.server_step import take_step
from coordinator.store.base import ReportRecord
from protocol.federation import FederationSettings
from protocol.messages import Report
from protocol.tensors import NamedTensors, Payload, TensorSpec


class BaseVersion:
    """One federation's, from round to round; `memory` is what its server step remembers."""

    def __init__(
        self, settings: FederationSettings, base: NamedTensors, memory: NamedTensors | None
    ) -> None:
        self._settings = settings
        # The base version as devices receive it, by rank; and all they may fetch, by digest.
        self._payloads: dict[int, Payload] = {}
        self._offered: dict[bytes, NamedTensors] = {}
        self._offered_before: dict[bytes, NamedTensors] = {}
        # The tensors that updates have, each list as it first came: one for every rank.
        self._fitting: dict[tuple[TensorSpec, ...], tuple[TensorSpec, ...]] = {}
        self.move(base, memory)

    def move(self, base: NamedTensors, memory: NamedTensors | None) -> None:
        """Another base version is the current one."""
        self._base, self.memory = base, memory
        self.version = base.digest()
        self._payloads = {}
        self._offered_before, self._offered = self._offered, {}
        self.begin()

    def begin(self) -> None:
        """Begin the sum anew."""
        self._aggregate = aggregation_for(self._settings, self._base)

    def offer(self, rank: int) -> Payload:
        """What a device of this rank (0: the whole) receives, from now on to be fetched."""
        if rank not in self._payloads:
            # What is lost on the way down is lost to the device alone: its update is against what
            # it received, and is added to the base version as it is here.
            download = self._aggregate.download(rank).cast(self._settings.download_dtype.wire)
            self._payloads[rank] = download.payload()
            self._offered[self._payloads[rank].digest] = download
        return self._payloads[rank]

    def offered(self, digest: bytes) -> NamedTensors | None:
        """What was offered under this digest, from the current base version or the last."""
        return self._offered.get(digest) or self._offered_before.get(digest)

    def misfit(self, report: Report) -> str | None:
        """What is wrong with the tensors that a report promises, if anything is."""
        dtype, tensors = self._settings.update_dtype, report.payload.tensors
        if tensors in self._fitting or self._aggregate.fits(tensors, dtype):
            self._fitting.setdefault(tensors, tensors)
            return None
        return f"its tensors are not those of the common adapter in {dtype.value}"

    def shared(self, report: Report) -> Report:
        """The report, its list of tensors one and the same object for all that have the same."""
        tensors = self._fitting.get(report.payload.tensors)
        if tensors is None:
            return report
        return replace(report, payload=replace(report.payload, tensors=tensors))

    def check(self, update: NamedTensors) -> None:
        """Refuse an update that must not enter the sum.

        Raises:
            UpdateError: naming what is wrong with it.
        """
        self._aggregate.check(update)

    def add(self, report: ReportRecord) -> None:
        """Add a kept report, whose update has been checked."""
        weight = report_weight(self._settings, report.examples)
        self._aggregate.accumulate(damped(report.update, report.staleness), weight)

    def add_all(self, reports: Iterable[ReportRecord]) -> int:
        """Add those that were kept before a restart; how many there are."""
        count = 0
        for report in reports:
            self.add(report)
            count += 1
        return count

    def following(self, reports: Reports) -> tuple[NamedTensors, NamedTensors | None]:
        """The next base version, and what the server step remembers after it."""
        averaged = self._aggregate.finalize(reports)
        return take_step(self._settings.server_step, self._base, averaged, self.memory)
