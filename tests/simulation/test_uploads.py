"""Large updates over links that break and coordinators that die: little is sent twice."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from coordinator import uploads
from coordinator.errors import StoreError
from coordinator.room import Room
from coordinator.store.base import PartialUpdate
from coordinator.store.memory import MemoryStore
from edge_client.session import Session
from protocol import codec, limits
from protocol.errors import ErrorCode
from protocol.fake_link import Faults
from protocol.link import Link
from protocol.messages import Chunk, Hello, Refusal
from protocol.tensors import NamedTensors
from protocol.virtual_time import simulate
from tests.simulation.world import FakeDevice, World, settings

# 2 MiB: 8 chunks.
BASE = NamedTensors.from_arrays({"layer.A": np.ones((8, 65536), np.float32)})
SIZE = len(BASE.buffer)


def _sent_up(world: World) -> int:
    """Bytes of updates that devices have put on the wire."""
    total = 0
    for link in world.device_ends:
        for data in link.sent:
            message = codec.decode(data)
            total += len(message.data) if isinstance(message, Chunk) else 0
    return total


def _run(
    world: World,
    devices: list[FakeDevice],
    kill_at: Sequence[int] = (),
    came: Sequence[int] = (),
) -> None:
    """A whole federation; the coordinator is killed whenever so many bytes of updates have come."""

    async def torment() -> None:
        for size in kill_at:
            while sum(came) < size:  # noqa: ASYNC110 - time is virtual
                await asyncio.sleep(0.001)
            await world.kill()
            await world.start()

    async def scenario() -> None:
        await world.start()
        tormentor = asyncio.create_task(torment())
        await asyncio.gather(*(world.take_part(device) for device in devices))
        tormentor.cancel()
        assert world.service is not None
        assert world.store.partial_updates("sim") == []

    simulate(scenario)


def _devices(count: int) -> list[FakeDevice]:
    return [FakeDevice(f"device-{number}", training_s=1.0 + number) for number in range(count)]


def test_a_small_update_in_one_go_leaves_no_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []

    async def recorded(self: uploads.Uploads, part: object) -> None:
        kept.append(part)

    monkeypatch.setattr(uploads.Uploads, "keep", recorded)
    _run(World(settings(count=2, cohort=2, deadline_s=1e5), base=BASE), _devices(2))
    assert kept == []


@pytest.mark.parametrize("seed", [0, 1, 3])  # whose kills come between two flushes
def test_after_a_kill_less_than_a_flush_is_sent_again(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    print(f"seed {seed}")
    flush = 2 * limits.CHUNK_BYTES_DEFAULT
    monkeypatch.setattr(uploads, "FLUSH_BYTES", flush)
    rules = settings(count=3, cohort=2, minimum_reports=2, deadline_s=1e5)
    calm, killed = _devices(2), _devices(2)
    _run(World(rules, base=BASE), calm)
    came: list[int] = []
    accept = uploads.Upload.accept

    async def counted(self: uploads.Upload, chunk: Chunk) -> None:
        came.append(len(chunk.data))
        await accept(self, chunk)

    monkeypatch.setattr(uploads.Upload, "accept", counted)
    once = 3 * len(killed) * SIZE
    kill_at = [int((part + 0.1 + 0.2 * seed) * SIZE) for part in range(4)]
    _run(World(rules, seed, Faults(delay_s=0.5), base=BASE), killed, kill_at, came)
    assert {bytes(d.final.buffer) for d in killed if d.final} == {
        bytes(d.final.buffer) for d in calm if d.final
    }
    assert once < sum(came) < once + len(kill_at) * len(killed) * flush


def test_a_disk_that_takes_no_parts_costs_a_connection_and_not_the_federation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(uploads, "FLUSH_BYTES", limits.MIB)
    failures = iter([True] * 3)
    keep_part = MemoryStore.keep_part

    def full(self: MemoryStore, federation: str, part: PartialUpdate) -> None:
        if next(failures, False):
            raise StoreError("the disk is full")
        keep_part(self, federation, part)

    monkeypatch.setattr(MemoryStore, "keep_part", full)
    devices = _devices(2)
    _run(World(settings(count=2, cohort=2, minimum_reports=2, deadline_s=1e5), base=BASE), devices)
    assert next(failures, None) is None
    assert len({device.final.digest() for device in devices if device.final}) == 1


def test_broken_links_send_each_chunk_once_and_no_more() -> None:
    rules = settings(count=3, cohort=2, minimum_reports=2, deadline_s=1e5)
    world = World(rules, 7, Faults(cut=0.05), base=BASE)
    devices = _devices(2)
    _run(world, devices)
    assert len({d.final.digest() for d in devices if d.final}) == 1
    cuts = sum(1 for link in world.device_ends) - len(devices)
    assert cuts > 0
    assert _sent_up(world) <= 3 * 2 * SIZE + cuts * limits.CHUNK_BYTES_DEFAULT


def test_an_update_gets_through_a_link_that_takes_minutes_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No chunk of the usual size comes in the time that the coordinator gives each."""
    bytes_s = 4 * limits.KIB
    dial = World.dial

    async def dial_slowly(self: World) -> Link:
        link = await dial(self)
        send = link.send

        async def slowly(data: bytes) -> None:
            await asyncio.sleep(len(data) / bytes_s)
            await send(data)

        monkeypatch.setattr(link, "send", slowly)
        return link

    monkeypatch.setattr(World, "dial", dial_slowly)
    world = World(settings(count=2, cohort=1, deadline_s=1e5), base=BASE)
    device = FakeDevice("far away")
    _run(world, [device])
    assert device.trained == [1, 2]
    assert world.refusals[ErrorCode.TIMEOUT] == 2  # 256 KiB, 128 KiB; in the second round none


