"""Two federations in one real coordinator, killed in the middle, or one with much to read."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from coordinator import cli, config
from coordinator.aggregation.base import Reports
from coordinator.aggregation.robust import Robust
from coordinator.server import CoordinatorServer
from coordinator.store.sql import SqlStore
from edge_client.errors import RefusedError
from edge_client.session import Session
from edge_client.transport import websocket_dial
from protocol.tensors import NamedTensors
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


def test_no_newcomer_waits_for_a_rule_that_reads_all_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, go_on = threading.Event(), threading.Event()
    finalize = Robust.finalize

    def slowly(rule: Robust, reports: Reports) -> NamedTensors:
        reading.set()
        assert go_on.wait(60.0)
        return finalize(rule, reports)

    monkeypatch.setattr(Robust, "finalize", slowly)
    rounds: dict[str, Any] = {"count": 1, "cohort": 1, "minimum_reports": 1}
    median = '[aggregation]\nname = "median"'
    files = [
        write_federation(tmp_path, name="slow", server=median, **rounds),
        write_federation(tmp_path, name="other", **rounds),
    ]
    flags = {"server.port": "0", "admin.enabled": "false"}
    first, newcomer = (FakeDevice(n, training_s=0.05) for n in ("first", "newcomer"))

    async def scenario() -> None:
        async with CoordinatorServer(config.load(files, flags, {})) as server:
            dial = websocket_dial(f"ws://127.0.0.1:{server.port}")

            def session(device: FakeDevice, federation: str) -> Session:
                return Session(
                    dial,
                    device,
                    federation=federation,
                    identity=device.identity,
                    rng=random.Random(device.name),
                )

            slow = asyncio.create_task(session(first, "slow").run())
            await asyncio.to_thread(reading.wait, 60.0)
            try:
                async with asyncio.timeout(20.0):
                    await session(newcomer, "other").run()
            finally:
                go_on.set()
            await slow
            told = [one for a in server.watch._metrics.store_seconds.collect() for one in a.samples]
            assert "staleness" in {one.labels["call"] for one in told}  # of what the rule reads

    asyncio.run(scenario())
    assert first.final is not None
    assert newcomer.final is not None
