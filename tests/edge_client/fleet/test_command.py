"""`pf2lora-loadtest` as a user runs it: over sockets, against a real coordinator process."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_client.fleet import cli
from edge_client.fleet.meter import DESCRIPTORS_SPARE, raise_descriptors
from tests.integration.daemon import Daemon, write_federation

SMALL = ["--layers", "2", "--width", "16", "--spawn-rate", "1000/s"]
COMMAND = [sys.executable, "-m", "edge_client.fleet.cli"]


def test_one_command_gives_figures_with_nothing_prepared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = ["--dropout", "0.2", "--training-time", "10ms-100ms"]
    asked = ["--devices", "20", "--rounds", "3", "--json", "--csv", str(tmp_path / "load")]
    code = cli.main([*SMALL, *asked, *faults, "--fail-if", "upload_p95>60s"])
    found = json.loads(capsys.readouterr().out)
    assert (code, found["errors_by_kind"], found["missed"]) == (0, {}, [])
    assert (found["rounds"], found["accepted"], found["joined"]) == (3, 60, 20)
    assert found["resumed"] == found["dropouts"] > 0
    assert 0 < found["upload_p50"] <= found["upload_p95"] <= found["upload_max"] < 60
    # 2 layers of 2 tensors of 8 x 16 numbers, up and down; the final one down too, at least.
    assert found["sent_bytes"] > 60 * 2048 < found["received_bytes"]
    if sys.platform == "linux":
        assert 0 < found["coordinator_cpu_ms_per_update"] < 1000
        assert 20 < found["coordinator_idle_mib"] <= found["coordinator_peak_mib"] < 500
    assert ["accepted", "60"] in _rows(tmp_path / "load_stats.csv")
    header, *rows = _rows(tmp_path / "load_history.csv")
    assert header[:4] == ["seconds", "connected", "rounds", "accepted"]
    assert all(len(row) == len(header) for row in rows)
    uploads = [row[header.index("upload_max")] for row in rows]
    assert all(float(time_s or 0) <= round(found["upload_max"], 6) for time_s in uploads)


def _rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_a_threshold_that_is_missed_is_exit_code_3(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main([*SMALL, "--devices", "4", "--rounds", "1", "--fail-if", "accepted<5"])
    assert code == cli.MISSED == 3
    out = capsys.readouterr().out
    assert "missed: accepted<5, and it was 4" in out
    assert re.search(r"(?m)^upload +4 ", out)


def test_settings_of_its_own_coordinator(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--set", "rounds.report_goal=3", "--set", "update_dtype=int8"]
    code = cli.main([*SMALL, "--devices", "6", "--rounds", "2", "--json", *settings])
    found = json.loads(capsys.readouterr().out)
    assert (code, found["rounds"]) == (0, 2)
    assert found["accepted"] >= 6


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--coordinator", "ws://127.0.0.1:1"], "--spoil-federation: is missing"),
        (["--coordinator", "wss://example:1"], "--spoil-federation: is missing"),
        (["--coordinator", "nowhere", "--spoil-federation", "x"], "'nowhere' is no address"),
        (["--spoil-federation", "x"], "--spoil-federation: means nothing here"),
        (["--coordinator", "ws://h:1", "--layers", "3"], "--layers: means nothing here"),
        (["--fail-if", "nonsense>1"], "is not measured"),
        (["--set", "rounds.cohrt=3"], "--rounds-cohrt"),
        (["--set", "rounds.cohort=x"], "--rounds-cohort"),
        (["--set", "server.store=sqlite:///mine.sqlite"], "server.store is the load test's own"),
        (["--set", "rounds"], "KEY=VALUE"),
        (["--csv", "/nowhere/at/all"], "/nowhere/at/all_stats.csv"),
        (["--devices", "100000000"], "100000064 file descriptors"),
        (["--rank", "1025"], "--rank: is 1025; use 1024 at most"),
        (["--layers", "4097"], "--layers: is 4097; use 4096 at most"),
        (["--width", "699051"], "--width: 699051: an adapter of 1073742336 bytes; use 1073741824"),
        (["--coordinator", "ws://h:1", "--spoil-federation", "a b"], "federation: is none"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(flags) == cli.USAGE == 2
    assert said in capsys.readouterr().err


def test_too_few_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tokens").write_text("one\ntwo\n")
    flags = ["--coordinator", "ws://h:1", "--spoil-federation", "x"]
    assert cli.main([*flags, "--token-file", str(tmp_path / "tokens")]) == 2
    assert "has 2 tokens for 100 devices" in capsys.readouterr().err


def test_the_limit_of_descriptors_is_raised_as_far_as_is_needed() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        raise_descriptors(200)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 200 + DESCRIPTORS_SPARE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def _theirs(tmp_path: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    """A load test of a coordinator that runs already; its exit code and report."""
    daemon = Daemon(write_federation(tmp_path, count=100, cohort=3))

    async def scenario() -> subprocess.CompletedProcess[str]:
        await daemon.start()
        command = [*COMMAND, "--coordinator", daemon.address, "--devices", "5", "--json", *flags]
        try:
            return await asyncio.to_thread(
                subprocess.run, command, capture_output=True, text=True, check=False
            )
        finally:
            await daemon.kill(signal.SIGTERM)

    done = asyncio.run(scenario())
    return done.returncode, json.loads(done.stdout)


def test_a_coordinator_that_runs_already_whatever_its_adapter_is(tmp_path: Path) -> None:
    code, found = _theirs(tmp_path, "--spoil-federation", "sim", "--rounds", "2")
    assert (code, found["rounds"], found["errors"]) == (0, 2, 0)
    assert found["accepted"] == 6
    assert "coordinator_peak_mib" not in found


def test_nobody_is_let_in_under_another_name(tmp_path: Path) -> None:
    code, found = _theirs(tmp_path, "--spoil-federation", "simm")
    assert (code, found["joined"], found["accepted"]) == (cli.NOBODY, 0, 0)
    assert "'sim'" in found["errors_by_kind"]["unknown_federation"]["first"]
    assert found["notes"] == ["no device was let in"]


def _started(folder: Path, *flags: str) -> subprocess.Popen[str]:
    """A load test that would go on for long, once its devices have begun to report."""
    process = subprocess.Popen(
        [*COMMAND, *SMALL, "--devices", "3", "--run-time", "1h", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    assert process.stderr is not None
    assert "3 connected" in process.stderr.readline()
    return process


def test_an_interrupt_ends_it_with_its_report(tmp_path: Path) -> None:
    process = _started(tmp_path, "--fail-if", "rounds<1")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "devices   3 of 3 joined" in out
    assert not list(tmp_path.iterdir())  # its coordinator's store is gone
    assert "Traceback" not in err


def _child_of(process: subprocess.Popen[str]) -> int:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0])


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_its_coordinator_does_not_outlive_it(tmp_path: Path) -> None:
    process = _started(tmp_path)
    watched = os.pidfd_open(_child_of(process))
    process.kill()
    process.communicate()
    assert select.select([watched], [], [], 60.0)[0], "the coordinator is still there"
    os.close(watched)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_it_says_so_when_its_coordinator_ends_in_the_middle(tmp_path: Path) -> None:
    process = _started(tmp_path)
    os.kill(_child_of(process), signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == cli.FAILED == 1
    assert "the coordinator has ended with -9" in out
    assert "3 of 3 joined" in out


def test_help_says_what_exit_codes_mean(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "exit codes: 0 good" in out
    assert "--spoil-federation" in out


def test_it_needs_no_torch() -> None:
    code = "import sys, edge_client.fleet.cli; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
