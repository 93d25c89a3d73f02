"""A store of any earlier schema becomes one of this version's, with all that it holds."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from coordinator import cli
from coordinator.control import Control, Wish
from coordinator.errors import StoreError
from coordinator.store import migrate, upkeep
from coordinator.store.schema import REVISIONS, metadata
from coordinator.store.sql import SqlStore
from tests.coordinator.test_store import NEXT, UPDATE
from tests.protocol.samples import SETTINGS

# Written by the version before there were migrations: round 1 abandoned and then aggregated, round
# 2 open with one report of two, and paused.
FIRST = Path(__file__).with_name("store_0001.sql")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(FIRST.read_text())
    return path


def _tables(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """Every table's columns: name, type, whether it may be null, place in the primary key."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        names = [
            name for (name,) in db.execute("select name from sqlite_master where type='table'")
        ]
        return {
            name: sorted(
                (column, kind, bool(not_null), key)
                for _, column, kind, not_null, _, key in db.execute(f"pragma table_info({name})")
            )
            for name in names
        }


def test_a_store_of_the_first_schema_is_brought_up_to_date_with_all_it_holds(old: Path) -> None:
    with contextlib.closing(SqlStore(f"sqlite:///{old}")) as store:
        snapshot = store.load("demo")
        assert snapshot is not None
        assert snapshot.settings == SETTINGS
        assert (snapshot.rounds_done, snapshot.attempts) == (1, {2: 1})
        assert snapshot.base.digest() == NEXT.digest()
        assert snapshot.memory is not None
        assert snapshot.memory.digest() == NEXT.digest()
        assert snapshot.open_round is not None
        assert snapshot.open_round.deadline_at == 70.0
        assert [member.device for member in snapshot.open_round.cohort] == ["a", "b"]
        assert snapshot.reported == {"2-1-b"}
        assert snapshot.last_asked == {"a": 2, "b": 2}
        assert store.control("demo") == Control(Wish.PAUSE)
        (report,) = store.reports("demo", 2, 1)
        assert (report.device, report.round, report.examples) == ("b", 2, 9)
        assert report.signature == bytes(64)
        assert bytes(report.update.buffer) == bytes(UPDATE.buffer)
        assert store.has_report("demo", "1-2-a")
        assert [base.number for base in store.bases("demo")] == [0, 1]
        outcomes = [
            (o.number, o.attempt, o.outcome.value, o.reports) for o in store.history("demo")
        ]
        assert outcomes == [(1, 1, "abandoned", 1), (1, 2, "aggregated", 2)]
        assert store.devices.all() == []
        assert upkeep.check(store) == ["demo"]


def test_a_migrated_store_has_the_tables_of_a_new_one_and_those_that_the_code_names(
    old: Path, tmp_path: Path
) -> None:
    SqlStore(f"sqlite:///{old}").close()
    new = tmp_path / "new.sqlite"
    with contextlib.closing(SqlStore(f"sqlite:///{new}")) as store, store.database.begin() as db:
        context = MigrationContext.configure(db, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    assert _tables(old) == _tables(new)


def test_the_code_knows_every_revision_there_is() -> None:
    config = Config()
    config.set_main_option("script_location", str(migrate.MIGRATIONS))
    script = ScriptDirectory.from_config(config)
    assert [found.revision for found in script.walk_revisions()] == list(REVISIONS[::-1])


def test_looking_does_not_migrate_and_a_copy_can_be_made_before(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _tables(old)
    url = f"sqlite:///{old}"
    for command in (["check"], ["rounds", "--name", "demo"], ["pause", "--name", "demo"]):
        assert cli.main([*command, "--store", url]) == 3
        assert f"has schema revision 0001, this version of pf2lora reads {REVISIONS[-1]}" in (
            capsys.readouterr().err
        )
    copy = tmp_path / "copy.sqlite"
    assert cli.main(["backup", "--store", url, "--out", str(copy)]) == 0
    assert _tables(old) == _tables(copy) == before


def test_a_newer_store_is_refused_with_both_revisions_named(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.sqlite"
    SqlStore(url).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "s.sqlite")) as db, db:
        db.execute("update alembic_version set version_num = '9999'")
    for create in (True, False):
        with pytest.raises(StoreError, match=rf"revision 9999; .* knows {REVISIONS[-1]} at most"):
            SqlStore(url, create=create)


def test_what_is_no_store_is_not_looked_at(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "s.sqlite")) as db, db:
        db.execute("create table something (x integer)")
    with pytest.raises(StoreError, match="is none of pf2lora's"):
        SqlStore(f"sqlite:///{tmp_path}/s.sqlite", create=False)


DIE_BEFORE_THE_END = """
import os, signal, sys
from alembic import command
from coordinator.store.sql import SqlStore
upgrade = command.upgrade
def upgrade_and_die(*arguments):
    upgrade(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
command.upgrade = upgrade_and_die
SqlStore(sys.argv[1])
"""


def test_a_migration_that_is_killed_has_changed_nothing_and_is_done_the_next_time(
    old: Path,
) -> None:
    before = _tables(old)
    url = f"sqlite:///{old}"
    died = subprocess.run([sys.executable, "-c", DIE_BEFORE_THE_END, url], check=False)
    assert died.returncode == -signal.SIGKILL
    assert _tables(old) == before
    with contextlib.closing(SqlStore(url)) as store:
        assert upkeep.check(store) == ["demo"]
    assert "alembic_version" in _tables(old)


def test_a_store_whose_making_was_cut_short_before_migrations_is_made_again(old: Path) -> None:
    with contextlib.closing(sqlite3.connect(old)) as db, db:
        db.execute("delete from schema_version")
        for table in ("reports", "members", "rounds", "bases", "federations"):
            db.execute(f"delete from {table}")
        db.execute("drop table rounds")
    with contextlib.closing(SqlStore(f"sqlite:///{old}")) as store:
        assert upkeep.check(store) == []
