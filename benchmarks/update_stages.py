"""One update's way from the socket to the sum, stage by stage, each by itself in this process.

    python -m benchmarks.update_stages

CPU is the process's, user and system, in milliseconds an update of 1,179,648 bytes; the fastest of
several runs, so that other work on the machine counts least.
"""

from __future__ import annotations

import argparse
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

import numpy as np
from websockets.frames import Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol

from benchmarks.coordinator_load import adapter, folder_on_disk
from coordinator.aggregation.fedavg import FedAvg
from coordinator.store.base import Member, ReportRecord, RoundRecord
from coordinator.store.sql import SqlStore
from protocol import codec, limits
from protocol.federation import Backbone, FederationSettings, Rounds, Task, TaskKind
from protocol.messages import Chunk, Message, Report
from protocol.tensors import NamedTensors
from protocol.transfer import Receiver, chunks

P = ParamSpec("P")
FINGERPRINT = "sha256:" + "a" * 64
RUNS = 5
UPDATES = 32


def stage(name: str, work: Callable[[], object], updates: int = UPDATES) -> None:
    """Print a row: the least CPU and wall time an update of all runs."""
    found = []
    for _ in range(RUNS):
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        work()
        found.append((time.process_time() - cpu_s, time.perf_counter() - wall_s))
    cpu_s, wall_s = (min(column) for column in zip(*found, strict=True))
    print(f"| {name} | {1e3 * cpu_s / updates:.2f} | {1e3 * wall_s / updates:.2f} |", flush=True)


def each(work: Callable[P, object], *arguments: P.args, **named: P.kwargs) -> list[object]:
    """A stage's work, as many times as there are updates."""
    return [work(*arguments, **named) for _ in range(UPDATES)]


def masked_frame(data: bytes) -> bytes:
    """A frame as a device sends it: its bytes under a mask of its own."""
    mask = b"\x12\x34\x56\x78"
    keys = np.resize(np.frombuffer(mask, np.uint8), len(data))
    body = np.frombuffer(data, np.uint8) ^ keys
    header = struct.pack("!BBQ", 0x80 | Opcode.BINARY, 0x80 | 127, len(data))
    return header + mask + body.tobytes()


def parsed(frames: list[bytes]) -> None:
    """What websockets does with what the socket gave, 64 KiB at a time."""
    protocol = ServerProtocol(state=State.OPEN, max_size=limits.MESSAGE_BYTES_MAX)
    for frame in frames:
        for begin in range(0, len(frame), 1 << 16):
            protocol.receive_data(frame[begin : begin + (1 << 16)])
        protocol.events_received()


def decoded(wire: list[bytes]) -> list[Message]:
    return [codec.decode(data) for data in wire]


def collected(update: NamedTensors, messages: list[Chunk]) -> NamedTensors:
    receiver = Receiver(update.payload())
    for message in messages:
        receiver.accept(message)
    return receiver.tensors()


def kept(store: SqlStore, update: NamedTensors, number: int, together: int) -> None:
    """A round of UPDATES reports, so many in a transaction, and its end."""
    names = [f"{number}-{one}" for one in range(UPDATES)]
    cohort = tuple(Member(name, name) for name in names)
    store.open_round("load", RoundRecord(number, 1, update.digest(), 0.0, 1.0, cohort))
    for begin in range(0, UPDATES, together):
        records = [
            ReportRecord(name, name, number, 1, 100, (), 0.0, update, bytes(32), bytes(64))
            for name in names[begin : begin + together]
        ]
        store.keep_reports("load", records)
    store.close_round("load", number, 1, None, 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the store goes; not in memory")
    options = parser.parse_args()
    update = adapter(0.001)
    messages = list(chunks(update.buffer))
    wire = [codec.encode(message) for message in messages]
    whole_chunks = [message for message in decoded(wire) if isinstance(message, Chunk)]
    frames = [masked_frame(data) for data in wire]
    report = codec.encode(Report("a", 1, update.digest(), 100, (), update.payload(), bytes(64)))
    aggregate = FedAvg(update, UPDATES * RUNS * 100)
    print("| stage | CPU ms | wall ms |\n|---|---|---|")
    stage("frames: parse, unmask", lambda: each(parsed, frames))
    stage("report: decode 48 specs", lambda: each(codec.decode, report))
    stage("chunks: decode", lambda: each(decoded, wire))
    stage("collect, SHA-256", lambda: each(collected, update, whole_chunks))
    stage("check", lambda: each(aggregate.check, update))
    stage("sum", lambda: each(aggregate.accumulate, update, 1))
    settings = FederationSettings(
        "load",
        Backbone("none", FINGERPRINT),
        Task(TaskKind.SEQUENCE_CLASSIFICATION, ("a", "b")),
        rounds=Rounds(cohort=UPDATES),
    )
    for together in (1, 4, 16):
        with folder_on_disk(options.folder) as folder:
            store = SqlStore(f"sqlite:///{folder}/store.sqlite")
            store.create(settings, update)
            numbers = iter(range(1, 1 + RUNS))
            stage(
                f"keep, {together} in a transaction",
                lambda: kept(store, update, next(numbers), together),  # noqa: B023
            )
            store.close()


if __name__ == "__main__":
    main()
