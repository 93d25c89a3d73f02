"""What one update costs the coordinator: CPU, memory and updates a second, over real sockets.

    python -m benchmarks.coordinator_load --devices 1 32 1000

The daemon is a process of its own on a real SQLite file. The devices are real sessions in this
process that train nothing (edge_client/fleet). CPU is the daemon's alone, user and system, from the
first assignment on.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_client.fleet.loadtest import Own, run_load_test
from edge_client.fleet.own_coordinator import Shape
from edge_client.fleet.plan import Plan
from protocol.tensors import NamedTensors

AT_ONCE = 1e6  # devices a second


def adapter(value: float) -> NamedTensors:
    """A common adapter of 1,179,648 bytes."""
    arrays = {name: array + np.float32(value) for name, array in Shape().arrays().items()}
    return NamedTensors.from_arrays(arrays)


@dataclass(frozen=True, slots=True)
class Load:
    """So many devices, all in every round, under one rule."""

    devices: int
    rounds: int
    aggregation: str = "mean"


@dataclass(frozen=True, slots=True)
class Measured:
    """One run; memory is the daemon's, resident, and CPU milliseconds an update."""

    load: Load
    updates_per_second: float
    cpu_ms: float
    idle_mib: float
    connected_mib: float
    peak_mib: float


async def measure(load: Load, folder: Path) -> Measured:
    """Run a load to its end."""
    plan = Plan(load.devices, "benchmark", AT_ONCE, rounds=load.rounds)
    own = Own(settings={"aggregation.name": load.aggregation}, folder=folder)
    outcome = await run_load_test(plan, own)
    wanted = load.devices * load.rounds
    if outcome.figures.accepted != wanted:
        errors = outcome.failure or outcome.figures.errors
        raise RuntimeError(f"{outcome.figures.accepted} of {wanted} reports accepted: {errors}")
    names = ("updates_per_second", "coordinator_cpu_ms_per_update")
    sizes = (f"coordinator_{name}_mib" for name in ("idle", "connected", "peak"))
    return Measured(load, *(float(outcome.values[name] or 0.0) for name in (*names, *sizes)))


@contextmanager
def folder_on_disk(parent: Path | None) -> Iterator[Path]:
    """A new folder where fsync means something: not in memory."""
    with tempfile.TemporaryDirectory(dir=parent) as name:
        yield Path(name)


def as_row(found: Measured) -> str:
    load = found.load
    return (
        f"| {load.aggregation} | {load.devices} | {load.devices * load.rounds} "
        f"| {found.cpu_ms:.2f} | {found.updates_per_second:.0f} "
        f"| {found.idle_mib:.0f} | {found.connected_mib:.0f} "
        f"| {found.peak_mib:.0f} | {found.peak_mib - found.idle_mib:.0f} |"
    )


HEADER = (
    "| rule | devices | updates | CPU ms an update | updates/s | idle MiB | connected MiB "
    "| peak MiB | over idle |\n|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 32, 1000])
    parser.add_argument("--updates", type=int, default=256, help="a run, at least")
    parser.add_argument("--aggregation", nargs="+", default=["mean"])
    parser.add_argument("--folder", type=Path, help="where the store goes; not in memory")
    options = parser.parse_args()
    print(HEADER)
    for aggregation in options.aggregation:
        for devices in options.devices:
            load = Load(devices, max(1, options.updates // devices), aggregation)
            with folder_on_disk(options.folder) as folder:
                print(as_row(asyncio.run(measure(load, folder))), flush=True)


if __name__ == "__main__":
    main()
