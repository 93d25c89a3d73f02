"""`pf2lora-coordinator`: serve a federation, check its configuration, look after its store.

What a user asked for goes to standard output; the log and what went wrong to standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coordinator import config, save_command, trust_cli
from coordinator.control import Wish
from coordinator.errors import CoordinatorError, StoreError
from coordinator.log import FORMATS, set_up_log
from coordinator.save_command import kept_base
from coordinator.security import server_tls
from coordinator.server import serve
from coordinator.setting_flags import add_setting_flags, add_store_flag
from coordinator.settings_change import settings_change
from coordinator.store import upkeep, views
from coordinator.store.base import RoundOutcome
from coordinator.store.database import Database
from coordinator.store.schema import REVISIONS
from coordinator.store.sql import SqlStore
from coordinator.watch_commands import named, status, watch
from protocol.command_end import exit_code_of, let_go_of_log
from protocol.command_parser import CommandParser, add_command
from protocol.federation import FederationSettings

log = logging.getLogger("pf2lora.coordinator")

EXIT_CODES = """\
exit codes: 0 done or stopped in good order; 1 unexpected failure; 2 configuration or usage;
3 store; 4 address in use or not available; 130 interrupted"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return exit_code_of(lambda: int(options.command(options)))
    except CoordinatorError as error:
        print(f"pf2lora-coordinator: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        let_go_of_log()


class _Command(CommandParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options, epilog=EXIT_CODES)


def _parser() -> argparse.ArgumentParser:
    parser = _Command(
        prog="pf2lora-coordinator", description="Coordinates a federation of devices."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_configured(commands)
    for name, function, about in (
        ("rounds", _rounds, "list the rounds that are over"),
        ("status", status, "say where federations stand"),
        ("watch", watch, "say where federations stand whenever that changes, until interrupted"),
    ):
        command = add_command(commands, name, function, about)
        add_store_flag(command)
        several = "where the store has several" if name == "rounds" else "else all of the store"
        command.add_argument("--name", metavar="NAME", help=f"the federation, {several}")
        command.add_argument("--json", action="store_true", help="one JSON object a line")
    for name, about in (
        ("pause", "let the open round end and hold the next one back"),
        ("resume", "let rounds run again"),
        ("stop", "end the open round and the federation; devices are told"),
        ("rollback", "make an earlier base version the current one"),
    ):
        command = add_command(commands, name, _control, about)
        command.set_defaults(wish=name)
        add_store_flag(command)
        command.add_argument("--name", required=True, help="the federation")
        if name == "rollback":
            about = "the base version after so many rounds; 0 is the start"
            command.add_argument("--to", metavar="N", required=True, type=int, help=about)
    check = add_command(
        commands, "check", _check_store, "read a whole store and say whether it is sound"
    )
    add_store_flag(check)
    backup = add_command(
        commands, "backup", _backup, "copy a store that may be in use into a new file"
    )
    add_store_flag(backup)
    backup.add_argument("--out", metavar="FILE", required=True, type=Path, help="the new file")
    save_command.add_command(commands)
    trust_cli.add_commands(commands)
    return parser


def _add_configured(commands: Any) -> None:
    """The commands that read `federation.toml`."""
    usage = "%(prog)s [-h] [--config FILE] [SETTINGS]"
    for name, function, about in (
        ("serve", _serve, "run the daemon until its rounds are done or SIGTERM comes"),
        ("check-config", _check, "read the configuration and say what is wrong with it"),
    ):
        command = add_command(commands, name, function, about)
        command.usage = usage  # argparse would list a hundred flags twice
        command.add_argument(
            "--config",
            metavar="FILE",
            type=Path,
            action="append",
            help="default federation.toml; once for each federation that shares this coordinator",
        )
        if function is _serve:
            command.usage = usage.replace("[SETTINGS]", "[--log-format {human,json}] [SETTINGS]")
            command.add_argument(
                "--log-format", choices=FORMATS, default="human", help="default human"
            )
        add_setting_flags(command)


def _configuration(options: argparse.Namespace) -> config.Configuration:
    flags = {k: v for k, v in vars(options).items() if k in config.leaves() and v is not None}
    return config.load(_files(options), flags, os.environ)


def _files(options: argparse.Namespace) -> list[Path]:
    return options.config or [Path("federation.toml")]


def _serve(options: argparse.Namespace) -> int:
    set_up_log(options.log_format)
    try:
        asyncio.run(serve(_configuration(options)))
    except CoordinatorError as error:
        if options.log_format != "json":
            raise
        log.critical("%s", error)  # each of its lines is an object, the last as well
        return error.exit_code
    return 0


def _check(options: argparse.Namespace) -> int:
    configuration = _configuration(options)
    server_tls(configuration.server)
    for path, federation in zip(_files(options), configuration.federations, strict=True):
        start, settings = federation.start, federation.settings
        changes = _changes(configuration.server.store, settings)
        print(
            f"{path}: good; federation {settings.name!r}, "
            f"common adapter of {len(start.specs)} tensors, {len(start.buffer)} bytes"
        )
        for line in changes:
            print(f"{path}: since it last ran {line}")
    return 0


def _changes(url: str, settings: FederationSettings) -> list[str]:
    try:
        store = SqlStore(url, create=False)
    except StoreError:  # there is none yet, or one that `serve` brings up to date
        return []
    with contextlib.closing(store), store.database.begin() as db:
        if settings.name not in views.federation_names(db):
            return []
        return settings_change(views.settings_of(db, settings.name), settings)


def _store(options: argparse.Namespace) -> contextlib.closing[SqlStore]:
    # Looking must not make a store where none is.
    return contextlib.closing(SqlStore(options.store, create=False))


def _rounds(options: argparse.Namespace) -> int:
    with _store(options) as store:
        outcomes = store.history(named(store, options.name))
    for outcome in outcomes:
        print(json.dumps(_as_dict(outcome)) if options.json else _as_line(outcome))
    return 0


_WISHES = {"pause": Wish.PAUSE, "resume": Wish.RUN, "stop": Wish.STOP}


def _control(options: argparse.Namespace) -> int:
    """Write the wish down: a daemon on this store sees it within a second, another at its start."""
    with _store(options) as store:
        name = named(store, options.name)
        if options.wish == "rollback":
            kept_base(store, name, options.to, "--to")
            store.set_roll_back(name, options.to)
        else:
            store.set_wish(name, _WISHES[options.wish])
    print(f"{name}: {options.wish} is written down")
    return 0


def _check_store(options: argparse.Namespace) -> int:
    with _store(options) as store:
        names = upkeep.check(store)
    print(
        f"{options.store}: sound, schema revision {REVISIONS[-1]}; "
        f"federations: {', '.join(names) or 'none'}"
    )
    return 0


def _backup(options: argparse.Namespace) -> int:
    with contextlib.closing(Database(options.store, create=False)) as database:
        upkeep.backup(database, options.out)
    print(f"wrote {options.out}")
    return 0


def _as_dict(outcome: RoundOutcome) -> dict[str, object]:
    return {
        "round": outcome.number,
        "attempt": outcome.attempt,
        "outcome": outcome.outcome.value,
        "reports": outcome.reports,
        "opened_at": outcome.opened_at,
        "closed_at": outcome.closed_at,
        "base_version": outcome.base_version.hex(),
        "new_version": outcome.new_version.hex() if outcome.new_version else None,
    }


def _as_line(outcome: RoundOutcome) -> str:
    took_s = outcome.closed_at - outcome.opened_at
    return (
        f"round {outcome.number:>4}  attempt {outcome.attempt}  {outcome.outcome.value:<10}  "
        f"{outcome.reports} reports  {took_s:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
