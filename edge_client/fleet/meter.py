"""What the load test itself takes of the machine: it must not be what it measures."""

from __future__ import annotations

import resource
import sys
import time
from typing import Final

from edge_client.errors import ConfigurationError
from edge_client.fleet.figures import Figures

# One core is all that an event loop has.
BUSY_SHARE: Final = 0.9
# Late by more than this share of an upload's time, times tell of the load test too.
LATE_SHARE: Final = 0.1
LATE_S: Final = 0.02
# Beside those of connections: files, the loop's own, what libraries open.
DESCRIPTORS_SPARE: Final = 64


class Meter:
    """CPU and memory of this process, from when it is made."""

    def __init__(self) -> None:
        self._began_s = time.perf_counter()
        self._cpu_s = time.process_time()
        self._peak_bytes = _peak_bytes()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began_s

    def values(self, devices: int) -> dict[str, float | None]:
        """What was taken so far, by the report's names."""
        grown_bytes = _peak_bytes() - self._peak_bytes
        return {
            "seconds": self.seconds,
            "load_cpu_share": (time.process_time() - self._cpu_s) / max(1e-9, self.seconds),
            "load_mib_per_device": grown_bytes / devices / (1 << 20),
        }


def saturation(cpu_share: float, figures: Figures) -> str | None:
    """That this process was at its limit, if it was."""
    if cpu_share >= BUSY_SHARE:
        return (
            f"the load test itself was at its limit, {100 * cpu_share:.0f} % of a core: the "
            "coordinator could do more; run several at once with fewer devices each"
        )
    late_s = figures.lag.percentile(95) or 0.0
    upload_s = figures.latencies["upload"].percentile(50) or 0.0
    if late_s < max(LATE_S, LATE_SHARE * upload_s):
        return None
    return (
        f"the load test's own event loop was late by {late_s:.2f} s at p95: times hold as much of "
        "its own; run several at once with fewer devices each, or let the machine do less besides"
    )


def raise_descriptors(devices: int) -> None:
    """See that this process may open so many connections.

    Raises:
        ConfigurationError: the system does not allow it; the text says how many are needed.
    """
    needed = devices + DESCRIPTORS_SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        problem = f"{devices} need {needed} file descriptors, and the hard limit is {hard}"
        right = f"{max(1, hard - DESCRIPTORS_SPARE)} at most, or a higher limit (ulimit -Hn)"
        raise ConfigurationError("--devices", problem, right)
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _peak_bytes() -> int:
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes
