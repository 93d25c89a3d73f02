"""What the SQL store owes the disk: damage, full disks, copies, locks, kills."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from coordinator import cli
from coordinator.control import Control, Wish
from coordinator.errors import StoreError
from coordinator.store import upkeep
from coordinator.store.base import Member
from coordinator.store.database import PAGE_BYTES
from coordinator.store.schema import REVISIONS
from coordinator.store.sql import SqlStore
from protocol.tensors import NamedTensors
from tests.coordinator.federation_file import write_federation
from tests.coordinator.small_disk import files_of_at_most
from tests.coordinator.test_store import BASE, NEXT, UPDATE, _report, _round
from tests.protocol.samples import SETTINGS


def _filled(path: Path) -> SqlStore:
    store = SqlStore(f"sqlite:///{path}")
    store.create(SETTINGS, BASE)
    store.open_round("demo", _round())
    store.keep_reports("demo", [_report("a")])
    return store


def _run_rounds(store: SqlStore, numbers: range, update: NamedTensors = UPDATE) -> None:
    for number in numbers:
        store.open_round("demo", _round(number))
        records = [dataclasses.replace(_report(d, number), update=update) for d in ("a", "b")]
        store.keep_reports("demo", records)
        store.close_round("demo", number, 1, NEXT, 90.0)


def _size_of(store: SqlStore) -> int:
    with store.database.begin() as db:
        return int(db.scalar(sa.text("PRAGMA page_count")) or 0) * PAGE_BYTES


def test_a_round_costs_as_much_after_a_hundred_as_at_first(tmp_path: Path) -> None:
    steps: list[int] = []
    with contextlib.closing(SqlStore(f"sqlite:///{tmp_path}/s.sqlite")) as store:
        store.create(SETTINGS, BASE)
        with store.database.plain() as db:
            sqlite = db.connection.driver_connection
        assert isinstance(sqlite, sqlite3.Connection)
        _run_rounds(store, range(1, 31))  # as many base versions as are ever kept
        for numbers in (range(31, 36), range(36, 131), range(131, 136)):
            steps.append(0)

            def count() -> int:
                steps[-1] += 1
                return 0

            sqlite.set_progress_handler(count, 10)
            _run_rounds(store, numbers)
    assert steps[2] < 1.3 * steps[0], steps


def test_what_stays_of_reports_takes_no_room_for_their_updates(tmp_path: Path) -> None:
    update = NamedTensors.from_arrays({"x.A": np.ones((1000, 3), np.float32)})
    with contextlib.closing(SqlStore(f"sqlite:///{tmp_path}/s.sqlite")) as store:
        store.create(SETTINGS, BASE)
        empty_bytes = _size_of(store)
        _run_rounds(store, range(1, 61), update)
        # 120 reports, of which each had 12 kB; and a page or two for each table and index.
        assert _size_of(store) < empty_bytes + 120 * 1000 + 20 * PAGE_BYTES


def _bytes_read() -> int:
    """What this process has asked files for so far; skips the test where that is not told."""
    account = Path("/proc/self/io")
    if not account.exists():
        pytest.skip("this system keeps no account of what a process reads")
    return int(account.read_text().split()[1])


def _keep_large(path: Path) -> int:
    """A store with as many large reports as a transaction holds; the bytes of their updates."""
    values = np.arange(250_000, dtype=np.float32)
    records = []
    for number in range(16):
        update = NamedTensors.from_arrays({"x.A": values + number})
        records.append(dataclasses.replace(_report(f"device-{number:02}"), update=update))
    cohort = tuple(Member(one.device, one.assignment) for one in records)
    with contextlib.closing(SqlStore(f"sqlite:///{path}")) as store:
        store.create(SETTINGS, BASE)
        store.open_round("demo", dataclasses.replace(_round(), cohort=cohort))
        store.keep_reports("demo", records)
    return sum(len(one.update.buffer) for one in records)


def test_neither_a_rounds_end_nor_a_block_of_its_updates_reads_them_whole(tmp_path: Path) -> None:
    size_bytes = _keep_large(tmp_path / "s.sqlite")
    with contextlib.closing(SqlStore(f"sqlite:///{tmp_path}/s.sqlite")) as store:
        began = _bytes_read()
        blocks = list(store.blocks("demo", 1, 1, 800_000, 800_008))
        assert _bytes_read() - began < size_bytes / 8
        assert [np.frombuffer(one, np.float32)[1] for one in blocks] == [
            200_001 + number for number in range(16)
        ]
        began = _bytes_read()
        store.close_round("demo", 1, 1, NEXT, 90.0)
        assert _bytes_read() - began < size_bytes / 8
        assert upkeep.check(store) == ["demo"]


def _has_map(path: Path) -> bool:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute("PRAGMA auto_vacuum").fetchall() != [(0,)]


def test_a_store_without_a_map_of_its_pages_works_and_its_backup_has_one(tmp_path: Path) -> None:
    """Stores of earlier versions have none."""
    path, copy = tmp_path / "s.sqlite", tmp_path / "copy.sqlite"
    _keep_large(path)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA auto_vacuum = NONE")
        db.execute("VACUUM")
    assert cli.main(["backup", "--store", f"sqlite:///{path}", "--out", str(copy)]) == 0
    for file in (path, copy):
        with contextlib.closing(SqlStore(f"sqlite:///{file}")) as store:
            assert len(list(store.blocks("demo", 1, 1, 0, 4))) == 16
            store.close_round("demo", 1, 1, NEXT, 90.0)
            assert upkeep.check(store) == ["demo"]
    assert (_has_map(path), _has_map(copy)) == (False, True)


def test_wishes_are_written_down_and_wrong_ones_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = _filled(tmp_path / "s.sqlite")
    where = ["--store", f"sqlite:///{tmp_path}/s.sqlite", "--name"]
    for command, wish in (("pause", Wish.PAUSE), ("stop", Wish.STOP), ("resume", Wish.RUN)):
        assert cli.main([command, *where, "demo"]) == 0
        assert store.control("demo") == Control(wish)
    assert cli.main(["rollback", *where, "demo", "--to", "0"]) == 0
    assert store.control("demo") == Control(Wish.RUN, 0)
    assert cli.main(["rollback", *where, "demo", "--to", "7"]) == 2
    assert "7 is not kept; there are: [0]" in capsys.readouterr().err
    assert cli.main(["pause", *where, "other"]) == 2
    assert "no federation 'other'" in capsys.readouterr().err
    store.close()


def test_a_store_in_use_is_checked_and_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = _filled(tmp_path / "s.sqlite")
    url, copy = f"sqlite:///{tmp_path}/s.sqlite", tmp_path / "copy.sqlite"
    assert cli.main(["check", "--store", url]) == 0
    assert f"sound, schema revision {REVISIONS[-1]}; federations: demo" in capsys.readouterr().out
    assert cli.main(["backup", "--store", url, "--out", str(copy)]) == 0
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    written = copy.read_bytes()
    assert cli.main(["check", "--store", f"sqlite:///{copy}"]) == 0
    assert copy.read_bytes() == written
    store.keep_reports("demo", [_report("b")])  # after the copy
    copied = SqlStore(f"sqlite:///{copy}", create=False)
    assert upkeep.check(copied) == ["demo"]
    assert [report.device for report in copied.reports("demo", 1, 1)] == ["a"]
    assert cli.main(["backup", "--store", url, "--out", str(copy)]) == 3
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["check", "--store", f"sqlite:///{tmp_path}/none.sqlite"]) == 3
    assert not (tmp_path / "none.sqlite").exists()
    copied.close()
    store.close()


@pytest.mark.parametrize("column", ["base", "update_bytes"])
def test_a_changed_byte_is_found(tmp_path: Path, column: str) -> None:
    _filled(tmp_path / "s.sqlite").close()
    table = {"base": "bases", "update_bytes": "reports"}[column]
    with contextlib.closing(sqlite3.connect(tmp_path / "s.sqlite")) as database, database:
        ((value,),) = database.execute(f"select {column} from {table}").fetchall()
        changed = bytes([value[0] ^ 1]) + value[1:]
        database.execute(f"update {table} set {column} = ?", (changed,))
    store = SqlStore(f"sqlite:///{tmp_path}/s.sqlite")
    with pytest.raises(StoreError, match="do not match their digest"):
        upkeep.check(store)
    store.close()


def test_a_damaged_base_version_is_found_before_one_goes_back_to_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.closing(_filled(tmp_path / "s.sqlite")) as store:
        store.close_round("demo", 1, 1, NEXT, 90.0)
        with store.database.begin() as db:
            db.execute(sa.text("UPDATE bases SET base = zeroblob(length(base)) WHERE number = 0"))
        damaged = rf"s\.sqlite: the base version after round 0 \({BASE.digest().hex()[:12]}\): dam"
        with pytest.raises(StoreError, match=damaged):
            upkeep.check(store)
        with pytest.raises(StoreError, match=damaged):
            store.roll_back("demo", 0)
        snapshot = store.load("demo")
        assert snapshot
        assert snapshot.rounds_done == 1
        where = ["--store", f"sqlite:///{tmp_path}/s.sqlite", "--name", "demo"]
        assert cli.main(["rollback", *where, "--to", "0"]) == 3
        assert re.search(damaged, capsys.readouterr().err)
        assert store.control("demo") == Control()


@pytest.mark.parametrize("text", [bytes(range(256)), bytes(256)], ids=["garbage", "zeros"])
def test_a_torn_page_is_found_by_check_and_when_a_coordinator_starts(
    tmp_path: Path, text: bytes
) -> None:
    file = tmp_path / "s.sqlite"
    _filled(file).close()
    content = file.read_bytes()
    for begin in range(0, len(content), PAGE_BYTES):
        torn = bytearray(content)
        torn[begin : begin + PAGE_BYTES] = text * (PAGE_BYTES // 256)
        file.write_bytes(torn)
        with pytest.raises(StoreError, match=r"s\.sqlite"):
            SqlStore(f"sqlite:///{file}", sole=True).close()
        with (
            pytest.raises(StoreError, match=r"s\.sqlite"),
            contextlib.closing(SqlStore(f"sqlite:///{file}", create=False)) as store,
        ):
            upkeep.check(store)
    file.write_bytes(content)
    SqlStore(f"sqlite:///{file}", sole=True).close()


def test_a_coordinator_does_not_write_on_where_a_page_is_torn_that_it_does_not_need(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_federation(tmp_path)
    file = tmp_path / "pf2lora.sqlite"
    with contextlib.closing(SqlStore(f"sqlite:///{file}")) as store, store.database.begin() as db:
        page = db.scalar(sa.text("SELECT rootpage FROM sqlite_master WHERE name = 'tokens'"))
    content = bytearray(file.read_bytes())
    content[(page - 1) * PAGE_BYTES : page * PAGE_BYTES] = bytes(PAGE_BYTES)
    file.write_bytes(content)
    assert cli.main(["serve", "--config", str(config), "--port", "0"]) == 3
    said = capsys.readouterr().err
    assert re.search(rf"pf2lora\.sqlite: damaged: .*{page}.*; put a backup in its place", said)


@pytest.mark.parametrize("replaced", [False, True], ids=["removed", "replaced"])
def test_nothing_is_kept_in_a_file_that_is_the_stores_no_more(
    tmp_path: Path, replaced: bool
) -> None:
    path = tmp_path / "s.sqlite"
    _filled(path).close()
    store = SqlStore(f"sqlite:///{path}", sole=True)
    assert store.has_report("demo", _report("a").assignment)
    if replaced:
        shutil.copy(path, tmp_path / "copy.sqlite")
        (tmp_path / "copy.sqlite").replace(path)
    else:
        path.unlink()
    with pytest.raises(StoreError, match=r"s\.sqlite: its file was removed or replaced"):
        store.keep_reports("demo", [_report("b")])
    store.close()


def test_a_full_disk_keeps_what_was_kept(tmp_path: Path) -> None:
    store = _filled(tmp_path / "s.sqlite")
    with store.database.begin() as db:
        db.execute(sa.text("PRAGMA max_page_count = 1"))  # no page more than there are
    large = NamedTensors.from_arrays({"x.A": np.zeros((200, 300), np.float32)})
    report = dataclasses.replace(_report("b"), update=large)
    with pytest.raises(StoreError, match="full"):
        store.keep_reports("demo", [report])
    assert [kept.device for kept in store.reports("demo", 1, 1)] == ["a"]
    assert upkeep.check(store) == ["demo"]
    store.close()


def test_a_backup_that_fails_leaves_nothing_that_looks_like_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _filled(tmp_path / "s.sqlite").close()
    backup = ["backup", "--store", f"sqlite:///{tmp_path}/s.sqlite", "--out"]
    assert cli.main([*backup, str(tmp_path / "none" / "copy.sqlite")]) == 3
    said = f"{tmp_path}/none/copy.sqlite cannot be written: No such file or directory"
    assert said in capsys.readouterr().err
    before = sorted(tmp_path.iterdir())
    with files_of_at_most(4 * PAGE_BYTES):
        assert cli.main([*backup, str(tmp_path / "copy.sqlite")]) == 3
    assert sorted(tmp_path.iterdir()) == before
    assert cli.main([*backup, str(tmp_path / "copy.sqlite")]) == 0
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "copy.sqlite"])


def test_what_may_not_be_written_says_what_must_be(tmp_path: Path) -> None:
    with contextlib.closing(_filled(tmp_path / "s.sqlite")) as store:
        with store.database.begin() as db:
            db.execute(sa.text("PRAGMA query_only = ON"))
        with pytest.raises(StoreError, match="readonly database; the file and its folder must be"):
            store.set_wish("demo", Wish.PAUSE)
    with pytest.raises(StoreError, match="there is no such file"):
        SqlStore(f"sqlite:///{tmp_path}", create=False)


@pytest.mark.parametrize("content", [b"not a database" * 100, b"SQLite format 3\0" + bytes(5000)])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "store.sqlite"
    file.write_bytes(content)
    with pytest.raises(StoreError, match=r"store\.sqlite"):
        SqlStore(f"sqlite:///{file}")


def test_one_coordinator_has_a_store_for_itself_and_commands_read_beside_it(
    tmp_path: Path,
) -> None:
    url = f"sqlite:///{tmp_path}/s.sqlite"
    for _ in range(2):  # closed, it is free again
        with contextlib.closing(SqlStore(url, sole=True)):
            with pytest.raises(StoreError, match=r"s\.sqlite: another coordinator is run"):
                SqlStore(url, sole=True)
            with contextlib.closing(SqlStore(url, create=False)) as beside:
                assert beside.database.is_coordinated
        with contextlib.closing(SqlStore(url, create=False)) as beside:
            assert beside.database.is_coordinated is False
    assert stat.S_IMODE((tmp_path / "s.sqlite.lock").stat().st_mode) == 0o600


def test_a_store_is_one_coordinators_by_whatever_name_it_is_reached(tmp_path: Path) -> None:
    (tmp_path / "current.sqlite").symlink_to(tmp_path / "s.sqlite")
    with contextlib.closing(SqlStore(f"sqlite:///{tmp_path}/s.sqlite", sole=True)):
        other = f"sqlite:///{tmp_path}/current.sqlite"
        with pytest.raises(StoreError, match="another coordinator is running on it"):
            SqlStore(other, sole=True)
        with contextlib.closing(SqlStore(other, create=False)) as beside:
            assert beside.database.is_coordinated


def test_asking_whether_a_coordinator_runs_keeps_none_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that asks has the lock for a moment."""
    url = f"sqlite:///{tmp_path}/s.sqlite"
    SqlStore(url, sole=True).close()
    asking = os.open(tmp_path / "s.sqlite.lock", os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_SH)
    monkeypatch.setattr("time.sleep", lambda _: os.close(asking))
    SqlStore(url, sole=True).close()


