"""Memory of the coordinator in a round of 1,000 devices at 1.2 MB an update, over real sockets.

    python -m benchmarks.coordinator_memory

Idle is the daemon's resident memory when it listens and nobody has connected, the peak the highest
that the system has seen of it. Exits 1 over the bound.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from benchmarks.coordinator_load import HEADER, Load, as_row, folder_on_disk, measure

OVER_IDLE_MIB_MAX = 150_000_000 / (1 << 20)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--aggregation", nargs="+", default=["mean", "median"])
    parser.add_argument("--folder", type=Path, help="where the store goes; not in memory")
    options = parser.parse_args()
    print(HEADER)
    over = False
    for aggregation in options.aggregation:
        with folder_on_disk(options.folder) as folder:
            found = asyncio.run(measure(Load(options.devices, 1, aggregation), folder))
        print(as_row(found), flush=True)
        over |= found.peak_mib - found.idle_mib > OVER_IDLE_MIB_MAX
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
