"""What one update costs the coordinator, beside Flower's server: in turns, on one machine.

    python -m venv /tmp/flower && /tmp/flower/bin/pip install flwr==1.41.0
    python -m benchmarks.flower_load --flower-python /tmp/flower/bin/python

The same adapter of 1,179,648 bytes goes down and comes back, for as many devices and rounds. CPU is
the server process's alone, from the moment when all devices are there; the peak is the system's
count. Flower's clients are processes (benchmarks/flower_peer.py), our devices one process, so that
updates a second are not to be compared. Flower keeps nothing on disk and signs nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from benchmarks.coordinator_load import Load, folder_on_disk, measure

PEER = Path(__file__).with_name("flower_peer.py")
TIMEOUT_S: Final = 600.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flower-python", required=True, help="of an environment with flwr")
    parser.add_argument("--devices", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where our store goes; not in memory")
    options = parser.parse_args()
    load, ratios = Load(options.devices, options.rounds), []
    print("| turn | server | CPU ms an update | updates/s | peak MiB |\n|---|---|---|---|---|")
    for turn in range(1, options.turns + 1):
        with folder_on_disk(options.folder) as folder:
            ours = asyncio.run(measure(load, folder))
        print(_row(turn, "pf2lora", ours.cpu_ms, ours.updates_per_second, ours.peak_mib))
        theirs = flower(options.flower_python, load)
        print(_row(turn, "Flower", *theirs.values()), flush=True)
        ratios.append(ours.cpu_ms / theirs["cpu_ms"])
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"\nCPU, of Flower's: {statistics.median(ratios):.2f} ({spread})")


def flower(python: str, load: Load) -> dict[str, float]:
    """One run of Flower's server and its clients to their end."""
    port = _free_port()
    sizes = ["--devices", str(load.devices), "--rounds", str(load.rounds)]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_started(python, "server", port, *sizes))
        _wait_until_it_listens(server, port)
        for _ in range(load.devices):
            stack.enter_context(_started(python, "client", port))
        said, _ = server.communicate(timeout=TIMEOUT_S)
        if server.returncode:
            raise SystemExit(f"Flower's server ended with {server.returncode}, before all rounds")
        found: dict[str, float] = json.loads(said.splitlines()[-1])
        return found


@contextlib.contextmanager
def _started(python: str, side: str, port: int, *more: str) -> Iterator[subprocess.Popen[str]]:
    command = [python, str(PEER), side, "--port", str(port), *more]
    out = subprocess.PIPE if side == "server" else subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _wait_until_it_listens(server: subprocess.Popen[str], port: int) -> None:
    while server.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.1)
    raise SystemExit(f"Flower's server ended with {server.returncode}: is flwr installed there?")


def _row(turn: int, server: str, cpu_ms: float, per_second: float, peak_mib: float) -> str:
    return f"| {turn} | {server} | {cpu_ms:.2f} | {per_second:.0f} | {peak_mib:.0f} |"


if __name__ == "__main__":
    main()
