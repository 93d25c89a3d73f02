"""Two federations in one real coordinator process, killed in the middle."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from coordinator import cli
from coordinator.store.sql import SqlStore
from edge_client.errors import RefusedError
from tests.integration.daemon import Daemon, write_federation
from tests.simulation.world import FakeDevice

ROUNDS: dict[str, dict[str, Any]] = {
    "one": {"minimum_reports": 3},
    "two": {"mode": "asynchronous", "report_goal": 2},
}


def _written(folder: Path) -> list[Path]:
    """The federations' files; their start is the same."""
    rounds: dict[str, Any] = {"count": 8, "cohort": 3, "deadline_s": 1000.0}
    server = {"one": "exit_when_finished = true"}
    return [
        write_federation(folder, name=name, server=server.get(name, ""), **rounds, **more)
        for name, more in ROUNDS.items()
    ]


async def _and_no_longer(daemon: Daemon, scenario: Coroutine[Any, Any, int]) -> int:
    """The scenario within a minute; no process outlives it."""
    try:
        async with asyncio.timeout(60.0):
            return await scenario
    finally:
        await daemon.kill()


def test_both_go_on_after_a_kill_and_the_coordinator_ends_with_the_last(tmp_path: Path) -> None:
    daemon = Daemon(*_written(tmp_path))
    # The same three devices in both: they are told apart by their federation.
    devices = {
        name: [FakeDevice(f"device-{i}", training_s=0.05) for i in range(3)] for name in ROUNDS
    }

    async def scenario() -> int:
        await daemon.start()
        for asked, said in (
            ("", r"runs 'one', 'two': say which"),
            ("three", r"no federation 'three' here; this coordinator runs 'one', 'two'"),
        ):
            with pytest.raises(RefusedError, match=said):
                await daemon.session(FakeDevice("lost"), asked).run()
        running = asyncio.gather(
            *(daemon.session(one, name).run() for name, group in devices.items() for one in group)
        )
        await daemon.said("round 3 of 8 aggregated")
        await daemon.kill()
        await daemon.start()
        await running
        return await daemon.end()

    assert asyncio.run(_and_no_longer(daemon, scenario())) == 0
    with contextlib.closing(SqlStore(f"sqlite:///{tmp_path}/pf2lora.sqlite")) as store:
        for name, group in devices.items():
            outcomes = store.history(name)
            assert [o.number for o in outcomes if o.outcome.value == "aggregated"] == [*range(1, 9)]
            finals = {device.final.digest() for device in group if device.final}
            assert finals == {outcomes[-1].new_version}
    assert any("pf2lora.coordinator.two: round 8 opened" in line for line in daemon.lines)


def test_one_is_stopped_by_name_and_the_other_goes_on(tmp_path: Path) -> None:
    daemon = Daemon(*_written(tmp_path))
    group = [FakeDevice(f"device-{i}", training_s=0.05) for i in range(3)]
    store = f"sqlite:///{tmp_path}/pf2lora.sqlite"

    async def scenario() -> int:
        await daemon.start()
        assert await asyncio.to_thread(cli.main, ["stop", "--store", store, "--name", "two"]) == 0
        await daemon.said("coordinator.two: the operator's wish: stop")
        stopped = FakeDevice("device-0")
        await daemon.session(stopped, "two").run()
        assert stopped.final is not None
        assert stopped.trained == []
        await asyncio.gather(*(daemon.session(one, "one").run() for one in group))
        return await daemon.end()

    assert asyncio.run(_and_no_longer(daemon, scenario())) == 0
    assert {len(set(device.trained)) for device in group} == {8}
