"""The log's lines about refusals: the first few of a kind at once, then how many more there were.

A crowd that is refused would fill the disk with a line for each, in which nothing else is found.
Metrics count every one.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Final

from protocol.errors import ErrorCode

log = logging.getLogger("pf2lora.coordinator")

# Of each code so many lines in so long, and one with the number of the others at its end.
LINES_MAX: Final = 10
SUMMED_UP_S: Final = 60.0


class Refusals:
    """All of one coordinator, however many sessions they end."""

    def __init__(self) -> None:
        self._counts: Counter[ErrorCode] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def tell(self, federation: str, device: str, code: ErrorCode, reason: str) -> None:
        """One more; both names are empty where nobody had joined."""
        self._counts[code] += 1
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SUMMED_UP_S, self.sum_up)
        if self._counts[code] <= LINES_MAX:
            about = {"federation": federation, "device": device, "code": code.value}
            who = device or "a device"
            log.warning("refused %s: %s: %s", who, code.value, reason, extra=about)

    def sum_up(self) -> None:
        """Tell how many had no line of their own, and begin anew."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        for code, count in self._counts.items():
            if count > LINES_MAX:
                about = {"code": code.value}
                more = count - LINES_MAX
                log.warning(
                    "refused %d more within %g s: %s", more, SUMMED_UP_S, code.value, extra=about
                )
        self._counts.clear()
