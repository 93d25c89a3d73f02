"""A large upload, its coordinator and its device killed without warning in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from pathlib import Path

import numpy as np

from coordinator.store.sql import SqlStore
from coordinator.uploads import FLUSH_BYTES
from edge_client.session import Session
from edge_client.transport import websocket_dial
from protocol import codec, limits
from protocol.link import Link
from protocol.messages import Chunk
from protocol.tensors import NamedTensors
from tests.integration.daemon import Daemon, write_federation
from tests.simulation.world import FakeDevice

# 16 MiB: four times what is written down at once.
BASE = NamedTensors.from_arrays({"layer.A": np.ones((64, 65536), np.float32)})
SIZE = len(BASE.buffer)


class Watched:
    """A link that counts an update's bytes, and does something once when so many have gone."""

    def __init__(self, link: Link, watch: Watch) -> None:
        self.channel = link.channel
        self._link = link
        self._watch = watch

    async def send(self, data: bytes) -> None:
        await self._watch.sending(data)
        await self._link.send(data)

    async def receive(self) -> bytes:
        return await self._link.receive()

    async def close(self) -> None:
        await self._link.close()


class Watch:
    """What has gone up so far, over all links of a device."""

    def __init__(self, daemon: Daemon, at_bytes: int) -> None:
        self._daemon = daemon
        self._at_bytes = at_bytes
        self.sent_bytes = 0
        self.killed = 0

    async def sending(self, data: bytes) -> None:
        message = codec.decode(data)
        if not isinstance(message, Chunk):
            return
        if not self.killed and self.sent_bytes >= self._at_bytes:
            self.killed += 1
            await self._daemon.said(f"{2 * FLUSH_BYTES} bytes of an update are on disk")
            await self._daemon.kill()
            await self._daemon.start()
        self.sent_bytes += len(message.data)


def test_a_killed_coordinator_has_the_upload_go_on_where_the_disk_has_it(tmp_path: Path) -> None:
    path = write_federation(tmp_path, BASE, count=1, cohort=1)

    async def scenario() -> tuple[FakeDevice, Watch]:
        daemon = Daemon(path)
        await daemon.start()
        watch = Watch(daemon, 10 * limits.MIB)
        dial = websocket_dial(daemon.address)

        async def watched() -> Link:
            return Watched(await dial(), watch)

        device = FakeDevice("device-0", training_s=0.0)
        session = Session(
            watched, device, federation="sim", identity=device.identity, rng=random.Random(1)
        )
        await session.run()
        await daemon.kill()
        return device, watch

    device, watch = asyncio.run(scenario())
    assert watch.killed == 1
    assert device.final is not None
    assert len(device.receipts) == 1
    assert SIZE < watch.sent_bytes < SIZE + FLUSH_BYTES
    store = SqlStore(f"sqlite:///{tmp_path}/pf2lora.sqlite")
    assert store.partial_updates("sim") == []
    assert [outcome.reports for outcome in store.history("sim")] == [1]
    store.close()


DEVICE = """
import asyncio, random, sys
from edge_client.session import Session
from edge_client.transport import websocket_dial
from protocol import codec
from protocol.messages import Chunk
from tests.simulation.world import FakeDevice

async def main(address):
    dial = websocket_dial(address)
    async def spoken():
        link = await dial()
        send = link.send
        async def loud(data):
            message = codec.decode(data)
            await send(data)
            if isinstance(message, Chunk):
                print(message.offset, flush=True)
        link.send = loud
        return link
    device = FakeDevice("device-0", training_s=0.0)
    who = device.identity
    await Session(spoken, device, federation="sim", identity=who, rng=random.Random(1)).run()

asyncio.run(main(sys.argv[1]))
"""


async def _device(address: str, until: int = -1) -> list[int]:
    """The offsets that a device process sends; it is killed where it sends `until`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DEVICE, address, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    offsets = []
    async for line in process.stdout:
        offsets.append(int(line))
        if offsets[-1] == until:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            break
    await process.communicate()
    return offsets


def test_a_killed_device_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = write_federation(tmp_path, BASE, count=1, cohort=1)

    async def scenario() -> tuple[list[int], list[int]]:
        daemon = Daemon(path)
        await daemon.start()
        try:
            first = await _device(daemon.address, until=10 * limits.MIB)
            await daemon.said("bytes of an update are on disk")
            return first, await _device(daemon.address)
        finally:
            await daemon.kill()

    first, second = asyncio.run(scenario())
    assert first[0] == 0
    assert second[-1] == SIZE - limits.CHUNK_BYTES_DEFAULT
    # What had arrived is not sent again, not even since the last flush.
    assert 10 * limits.MIB - limits.CHUNK_BYTES_DEFAULT <= second[0] < SIZE
    assert second == list(range(second[0], SIZE, limits.CHUNK_BYTES_DEFAULT))
