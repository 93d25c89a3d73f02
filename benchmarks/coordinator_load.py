"""What one update costs the coordinator: CPU, memory and updates a second, over real sockets.

    python -m benchmarks.coordinator_load --devices 1 32 1000

The daemon is a process of its own on a real SQLite file. The devices are real sessions in this
process that train nothing: each sends the same prepared update in every round. CPU is the daemon's
alone, user and system, from the first round's opening to the last one's end.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_client.identity import Identity
from edge_client.session import FinishedReport, Offer, Session
from edge_client.start_file import write_start
from edge_client.transport import websocket_dial
from protocol.federation import Backbone, FederationSettings, Task, TaskKind
from protocol.messages import Assignment, Receipt, ReceiptStatus
from protocol.tensors import NamedTensors

FINGERPRINT = "sha256:" + "a" * 64
# As many tensors and bytes as rank 8 on query and value of 12 layers of width 768.
LAYERS, RANK, WIDTH = 24, 8, 768
SAMPLE_EVERY_S = 0.05
TOML = """
name = "load"
update_dtype = "float32"
[backbone]
name = "none"
[task]
kind = "sequence-classification"
labels = ["a", "b"]
[rounds]
count = {rounds}
cohort = {devices}
minimum_reports = {devices}
deadline_s = 3600.0
[aggregation]
name = "{aggregation}"
[server]
port = 0
"""


def adapter(value: float) -> NamedTensors:
    """A common adapter of 1,179,648 bytes."""
    arrays = {}
    for layer in range(LAYERS):
        arrays[f"layer{layer}.A"] = np.full((RANK, WIDTH), value, np.float32)
        arrays[f"layer{layer}.B"] = np.full((WIDTH, RANK), value, np.float32)
    return NamedTensors.from_arrays(arrays)


@dataclass(frozen=True, slots=True)
class Load:
    """So many devices, all in every round, under one rule."""

    devices: int
    rounds: int
    aggregation: str = "mean"


@dataclass(frozen=True, slots=True)
class Measured:
    """One run; bytes are of resident memory."""

    load: Load
    wall_s: float
    cpu_s: float
    idle_bytes: int
    connected_bytes: int
    peak_bytes: int

    @property
    def updates(self) -> int:
        return self.load.devices * self.load.rounds


@dataclass
class PreparedDevice:
    """A session's Worker that has its update ready; `trained` and `receipts` say what happened."""

    name: str
    update: NamedTensors
    joined: asyncio.Semaphore
    go: asyncio.Event
    trained: int = 0
    rejected: int = 0
    report: FinishedReport | None = None

    async def prepare(self, settings: FederationSettings) -> None:
        self.joined.release()
        await self.go.wait()

    def offer(self) -> Offer:
        return Offer(FINGERPRINT, 100)

    def held(self, digest: bytes) -> NamedTensors | None:
        return None

    def unsent(self) -> FinishedReport | None:
        return self.report

    async def train(self, assignment: Assignment, base: NamedTensors) -> FinishedReport:
        self.trained += 1
        self.report = FinishedReport(
            assignment.assignment,
            assignment.round,
            assignment.base_version,
            100,
            (),
            self.update,
        )
        return self.report

    async def settled(self, receipt: Receipt) -> None:
        self.rejected += receipt.status is ReceiptStatus.REJECTED
        self.report = None

    async def finish(self, base: NamedTensors, rounds: int) -> None:
        pass


class Daemon:
    """A coordinator process, looked at through /proc."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.port = port
        self.peak_bytes = 0

    def resident_bytes(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def watch(self) -> None:
        """Note the highest resident memory until cancelled."""
        while True:
            self.peak_bytes = max(self.peak_bytes, self.resident_bytes())
            await asyncio.sleep(SAMPLE_EVERY_S)


def write_federation(folder: Path, text: str) -> Path:
    """A configuration and its start; the path of the former."""
    task = Task(TaskKind.SEQUENCE_CLASSIFICATION, ("a", "b"))
    settings = FederationSettings("load", Backbone("none", FINGERPRINT), task)
    write_start(folder / "start.safetensors", adapter(0.0).arrays(), settings)
    (folder / "federation.toml").write_text(text)
    return folder / "federation.toml"


async def started(config: Path) -> Daemon:
    """The daemon of a configuration, once it listens."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "coordinator.cli", "serve", "--config", str(config)),
        stderr=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
    )
    assert process.stderr is not None
    said = b""
    async for line in process.stderr:
        said += line
        if b"listening on" in line:
            return Daemon(process, int(line.rsplit(b":", 1)[1]))
    raise RuntimeError(f"the coordinator did not start: {said.decode()}")


async def measure(load: Load, folder: Path) -> Measured:
    """Run a load to its end."""
    values = {"rounds": load.rounds, "devices": load.devices, "aggregation": load.aggregation}
    daemon = await started(write_federation(folder, TOML.format(**values)))
    assert daemon.process.stderr is not None
    log = asyncio.create_task(_drained(daemon.process.stderr))
    joined, go = asyncio.Semaphore(0), asyncio.Event()
    update = adapter(0.001)
    devices = [PreparedDevice(f"device-{n}", update, joined, go) for n in range(load.devices)]
    sessions = [_session(device, daemon.port) for device in devices]
    idle = daemon.resident_bytes()
    running = [asyncio.create_task(session.run()) for session in sessions]
    for _ in devices:
        await joined.acquire()
    connected = daemon.resident_bytes()
    watching = asyncio.create_task(daemon.watch())
    began_s, cpu_s = time.perf_counter(), daemon.cpu_s()
    go.set()
    await asyncio.gather(*running)
    wall_s, cpu_s = time.perf_counter() - began_s, daemon.cpu_s() - cpu_s
    watching.cancel()
    daemon.process.terminate()
    await asyncio.gather(daemon.process.wait(), log)
    for device in devices:
        if device.rejected or device.trained != load.rounds:
            raise RuntimeError(f"{device.name} trained {device.trained}, {device.rejected} refused")
    return Measured(load, wall_s, cpu_s, idle, connected, daemon.peak_bytes)


def _session(device: PreparedDevice, port: int) -> Session:
    return Session(
        websocket_dial(f"ws://127.0.0.1:{port}"),
        device,
        federation="load",
        identity=Identity.named(device.name),
        rng=random.Random(device.name),
        first_contact_patience_s=120.0,
    )


async def _drained(stream: asyncio.StreamReader) -> None:
    async for _ in stream:
        pass


@contextmanager
def folder_on_disk(parent: Path | None) -> Iterator[Path]:
    """A new folder where fsync means something: not in memory."""
    with tempfile.TemporaryDirectory(dir=parent) as name:
        yield Path(name)


def as_row(found: Measured) -> str:
    load, mib = found.load, 1 << 20
    return (
        f"| {load.aggregation} | {load.devices} | {found.updates} "
        f"| {1e3 * found.cpu_s / found.updates:.2f} | {found.updates / found.wall_s:.0f} "
        f"| {found.idle_bytes / mib:.0f} | {found.connected_bytes / mib:.0f} "
        f"| {found.peak_bytes / mib:.0f} | {(found.peak_bytes - found.idle_bytes) / mib:.0f} |"
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
