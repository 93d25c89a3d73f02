"""Thousands of devices that are connected and say nothing: what each costs; do others work?

    python -m benchmarks.idle_connections --connections 10000

A daemon process; in this process that many sockets which have joined and then keep silent, as
devices do that train, and a federation of a few devices that runs its rounds beside them. As many
as the file-descriptor limit lets this process have; the count that ran is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path

from websockets.asyncio.client import ClientConnection, connect

from benchmarks.coordinator_load import folder_on_disk
from edge_client.fleet.load import Fleet
from edge_client.fleet.own_coordinator import NAME, OwnCoordinator, Shape
from edge_client.fleet.plan import Plan
from edge_client.identity import Identity
from edge_client.transport import websocket_dial
from protocol import codec, limits
from protocol.connection import default_hello
from protocol.messages import Challenge, Join
from protocol.signing import UNSIGNED, join_statement

AT_ONCE = 200  # being opened
SPARE = 200  # descriptors for all else
PLAN = Plan(devices=8, seed="idle", rounds=3)
SETTINGS = {"server.connections_max": "15000", "server.newcomers_max": "15000"}


async def silent(port: int, number: int, opening: asyncio.Semaphore) -> ClientConnection:
    """A socket that has joined."""
    async with opening:
        socket = await connect(
            f"ws://127.0.0.1:{port}", compression=None, proxy=None, open_timeout=120
        )
        await socket.send(codec.encode(default_hello("silent")))
        await socket.recv(decode=False)
        challenge = codec.decode(await socket.recv(decode=False))
        assert isinstance(challenge, Challenge)
        identity = Identity.named(f"silent-{number}")
        join = Join(NAME, identity.key, b"", "", UNSIGNED)
        statement = join_statement(join, challenge.nonce, max(limits.PROTOCOL_VERSIONS))
        signed = replace(join, signature=identity.sign(statement))
        await socket.send(codec.encode(signed))
        await socket.recv(decode=False)
    return socket


async def federation_s(address: str) -> float:
    """How long a small federation takes, all its rounds."""
    fleet = Fleet(PLAN, websocket_dial(address), NAME)
    began_s = time.perf_counter()
    await fleet.run()
    wanted = PLAN.devices * (PLAN.rounds or 0)
    if fleet.figures.accepted != wanted:
        raise RuntimeError(f"{fleet.figures.accepted} of {wanted} reports: {fleet.figures.errors}")
    return time.perf_counter() - began_s


@dataclass(frozen=True, slots=True)
class Idle:
    """So many silent connections: what one costs the daemon, and how long a federation took."""

    count: int
    opened_s: float
    cpu_s: float
    memory_bytes: float
    open_still: int
    federation_s: float


async def measure(wished: int, folder: Path) -> Idle:
    """Open as many as the limit of descriptors allows, and run a federation beside them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = min(wished, hard - SPARE)
    own = await OwnCoordinator.started(folder, PLAN, Shape(), SETTINGS)
    try:
        idle_bytes, idle_cpu_s = own.resident_bytes() or 0, own.cpu_s() or 0.0
        opening = asyncio.Semaphore(AT_ONCE)
        began_s = time.perf_counter()
        sockets = await asyncio.gather(*(silent(own.port, n, opening) for n in range(count)))
        opened_s, opened_cpu_s = time.perf_counter() - began_s, (own.cpu_s() or 0.0) - idle_cpu_s
        each_bytes = ((own.resident_bytes() or 0) - idle_bytes) / count
        took_s = await federation_s(own.address)
        open_still = sum(socket.close_code is None for socket in sockets)
        for socket in sockets:
            socket.transport.abort()
    finally:
        await own.stop()
    return Idle(count, opened_s, opened_cpu_s / count, each_bytes, open_still, took_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with folder_on_disk(options.folder) as folder:
        found = asyncio.run(measure(options.connections, folder))
    print(
        f"{found.count} connections opened in {found.opened_s:.0f} s, "
        f"{1e3 * found.cpu_s:.2f} ms of the daemon's CPU and "
        f"{found.memory_bytes / 1024:.0f} KiB each; {found.open_still} still open after a "
        f"federation of {PLAN.devices} devices and {PLAN.rounds} rounds beside them, which took "
        f"{found.federation_s:.1f} s"
    )


if __name__ == "__main__":
    main()
