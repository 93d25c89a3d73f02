"""Two federations in one real coordinator process, killed in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from coordinator import cli
from coordinator.config import START_FORMAT
from coordinator.store.sql import SqlStore
from edge_client.errors import RefusedError
from edge_client.session import Session
from edge_client.transport import websocket_dial
from tests.simulation.world import FINGERPRINT, START, FakeDevice

TOML = """
name = "{name}"
[backbone]
name = "none"
[task]
kind = "sequence-classification"
labels = ["a", "b"]
[rounds]
count = 8
cohort = 3
deadline_s = 1000.0
{more}
"""
SERVER = "[server]\nexit_when_finished = true\nhold_s = 2.0\n"
ROUNDS = {"one": "minimum_reports = 3", "two": 'mode = "asynchronous"\nreport_goal = 2'}


def _write(folder: Path) -> list[str]:
    """The arguments that name the federations' files; their start is the same."""
    arrays = {name: np.array(array) for name, array in START.arrays().items()}
    names = json.dumps(list(arrays))
    metadata = {"format": START_FORMAT, "fingerprint": FINGERPRINT, "names": names}
    save_file(arrays, folder / "start.safetensors", metadata)
    arguments = []
    for name, more in ROUNDS.items():
        server = SERVER if name == "one" else ""
        (folder / f"{name}.toml").write_text(TOML.format(name=name, more=more) + server)
        arguments += ["--config", str(folder / f"{name}.toml")]
    return arguments


class Daemon:
    """A coordinator process."""

    def __init__(self, arguments: list[str]) -> None:
        self._arguments = arguments
        self.port = 0
        self.lines: list[str] = []

    async def start(self) -> None:
        command = [sys.executable, "-m", "coordinator.cli", "serve", *self._arguments]
        self.process = await asyncio.create_subprocess_exec(
            *command, "--port", str(self.port), stderr=asyncio.subprocess.PIPE
        )
        self.port = int((await self.until(r"listening on .*:(\d+)"))[1])

    async def until(self, pattern: str) -> re.Match[str]:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.lines.append(line.decode())
            found = re.search(pattern, self.lines[-1])
            if found:
                return found
        raise AssertionError(f"never said {pattern!r}: {self.lines}")

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        await self.process.communicate()

    async def end(self) -> int:
        """Its exit code, once it has ended by itself."""
        assert self.process.stderr is not None
        self.lines += [line.decode() async for line in self.process.stderr]
        return await self.process.wait()

    async def take_part(self, device: FakeDevice, federation: str) -> None:
        session = Session(
            websocket_dial(f"ws://127.0.0.1:{self.port}"),
            device,
            federation=federation,
            identity=device.identity,
            rng=random.Random(device.name),
            first_contact_patience_s=100.0,
        )
        await session.run()


async def _and_no_longer(daemon: Daemon, scenario: Coroutine[Any, Any, int]) -> int:
    """The scenario within a minute; no process outlives it."""
    try:
        async with asyncio.timeout(60.0):
            return await scenario
    finally:
        await daemon.kill()


def test_both_go_on_after_a_kill_and_the_coordinator_ends_with_the_last(tmp_path: Path) -> None:
    daemon = Daemon(_write(tmp_path))
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
                await daemon.take_part(FakeDevice("lost"), asked)
        running = asyncio.gather(
            *(daemon.take_part(one, name) for name, group in devices.items() for one in group)
        )
        await daemon.until("round 3 of 8 aggregated")
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
    daemon = Daemon(_write(tmp_path))
    group = [FakeDevice(f"device-{i}", training_s=0.05) for i in range(3)]
    store = f"sqlite:///{tmp_path}/pf2lora.sqlite"

    async def scenario() -> int:
        await daemon.start()
        assert await asyncio.to_thread(cli.main, ["stop", "--store", store, "--name", "two"]) == 0
        await daemon.until("coordinator.two: the operator's wish: stop")
        stopped = FakeDevice("device-0")
        await daemon.take_part(stopped, "two")
        assert stopped.final is not None
        assert stopped.trained == []
        await asyncio.gather(*(daemon.take_part(one, "one") for one in group))
        return await daemon.end()

    assert asyncio.run(_and_no_longer(daemon, scenario())) == 0
    assert {len(set(device.trained)) for device in group} == {8}
