"""What is around the daemon: addresses, terminals, pipes that close, places with odd names."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from coordinator import cli
from coordinator.errors import AddressError
from tests.coordinator.busy_store import fill_store
from tests.coordinator.federation_file import write_federation

COMMAND = [sys.executable, "-m", "coordinator.cli"]


class Serving:
    """A daemon on any port, once it listens; `dashboard` is its address as the log has it."""

    def __init__(self, config: Path, *flags: str, under: tuple[str, ...] = ()):
        command = [*COMMAND, "serve", "--config", str(config), "--port", "0", *flags]
        # With buffers, as most have it.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
        self.process = subprocess.Popen(
            [*under, *command], stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stderr is not None
        self.log = self.process.stderr
        # Where the federation stands, and both addresses.
        self.said = "".join(self.log.readline() for _ in range(3))
        found = re.search(r"dashboard at (\S+)\n", self.said)
        assert found, self.said + self.log.read()
        self.dashboard = found[1]

    def status(self) -> int:
        """The health check's."""
        with urllib.request.urlopen(f"{self.dashboard}readyz", timeout=30) as answer:
            return int(answer.status)

    def end(self) -> int:
        """Ask it to stop; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        if not self.log.closed:
            self.said += self.log.read()
            self.log.close()
        return code


def test_an_ipv6_address_is_told_as_a_url_has_it(tmp_path: Path) -> None:
    serving = Serving(write_federation(tmp_path), "--host", "::1", "--admin-host", "::1")
    assert re.search(r"listening on \[::1\]:\d+\n", serving.said)
    assert serving.dashboard.startswith("http://[::1]:")
    assert serving.status() == 200
    assert serving.end() == 0
    taken = AddressError("server", "::1", 80, OSError(98, "in use"))
    assert "cannot listen on [::1]:80: " in str(taken)


@pytest.mark.parametrize("key", ["server", "admin"])
def test_brackets_are_not_part_of_an_address(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    flags = ["--config", str(write_federation(tmp_path)), f"--{key}-host", "[::1]"]
    assert cli.main(["check-config", *flags]) == 2
    said = f"{key}.host: is '[::1]'; only a URL has an address in brackets"
    assert said in capsys.readouterr().err


def test_a_log_that_nobody_reads_any_more_ends_nothing(tmp_path: Path) -> None:
    """As under `serve 2>&1 | head -2`."""
    serving = Serving(write_federation(tmp_path))
    serving.log.close()
    assert serving.status() == 200
    assert serving.end() == 0


def test_a_daemon_without_standard_output_ends_in_good_order(tmp_path: Path) -> None:
    closed = ("sh", "-c", 'exec "$0" "$@" >&-')
    serving = Serving(write_federation(tmp_path), under=closed)
    assert serving.end() == 0
    assert "Traceback" not in serving.said


def test_a_store_may_lie_anywhere(tmp_path: Path) -> None:
    folder = tmp_path / "two words, späte Größe, 日本"
    folder.mkdir()
    assert Serving(write_federation(folder)).end() == 0
    store = f"sqlite:///{folder}/pf2lora.sqlite"
    for command in (["status"], ["check"], ["backup", "--out", str(folder / "a copy.sqlite")]):
        assert cli.main([*command, "--store", store]) == 0
    assert (folder / "a copy.sqlite").is_file()


def test_an_interrupted_command_says_so_by_its_exit_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "status", interrupted)
    assert cli.main(["status", "--store", "sqlite:///s.sqlite"]) == 130


def test_a_watch_that_nobody_reads_ends(tmp_path: Path) -> None:
    """As under `watch | head -1`, though nothing changes any more."""
    url = f"sqlite:///{tmp_path}/s.sqlite"
    fill_store(tmp_path / "s.sqlite", devices=40, rounds_done=1).close()
    watching = subprocess.Popen(
        [*COMMAND, "watch", "--store", url], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert watching.stdout is not None
    assert watching.stderr is not None
    assert b"reviews" in watching.stdout.readline()
    watching.stdout.close()
    assert watching.wait(60) == 0
    assert watching.stderr.read() == b""
    watching.stderr.close()


def test_a_configuration_from_a_windows_editor_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_federation(tmp_path)
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes().replace(b"\n", b"\r\n"))
    assert cli.main(["check-config", "--config", str(config)]) == 0
