"""Memory for transfers: bounded, in order, by turns, and never lost."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from coordinator.room import RETRY_AFTER_S, TURN_S, WAIT_S, NoRoomError, Room
from protocol.virtual_time import simulate


def test_who_finds_no_room_waits_and_gets_in_in_order() -> None:
    async def scenario() -> list[str]:
        room, order = Room(100), []

        async def transfer(name: str, size: int, takes_s: float) -> None:
            async with room.place(size) as place:
                order.append(f"{name} {'waited' if place.waited else 'at once'}")
                assert room.used_bytes <= 100
                await asyncio.sleep(takes_s)

        # c would fit beside a, but b came first.
        await asyncio.gather(transfer("a", 60, 2), transfer("b", 50, 1), transfer("c", 30, 1))
        assert room.used_bytes == 0
        return order

    assert simulate(scenario) == ["a at once", "b waited", "c waited"]


def test_what_is_larger_than_all_room_has_it_to_itself() -> None:
    async def scenario() -> None:
        room = Room(100)
        async with room.place(10_000):
            assert room.used_bytes == 100

    simulate(scenario)


def test_nobody_waits_for_ever_and_who_gives_up_takes_nothing_along() -> None:
    async def scenario() -> float:
        room = Room(100)
        async with room.place(100):
            gives_up = asyncio.create_task(_entered(room))
            await asyncio.sleep(1)
            gives_up.cancel()
            with pytest.raises(NoRoomError):
                await _entered(room)
            now = asyncio.get_running_loop().time()
        assert room.used_bytes == 0
        assert not room.is_wanted
        return now

    assert simulate(scenario) == pytest.approx(1 + WAIT_S)


def test_a_crowd_that_finds_no_room_comes_back_no_faster_than_there_is() -> None:
    """One a second gets in: so come back, in turn, those that had to be sent away."""

    async def scenario() -> list[float]:
        room, told = Room(100), []

        async def transfer() -> None:
            try:
                async with room.place(100):
                    await asyncio.sleep(1)
            except NoRoomError as error:
                told.append(error.retry_after_s)

        await asyncio.gather(*(transfer() for _ in range(301 + int(WAIT_S))))
        return told

    told = sorted(simulate(scenario))
    assert len(told) == pytest.approx(300, abs=2)
    # A device waits up to as long again: half as long again in the mean.
    assert 1.5 * (told[-1] - told[0]) == pytest.approx(300, rel=0.1)
    assert 1.5 * (told[150] - told[0]) == pytest.approx(150, rel=0.1)


def test_who_waited_behind_nobody_comes_back_soon() -> None:
    async def scenario() -> float:
        room = Room(100)
        async with room.place(100):
            with pytest.raises(NoRoomError) as found:
                await _entered(room)
        return found.value.retry_after_s

    assert simulate(scenario) == RETRY_AFTER_S


def test_a_turn_ends_only_while_others_wait() -> None:
    async def scenario() -> list[bool]:
        room, seen = Room(100), []
        async with AsyncExitStack() as stack:
            place = await stack.enter_async_context(room.place(100))
            await asyncio.sleep(10 * TURN_S)
            seen.append(place.turn_is_over)
            waiting = asyncio.create_task(_entered(room))
            await asyncio.sleep(1)
            seen.append(place.turn_is_over)
        await waiting
        return seen

    assert simulate(scenario) == [False, True]


async def _entered(room: Room) -> None:
    async with room.place(100):
        pass