@pytest.mark.parametrize(
    "name", ["a?b=c", "a#b", "a%3Fb%", "a?mode=memory&uri=true", "a:b@c", "ä b"]
)
def test_a_path_is_a_path_whatever_is_in_it(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    url = f"sqlite:///{folder}/{name}.sqlite"
    _filled(folder / f"{name}.sqlite").close()
    assert sorted(tmp_path.iterdir()) == [folder]
    with contextlib.closing(SqlStore(url, create=False, sole=True)) as store:
        assert store.load("demo") is not None
        upkeep.backup(store.database, folder / "copy")
    names = {f"{name}.sqlite", f"{name}.sqlite.lock", "copy"}
    assert {file.name for file in folder.iterdir()} == names
    (folder / f"{name}.sqlite").unlink()
    with pytest.raises(StoreError, match=re.escape(f"the store {url}: there is no such file")):
        SqlStore(url, create=False)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_what_cannot_be_locked_is_no_coordinators(url: str) -> None:
    with pytest.raises(StoreError, match="only a SQLite file can be kept for one coordinator"):
        SqlStore(url, sole=True)


@pytest.mark.parametrize("package", ["coordinator", "edge_client"])
def test_where_files_cannot_be_locked_neither_side_starts(package: str) -> None:
    code = f"import os, pathlib; os.name = 'nt'; import {package}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: pf2lora runs on Linux and macOS" in ended.stderr


def test_a_url_that_is_none_is_refused() -> None:
    with pytest.raises(StoreError, match="the store: this is no database URL, such as sqlite:///"):
        SqlStore("nonsense")


KEEP_AND_HANG = """
import sys, time
from coordinator.store.sql import SqlStore
from tests.coordinator.test_store import BASE, SETTINGS, _report, _round
store = SqlStore(sys.argv[1])
store.create(SETTINGS, BASE)
store.open_round("demo", _round())
store.keep_reports("demo", [_report("a")])
print("kept", flush=True)
time.sleep(60)
"""


def test_a_report_that_was_kept_outlives_a_kill(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.sqlite"
    process = subprocess.Popen(
        [sys.executable, "-c", KEEP_AND_HANG, url], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "kept\n"
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    process.wait()
    store = SqlStore(url)
    assert [bytes(report.update.buffer) for report in store.reports("demo", 1, 1)] == [
        bytes(UPDATE.buffer)
    ]
    store.close()


CLOSE_AND_DIE = """
import os, signal, sys
from coordinator.store.sql import SqlStore
from tests.coordinator.test_store import NEXT
def die(*_):  # what comes after the updates have been let go
    os.kill(os.getpid(), signal.SIGKILL)
SqlStore.drop_unawaited = die
SqlStore(sys.argv[1]).close_round("demo", 1, 1, NEXT, 90.0)
"""


def test_a_kill_while_a_round_ends_leaves_all_its_reports(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    size_bytes, url = _keep_large(path), f"sqlite:///{path}"
    ended = subprocess.run([sys.executable, "-c", CLOSE_AND_DIE, url], check=False)
    assert ended.returncode == -signal.SIGKILL
    with contextlib.closing(SqlStore(url, sole=True)) as store:
        assert sum(len(one.update.buffer) for one in store.reports("demo", 1, 1)) == size_bytes
        store.close_round("demo", 1, 1, NEXT, 90.0)
        assert list(store.reports("demo", 1, 1)) == []
        assert upkeep.check(store) == ["demo"]


def test_another_databases_url_is_refused_and_its_password_not_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["status", "--store", "postgresql://me:secret@db/x"]) == 3
    told = capsys.readouterr().err
    assert "the store postgresql://me:***@db/x: is none that this can be; use a SQLite file" in told
