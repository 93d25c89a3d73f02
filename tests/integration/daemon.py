"""A coordinator as a process of its own, for tests that kill it or look at it from outside."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from coordinator.config import START_FORMAT
from protocol.tensors import NamedTensors
from tests.simulation.world import FINGERPRINT

TOML = """
name = "sim"
[backbone]
name = "none"
[task]
kind = "sequence-classification"
labels = ["a", "b"]
[rounds]
count = {rounds}
cohort = {cohort}
report_goal = {goal}
minimum_reports = {goal}
deadline_s = 100000.0
[server]
hold_s = 5.0
"""


def write_federation(
    folder: Path, base: NamedTensors, *, rounds: int, cohort: int, goal: int, server: str = ""
) -> None:
    """The federation of tests/simulation/world.py as files; `server` is further settings."""
    arrays = {name: np.array(array) for name, array in base.arrays().items()}
    metadata = {
        "format": START_FORMAT,
        "fingerprint": FINGERPRINT,
        "names": json.dumps(list(arrays)),
    }
    save_file(arrays, folder / "start.safetensors", metadata)
    text = TOML.format(rounds=rounds, cohort=cohort, goal=goal) + server
    (folder / "federation.toml").write_text(text)


class Daemon:
    """`pf2lora-coordinator serve` on a folder; `port` stays the same over restarts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self.port = 0
        self.lines: list[str] = []
        self._said = asyncio.Condition()

    @property
    def address(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start it, and wait until it listens."""
        command = [sys.executable, "-m", "coordinator.cli", "serve"]
        command += ["--config", str(self._folder / "federation.toml"), "--port", str(self.port)]
        self.lines.clear()
        self._process = await asyncio.create_subprocess_exec(
            *command, stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL
        )
        self._reading = asyncio.create_task(self._read(self._process.stderr))
        line = await self.said("listening on")
        self.port = int(line.rsplit(":", 1)[1])

    async def said(self, text: str) -> str:
        """The first line with this text, waiting for it; the test's timeout bounds the wait."""
        async with self._said:
            while True:
                for line in self.lines:
                    if text in line:
                        return line
                assert self._reading is not None
                assert not self._reading.done(), f"it ended without {text!r}: {self.lines}"
                await self._said.wait()

    async def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it by a signal, whether it runs or not."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        await self._process.wait()
        if self._reading is not None:
            await self._reading

    async def _read(self, stream: asyncio.StreamReader | None) -> None:
        assert stream is not None
        async for line in stream:
            async with self._said:
                self.lines.append(line.decode().rstrip())
                self._said.notify_all()
        asyncio.get_running_loop().call_soon(lambda: asyncio.ensure_future(self._wake()))

    async def _wake(self) -> None:
        async with self._said:
            self._said.notify_all()
