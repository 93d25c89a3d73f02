"""Time that is not waited for, and failures that are not passed over."""

from __future__ import annotations

import asyncio

import pytest

from protocol.virtual_time import simulate


def test_an_hour_passes_in_no_time() -> None:
    async def scenario() -> float:
        await asyncio.sleep(3600.0)
        return asyncio.get_running_loop().time()

    assert simulate(scenario) == 3600.0


def test_what_fails_beside_a_scenario_fails_it() -> None:
    async def scenario() -> None:
        asyncio.get_running_loop().call_soon(int, "none")
        await asyncio.sleep(1.0)

    with pytest.raises(ExceptionGroup) as found:
        simulate(scenario)
    assert [type(one) for one in found.value.exceptions] == [ValueError]


def test_where_nothing_can_happen_any_more_it_says_so() -> None:
    async def scenario() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match="stuck"):
        simulate(scenario)
