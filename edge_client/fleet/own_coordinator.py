"""A coordinator of the test's own: a child process on loopback with a made-up adapter."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from edge_client.errors import ConfigurationError, EdgeClientError
from edge_client.fleet.plan import Plan
from edge_client.start_file import write_start
from protocol import limits
from protocol.federation import Adapter, Backbone, FederationSettings, Task, TaskKind
from protocol.tensors import Array

NAME: Final = "loadtest"
_FINGERPRINT: Final = "sha256:" + "a" * 64
_LABELS: Final = ("a", "b")
# What is said here: where the child listens and keeps its store, and what it starts from.
_TAKEN: Final = ("name", "backbone", "task", "adapter", "admin")
_TAKEN_KEYS: Final = ("server.host", "server.port", "server.store", "server.start")
_LINES_KEPT: Final = 5
_USAGE: Final = 2  # the coordinator's exit code for settings that it does not take
_STOP_TIMEOUT_S: Final = 20.0
_TOML: Final = f"""
name = "{NAME}"
[backbone]
name = "none"
[task]
kind = "sequence-classification"
labels = ["a", "b"]
[adapter]
rank = {{rank}}
[rounds]
count = {{rounds}}
cohort = {{devices}}
deadline_s = 3600.0
[server]
port = 0
connections_max = {{connections}}
newcomers_max = {{connections}}
[server.rates]
connections_per_address = 0.0
messages_per_address = 0.0
"""
# Ends with the load test, however that ends: the pipe is closed with its other end.
_PROGRAM: Final = """
import os, signal, sys, threading
def follow():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=follow, daemon=True).start()
from coordinator.cli import main
sys.exit(main())
"""


class CoordinatorEndedError(EdgeClientError):
    """The coordinator that the load test has started is gone; the text has its last words."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A common adapter: so many adapted layers, each two factors between `rank` and `width`.

    The defaults are rank 8 on query and value of 12 layers of width 768: 1,179,648 bytes.

    Raises:
        ConfigurationError: no federation has such an adapter.
    """

    layers: int = 24
    rank: int = 8
    width: int = 768

    def __post_init__(self) -> None:
        for name, most in (("layers", limits.TENSORS_MAX // 2), ("rank", limits.RANK_MAX)):
            if getattr(self, name) > most:
                problem = f"is {getattr(self, name)}"
                raise ConfigurationError(f"--{name}", problem, f"{most} at most")
        size_bytes = 2 * self.layers * self.rank * self.width * np.dtype(np.float32).itemsize
        if size_bytes > limits.PAYLOAD_BYTES_MAX:
            problem = f"{self.width}: an adapter of {size_bytes} bytes"
            raise ConfigurationError("--width", problem, f"{limits.PAYLOAD_BYTES_MAX} at most")

    def arrays(self) -> dict[str, Array]:
        """Zeros: `[rank, width]` and `[width, rank]` a layer."""
        found = {}
        for layer in range(self.layers):
            found[f"layer{layer}.A"] = np.zeros((self.rank, self.width), np.float32)
            found[f"layer{layer}.B"] = np.zeros((self.width, self.rank), np.float32)
        return found


def check_settings(settings: Mapping[str, str]) -> None:
    """Refuse those keys that are not the user's to choose here.

    Raises:
        ConfigurationError: naming the key.
    """
    for key in settings:
        if key in _TAKEN_KEYS or key.partition(".")[0] in _TAKEN:
            problem = f"{key} is the load test's own to choose"
            raise ConfigurationError("--set", problem, "a coordinator of yours, with --coordinator")


class OwnCoordinator:
    """A coordinator process, looked at from outside; `/proc` tells of its CPU and memory.

    Where there is no `/proc`, as on macOS, these are not known.
    """

    def __init__(self, process: asyncio.subprocess.Process, lines: deque[str]) -> None:
        self._process = process
        self._lines = lines
        self._reading: asyncio.Task[None] | None = None
        self.port = 0

    @classmethod
    async def started(
        cls, folder: Path, plan: Plan, shape: Shape, settings: Mapping[str, str]
    ) -> OwnCoordinator:
        """One that listens, on a new store in `folder`, with every device in its cohort.

        `settings` are further settings of the coordinator, by dotted key.

        Raises:
            ConfigurationError: a setting is not to be chosen, or not to be had.
            CoordinatorEndedError: it did not start; the text says why.
        """
        check_settings(settings)
        config = _write_federation(folder, plan, shape)
        flags = [
            part
            for key, value in settings.items()
            for part in ("--" + key.replace(".", "-").replace("_", "-"), value)
        ]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _PROGRAM, "serve", "--config", str(config)),
            *("--admin-enabled", "false", *flags),
            stdin=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            # A user's variables are meant for a coordinator of theirs, and name its store.
            env={k: v for k, v in os.environ.items() if not k.startswith("PF2LORA_")},
            start_new_session=True,  # Ctrl-C is for the load test, which then ends this
        )
        own = cls(process, deque(maxlen=_LINES_KEPT))
        try:
            await own._listening()
        except BaseException:
            await own.stop()
            raise
        return own

    @property
    def address(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    async def ended(self) -> None:
        """Wait for it to end by itself.

        Raises:
            CoordinatorEndedError: always, when it has.
        """
        await self._process.wait()
        if self._reading:
            await self._reading
        code = self._process.returncode
        raise CoordinatorEndedError(
            f"the coordinator has ended with {code}: {' / '.join(self._lines)}"
        )

    def cpu_s(self) -> float | None:
        """CPU that it has used, user and system."""
        try:
            fields = self._proc("stat").rpartition(")")[2].split()
        except OSError:
            return None
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self, *, peak: bool = False) -> int | None:
        """Its resident memory, now or at its highest so far."""
        wanted = "VmHWM:" if peak else "VmRSS:"
        try:
            lines = [line.split() for line in self._proc("status").splitlines()]
        except OSError:
            return None
        return next((int(words[1]) * 1024 for words in lines if words[0] == wanted), None)

    async def stop(self) -> None:
        """End it in good order, or after a while in bad."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.returncode is None:
                self._process.send_signal(number)
            try:
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await self._process.wait()
                    break
            except TimeoutError:
                continue
        if self._reading:
            await self._reading

    def _proc(self, name: str) -> str:
        return Path(f"/proc/{self._process.pid}/{name}").read_text()

    async def _listening(self) -> None:
        log = self._process.stderr
        if log is None:
            raise RuntimeError("the child was started without a pipe for its log")
        async for line in log:
            if b"listening on" in line:
                self.port = int(line.rsplit(b":", 1)[1])
                self._reading = asyncio.create_task(self._read(log))
                return
            self._lines.append(line.decode(errors="replace").strip())
        said = self._lines[-1] if self._lines else "nothing"
        if await self._process.wait() == _USAGE:
            raise ConfigurationError("--set", said)
        raise CoordinatorEndedError(f"the coordinator did not start, and said {said}")

    async def _read(self, stream: asyncio.StreamReader) -> None:
        async for line in stream:
            self._lines.append(line.decode(errors="replace").strip())


def _write_federation(folder: Path, plan: Plan, shape: Shape) -> Path:
    """A configuration and its start; the path of the former."""
    settings = FederationSettings(
        NAME,
        Backbone("none", _FINGERPRINT),
        Task(TaskKind.SEQUENCE_CLASSIFICATION, _LABELS),
        Adapter(rank=shape.rank),
    )
    write_start(folder / "start.safetensors", shape.arrays(), settings)
    path = folder / "federation.toml"
    # Room for all of them, and for those whose old connection is not known to be gone yet.
    connections = 2 * plan.devices + 64
    rounds = plan.rounds or limits.ROUNDS_MAX
    text = _TOML.format(
        rank=shape.rank, rounds=rounds, devices=plan.devices, connections=connections
    )
    path.write_text(text)
    return path
