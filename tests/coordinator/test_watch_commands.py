"""`status`, `watch` and the log: what an operator reads in a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from coordinator import cli
from coordinator.log import FederationLog, JsonLines
from coordinator.store.schema import IS_OPEN, federations, rounds
from coordinator.store.sql import SqlStore
from protocol.federation import FederationSettings, Task, TaskKind
from protocol.methods import PFedLoRA
from protocol.tensors import NamedTensors
from tests.coordinator.busy_store import fill_store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    with contextlib.closing(fill_store(tmp_path / "s.sqlite", devices=40, rounds_done=3)) as store:
        yield store


@pytest.fixture
def url(store: SqlStore, tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/s.sqlite"


@pytest.fixture
def coordinated(url: str) -> Iterator[None]:
    """A coordinator runs on the store."""
    with contextlib.closing(SqlStore(url, sole=True)):
        yield


@pytest.mark.usefixtures("coordinated")
def test_status_tells_where_federations_stand(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--store", url]) == 0
    told = capsys.readouterr().out
    assert told.startswith("reviews: pf2lora on sentence-transformers/all-MiniLM-L6-v2\n")
    assert "3 of 103 done; round 4 has 13 of 24 reports, " in told
    assert cli.main(["status", "--store", url, "--name", "reviews", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert (found["name"], found["open_round"]["reports"], found["wish"]) == ("reviews", 13, "run")


def test_where_no_coordinator_runs_what_it_left_is_not_told_as_what_is(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "no coordinator is running on this store: all is as the last one left it\n"
    with contextlib.closing(SqlStore(url, sole=True)):
        assert cli.main(["status", "--store", url]) == 0
        told = capsys.readouterr().out
        assert "13 of 24 reports, " in told
        assert said not in told
        cli.main(["status", "--store", url, "--json"])
        assert json.loads(capsys.readouterr().out)["coordinator_running"] is True
    assert cli.main(["status", "--store", url]) == 0
    told = capsys.readouterr().out
    assert said in told
    assert "13 of 24 reports\n" in told
    cli.main(["status", "--store", url, "--json"])
    assert json.loads(capsys.readouterr().out)["coordinator_running"] is False


def test_a_buffer_is_told_by_the_reports_that_it_wants(
    store: SqlStore, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with store.database.begin() as db:
        db.execute(rounds.update().where(IS_OPEN).values(deadline_at=None))
    assert cli.main(["status", "--store", url]) == 0
    assert "; round 4 has 13 of 20 reports\n" in capsys.readouterr().out


def test_status_says_so_where_there_is_no_one_backbone(
    store: SqlStore, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    task = Task(TaskKind.SEQUENCE_CLASSIFICATION, ("no", "yes"))
    settings = FederationSettings("mixed", None, task, algorithm=PFedLoRA())
    start = NamedTensors.from_arrays({"shared.0.A": np.ones((8, 64), np.float32)})
    store.create(settings, start)
    assert cli.main(["status", "--store", url, "--name", "mixed"]) == 0
    assert "mixed: pfedlora on the devices' own backbones\n" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["status", "watch"])
def test_what_is_not_there_is_told_by_exit_code(
    command: str, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, "--store", url, "--name", "other"]) == 2
    assert "--name: the store has no federation 'other'" in capsys.readouterr().err
    assert cli.main([command, "--store", f"sqlite:///{tmp_path}/none.sqlite"]) == 3


def test_of_a_store_with_one_federation_its_rounds_are_listed_unnamed(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["rounds", "--store", url]) == 0
    assert capsys.readouterr().out.startswith("round    1 ")


def test_what_ends_the_daemon_is_a_line_of_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "coordinator.cli", "serve", "--log-format", "json"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    line = json.loads(ended.stderr)
    assert (ended.returncode, line["level"]) == (2, "CRITICAL")
    assert line["message"].startswith("--config: federation.toml: No such file")


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_watch_follows_until_it_is_interrupted(store: SqlStore, url: str, flags: list[str]) -> None:
    command = [sys.executable, "-m", "coordinator.cli", "watch", "--store", url, *flags]
    # Where the tests are a shell's job in the background, SIGINT is ignored and that inherited.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    assert watching.stdout is not None
    first = watching.stdout.readline()
    assert "reviews" in first
    assert "no coordinator is running" in first or '"coordinator_running": false' in first
    with store.database.begin() as db:
        db.execute(federations.update().values(wish="pause", rounds_done=100))
    assert "100" in watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    assert watching.wait() == 0
    watching.stdout.close()


def test_a_json_log_line_has_its_ids_as_fields() -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JsonLines())
    log = logging.getLogger("test-of-json-lines")
    log.addHandler(handler)
    of_one = FederationLog(log, "reviews")
    of_one.warning("report of %s", "d1", extra={"round": 3, "device": "d1"})
    line = json.loads(written.getvalue())
    assert (line["federation"], line["round"], line["device"]) == ("reviews", 3, "d1")
    assert (line["level"], line["message"]) == ("WARNING", "report of d1")
    assert line["time"].endswith("+00:00")
