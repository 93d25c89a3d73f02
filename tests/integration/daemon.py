"""A coordinator as a process of its own, for tests that kill it or look at it from outside."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import sys
from pathlib import Path
from typing import Any

from edge_client.session import Session
from edge_client.start_file import write_start
from edge_client.transport import websocket_dial
from protocol.tensors import NamedTensors
from tests.simulation.world import START, FakeDevice, settings

TOML = """
name = "{name}"
[backbone]
name = "none"
[task]
kind = "sequence-classification"
labels = ["a", "b"]
[rounds]
{rounds}
[server]
hold_s = 5.0
{server}
"""


def write_federation(
    folder: Path,
    base: NamedTensors = START,
    *,
    name: str = "sim",
    server: str = "",
    **rounds: Any,
) -> Path:
    """The federation of tests/simulation/world.py as files; the path of its configuration.

    `server` has further lines of `[server]`.
    """
    write_start(folder / "start.safetensors", base.arrays(), settings())
    rounds = {"deadline_s": 100_000.0} | rounds
    # JSON's numbers and strings are TOML's.
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in rounds.items())
    path = folder / f"{name}.toml"
    path.write_text(TOML.format(name=name, rounds=lines, server=server))
    return path


class Daemon:
    """`pf2lora-coordinator serve`; `port` stays the same over restarts."""

    def __init__(self, *configurations: Path) -> None:
        self._arguments = [part for path in configurations for part in ("--config", str(path))]
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
        command = [sys.executable, "-m", "coordinator.cli", "serve", *self._arguments]
        # The port after this one may be somebody else's when it comes back.
        command += ["--port", str(self.port), "--admin-enabled", "false"]
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
        await self.end()

    async def end(self) -> int:
        """Its exit code, once it has ended."""
        assert self._process is not None
        assert self._reading is not None
        await self._reading
        return await self._process.wait()

    def session(self, device: FakeDevice, federation: str = "sim") -> Session:
        """A device's, from its first connection to its end."""
        return Session(
            websocket_dial(self.address),
            device,
            federation=federation,
            identity=device.identity,
            rng=random.Random(device.name),
            first_contact_patience_s=600.0,
        )

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
