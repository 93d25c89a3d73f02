"""Real processes, killed without warning in the middle of a federation."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from coordinator.store.sql import SqlStore
from edge_client.private_store import PrivateStore
from tests.integration.test_federation import _write_config, _write_data

DEVICES = 2


def _coordinator(config: Path, port: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "coordinator.cli", "serve", "--config", str(config)]
    command += ["--port", str(port), "--server-exit-when-finished", "true"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def _device(folder: Path, number: int, port: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "edge_client.cli", "run", "--scheme", "none", "--json"]
    command += [
        "--coordinator",
        f"ws://127.0.0.1:{port}",
        "--data",
        str(folder / f"{number}.jsonl"),
    ]
    command += ["--state-dir", str(folder / f"device-{number}"), "--seed", str(number)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _until(stream: Iterable[str] | None, pattern: str) -> None:
    """Read lines until one matches; the test's own timeout bounds the wait."""
    for line in stream or ():
        if re.search(pattern, line):
            return
    raise AssertionError(f"the process ended without saying {pattern!r}")


def _kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_coordinator_and_device_killed_in_the_middle_lose_nothing(tmp_path: Path) -> None:
    config = _write_config(tmp_path, count=4)
    for number in range(DEVICES):
        _write_data(tmp_path / f"{number}.jsonl", 0.25 + number / 2)
    port = _free_port()
    coordinator = _coordinator(config, port)
    _until(coordinator.stderr, "listening on")
    devices = [_device(tmp_path, number, port) for number in range(DEVICES)]

    _until(coordinator.stderr, "round 1: report of")
    _kill(coordinator)
    coordinator = _coordinator(config, port)
    _until(devices[0].stdout, "round 2: training")
    _kill(devices[0])
    devices[0] = _device(tmp_path, 0, port)

    summaries = [json.loads(device.communicate()[0].splitlines()[-1]) for device in devices]
    assert [device.returncode for device in devices] == [0, 0]
    assert [summary["summary"]["rounds"] for summary in summaries] == [4, 4]
    coordinator.communicate()
    assert coordinator.returncode == 0
    store = SqlStore(f"sqlite:///{tmp_path}/pf2lora.sqlite")
    outcomes = [(o.number, o.outcome.value, o.reports) for o in store.history("test")]
    store.close()
    assert outcomes == [(number, "aggregated", DEVICES) for number in range(1, 5)]


def test_sigterm_ends_the_coordinator_in_good_order(tmp_path: Path) -> None:
    coordinator = _coordinator(_write_config(tmp_path), 0)
    _until(coordinator.stderr, "listening on")
    coordinator.send_signal(signal.SIGTERM)
    coordinator.communicate()
    assert coordinator.returncode == 0


def test_a_device_that_nobody_listens_to_goes_on_to_the_end(tmp_path: Path) -> None:
    """As under `run | head -1`, or where the system's journal is started anew."""
    _write_data(tmp_path / "0.jsonl", 0.5)
    port = _free_port()
    coordinator = _coordinator(_write_config(tmp_path, cohort=1), port)
    _until(coordinator.stderr, "listening on")
    device = _device(tmp_path, 0, port)
    assert device.stdout is not None
    device.stdout.readline()
    device.stdout.close()
    assert device.wait() == 0
    state = PrivateStore(tmp_path / "device-0").load()
    _kill(coordinator)
    assert state is not None
    assert state.rounds_done == 2
