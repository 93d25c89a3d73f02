"""What a load test must not do: `--fail-if "upload_p95>2s"`.

A threshold names one of the report's values, `<` or `>`, and a bound: a time for latencies, a share
in percent for errors, late and rejected reports, else a number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from edge_client.errors import ConfigurationError
from edge_client.fleet.figures import LATENCIES, TIMES
from edge_client.fleet.plan import duration_s

# Of all that was tried: what was answered with a receipt, and what went wrong.
SHARES: Final = ("errors", "late", "rejected")
NUMBERS: Final = ("updates_per_second", "rounds", "accepted", "joined", "resumed")
# Where the test has a coordinator of its own.
OWN_NUMBERS: Final = ("coordinator_cpu_ms_per_update", "coordinator_peak_mib")


@dataclass(frozen=True, slots=True)
class Threshold:
    """`text` as it was given; missed where the value is over (or `under`) the bound."""

    text: str
    name: str
    is_under: bool
    bound: float
    is_share: bool = False

    def missed(self, values: Mapping[str, float | None]) -> str | None:
        """What was found, if it is not good enough; a value without a sample is not."""
        found = values.get(self.name)
        if found is None:
            return f"{self.text}, and nothing was measured"
        if self.is_share:
            tried = sum(values.get(name) or 0 for name in ("errors", "accepted", "late"))
            found = found / tried if tried else 0.0
        if not (found < self.bound if self.is_under else found > self.bound):
            return None
        unit = " s" if self.name in TIMES else ""
        shown = f"{100 * found:.2f}%" if self.is_share else f"{found:.4g}{unit}"
        return f"{self.text}, and it was {shown}"


def read_threshold(text: str, *, own: bool) -> Threshold:
    """The threshold that a flag gives; `own` is whether the coordinator is the test's own.

    Raises:
        ConfigurationError: it is none, or of nothing that is measured.
    """
    parts = re.fullmatch(r"\s*(\w+)\s*([<>])\s*(\S+)\s*", text)
    if not parts:
        raise _wrong(f"{text!r} is no threshold", "NAME>BOUND or NAME<BOUND")
    name, sign, bound = parts.groups()
    numbers = (*NUMBERS, *OWN_NUMBERS) if own else NUMBERS
    if name not in (*TIMES, *SHARES, *numbers):
        times = f"{', '.join(LATENCIES)} or lag with _p50, _p90, _p95, _p99 or _max"
        raise _wrong(f"{name!r} is not measured", f"{times}; {', '.join((*SHARES, *numbers))}")
    if name in TIMES:
        try:
            return Threshold(text, name, sign == "<", duration_s(bound))
        except ValueError as error:
            raise _wrong(str(error), f"{name}{sign}2s") from None
    percent = name in SHARES and bound.endswith("%")
    if not re.fullmatch(r"\d+(\.\d+)?", bound.removesuffix("%") if percent else bound):
        right = f"{name}{sign}1% or {name}{sign}10" if name in SHARES else f"{name}{sign}10"
        raise _wrong(f"{bound!r} is no bound of {name}", right)
    number = float(bound.removesuffix("%"))
    return Threshold(text, name, sign == "<", number / 100 if percent else number, percent)


def _wrong(problem: str, right: str) -> ConfigurationError:
    return ConfigurationError("--fail-if", problem, right)
