"""What systemd is told, over a real datagram socket."""

from __future__ import annotations

import asyncio
import configparser
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.errors import AddressError, ConfigurationError
from coordinator.systemd import ALIVE, READY, ServiceManager
from tests.coordinator.federation_file import write_federation

UNIT = Path(__file__).parents[2] / "examples/systemd/pf2lora-coordinator.service"


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(name)
        heard.settimeout(30)
        yield name, heard


def test_the_daemon_tells_ready_alive_and_stopping(
    tmp_path: Path, manager: tuple[str, socket.socket]
) -> None:
    name, heard = manager
    config = write_federation(tmp_path)
    command = [sys.executable, "-m", "coordinator.cli", "serve", "--config", str(config)]
    environ = {**os.environ, "NOTIFY_SOCKET": name, "WATCHDOG_USEC": "100000"}
    daemon = subprocess.Popen(
        [*command, "--port", "0"], env=environ, stderr=subprocess.PIPE, text=True
    )
    said = [heard.recv(100).decode() for _ in range(4)]
    assert READY in said
    assert said.count(ALIVE) >= 2
    daemon.send_signal(signal.SIGTERM)
    while heard.recv(100).decode() != "STOPPING=1":
        pass
    _, log = daemon.communicate()
    assert daemon.returncode == 0, log


def test_the_unit_restarts_what_a_restart_may_mend_and_not_without_end() -> None:
    unit = configparser.ConfigParser()
    unit.read_string(UNIT.read_text())
    service, limits = unit["Service"], unit["Unit"]
    kept_down = {int(code) for code in service["RestartPreventExitStatus"].split()}
    for_a_person = {ConfigurationError.exit_code, AddressError.exit_code}
    assert kept_down == for_a_person
    assert service["Restart"] == "on-failure"
    # The slowest failure that there is: a store that is read to its end before a start is given up.
    slowest_s = int(service["TimeoutStartSec"]) + int(service["RestartSec"])
    assert int(limits["StartLimitBurst"]) * slowest_s < int(limits["StartLimitIntervalSec"])


def test_the_unit_gives_a_start_the_time_to_read_a_large_store() -> None:
    unit = configparser.ConfigParser()
    unit.read_string(UNIT.read_text())
    store_bytes, disk_bytes_s = 50e9, 100e6
    assert int(unit["Service"]["TimeoutStartSec"]) > store_bytes / disk_bytes_s


def test_an_abstract_socket_is_meant_by_an_at() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(f"\0pf2lora-test-{os.getpid()}")
        heard.settimeout(30)
        ServiceManager({"NOTIFY_SOCKET": f"@pf2lora-test-{os.getpid()}"}).tell(READY)
        assert heard.recv(100) == b"READY=1"


def test_without_systemd_or_for_another_process_nothing_is_said(
    manager: tuple[str, socket.socket],
) -> None:
    name, heard = manager
    ServiceManager({}).tell(READY)
    other = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
    asyncio.run(ServiceManager(other).keep_alive())  # returns at once
    heard.setblocking(False)
    with pytest.raises(BlockingIOError):
        heard.recv(100)