def test_after_a_bad_moment_chunks_grow_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs the coordinator as much as a large one, and a device may run for months."""
    bad, sizes, dial = iter([True] * 2), list[int](), World.dial

    async def dial_badly(self: World) -> Link:
        link = await dial(self)
        send = link.send

        async def badly(data: bytes) -> None:
            message = codec.decode(data)
            if isinstance(message, Chunk):
                sizes.append(len(message.data))
                if next(bad, False):
                    await link.close()
            await send(data)

        monkeypatch.setattr(link, "send", badly)
        return link

    monkeypatch.setattr(World, "dial", dial_badly)
    _run(World(settings(count=4, cohort=1, deadline_s=1e5), base=BASE), [FakeDevice("unlucky")])
    largest = limits.CHUNK_BYTES_DEFAULT
    assert min(sizes) == largest // 4
    assert sizes[-SIZE // largest :] == [largest] * (SIZE // largest)


def test_many_uploads_share_little_memory_and_all_get_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = 12
    rules = settings(count=2, cohort=count, minimum_reports=count, deadline_s=1e5)
    world = World(rules, 1, Faults(delay_s=0.2), base=BASE)
    world.uploads_bytes_max = 3 * SIZE
    used: list[int] = []
    waited: list[bool] = []
    enter = Room._enter

    async def watched(self: Room, wanted: int) -> bool:
        waited.append(await enter(self, wanted))
        if self is world.server.roster.uploads:
            used.append(self.used_bytes)
        return waited[-1]

    monkeypatch.setattr(Room, "_enter", watched)
    devices = [FakeDevice(f"device-{number}", training_s=1.0) for number in range(count)]
    _run(world, devices)
    assert SIZE < max(used) <= 3 * SIZE
    assert any(waited)
    assert len({device.final.digest() for device in devices if device.final}) == 1


def test_small_updates_wait_for_no_memory_that_they_cannot_fill() -> None:
    count = 100
    world = World(settings(count=1, cohort=count, minimum_reports=count, deadline_s=1e5))
    world.uploads_bytes_max = limits.MIB
    world.writing_s = 2.0  # so that nothing is soon given back
    devices = [FakeDevice(f"device-{number}", training_s=1.0) for number in range(count)]
    _run(world, devices)
    assert world.refusals[ErrorCode.BUSY] == 0
    assert all(device.trained == [1] for device in devices)


def test_a_busy_coordinator_is_left_alone_for_as_long_as_it_says() -> None:
    times: list[float] = []

    async def scenario() -> None:
        world = World(settings(count=1, cohort=1, deadline_s=1e5))
        await world.start()
        loop = asyncio.get_running_loop()

        async def dial() -> object:
            times.append(loop.time())
            if len(times) > 3:
                return await world.dial()
            link = await world.dial()
            greet = link.receive

            async def refused() -> bytes:
                await greet()
                return codec.encode(Refusal(ErrorCode.BUSY, "full", 100.0))

            link.receive = refused  # type: ignore[method-assign]
            return link

        device = FakeDevice("patient")
        taking_part = Session(
            dial,  # type: ignore[arg-type]
            device,
            federation="sim",
            identity=device.identity,
            rng=world.rng,
            first_contact_patience_s=15.0,  # a busy coordinator has been met
        )
        await taking_part.run()
        assert device.final is not None

    simulate(scenario)
    pauses = np.diff(times)
    assert all(100.0 <= pause <= 201.0 for pause in pauses)
    assert len(set(pauses)) == 3


def test_a_refusal_may_come_before_any_greeting() -> None:
    from protocol.connection import Connection, Role, default_hello

    device = Connection(Role.DEVICE, default_hello("test"))
    coordinator = Connection(Role.COORDINATOR, default_hello("test"))
    device.send(default_hello("test"))
    answer = device.receive(coordinator.send(Refusal(ErrorCode.BUSY, "full", 30.0)))
    assert isinstance(answer, Refusal)
    assert answer.retry_after_s == 30.0
    assert not isinstance(answer, Hello)
