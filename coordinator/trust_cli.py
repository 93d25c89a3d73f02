"""`pf2lora-coordinator certs` and `devices`: certificates for trials, keys, tokens."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from coordinator.certificates import Authority
from coordinator.errors import ConfigurationError
from coordinator.setting_flags import add_store_flag
from coordinator.store.devices import DeviceRecord, DeviceStatus, TokenRecord, token_digest
from coordinator.store.sql import SqlStore
from protocol.command_parser import add_command

TOKENS_MAX: Final = 10_000
TOKEN_ID_DIGITS: Final = 16
_UNIT_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def add_commands(commands: Any) -> None:
    """Add both commands to the parser's."""
    certs = add_command(commands, "certs", _certs, "make a private CA and certificates for trials")
    certs.add_argument(
        "--out", metavar="FOLDER", required=True, type=Path, help="a CA in it is used again"
    )
    certs.add_argument("--host", nargs="+", default=[], help="the server's names and addresses")
    certs.add_argument(
        "--client", metavar="NAME", nargs="+", default=[], help="devices to make certificates for"
    )
    certs.add_argument(
        "--days", metavar="N", type=float, default=90.0, help="good for so long; default 90"
    )

    about = "say who may take part"
    devices = commands.add_parser("devices", help=about, description=f"{about.capitalize()}.")
    actions = devices.add_subparsers(required=True, metavar="COMMAND")
    for name, function, about in (
        ("list", _list, "list every device that has come, and how it stands"),
        ("approve", _approve, "let devices take part; lifts a quarantine or revocation"),
        ("revoke", _revoke, "shut devices out, also in the middle of a session"),
        ("token", _token, "make tokens that enrol a device each, and show them this once"),
        ("list-tokens", _list_tokens, "list every token by its id, and what became of it"),
        ("revoke-token", _revoke_token, "let tokens that were not used enrol nobody"),
    ):
        action = add_command(actions, name, function, about)
        add_store_flag(action)
        action.add_argument("--json", action="store_true", help="one JSON object a line")
        if function in (_approve, _revoke):
            about = "its id, or the beginning of it"
            action.add_argument("device", metavar="DEVICE", nargs="+", help=about)
        if function is _revoke:
            action.add_argument("--reason", metavar="TEXT", default="", help="told to the device")
        if function is _token:
            about = "after so long: 90s, 30m, 1h, 7d; default 1h"
            action.add_argument("--expires", metavar="TIME", default="1h", help=about)
            about = f"how many, up to {TOKENS_MAX}; default 1"
            action.add_argument("--count", metavar="N", type=int, default=1, help=about)
        if function is _revoke_token:
            about = "it, its id, or the beginning of its id"
            action.add_argument("token", metavar="TOKEN", nargs="*", help=about)
            action.add_argument("--all", action="store_true", help="all that were not used")


def _certs(options: argparse.Namespace) -> int:
    if not options.host and not options.client:
        raise ConfigurationError("--host", "is missing: the names that devices connect to")
    if not 0 < options.days <= 3650:
        raise ConfigurationError("--days", f"expected over 0 to 3650, got {options.days:g}")
    for name in options.client:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise ConfigurationError("--client", f"{name!r} is no name for a file")
    authority = Authority(options.out)
    written = authority.issue_server(options.host, options.days) if options.host else []
    for name in options.client:
        written += authority.issue_client(name, options.days)
    for path in (authority.folder / "ca.pem", authority.folder / "ca.key", *written):
        print(path)
    return 0


@dataclass(frozen=True, slots=True)
class _Line:
    """A device as it is shown."""

    record: DeviceRecord

    def facts(self) -> dict[str, Any]:
        record = self.record
        return {
            "device": record.device,
            "status": record.status.value,
            "seen_at": record.seen_at,
            "rejected": record.rejected,
            "reason": record.reason,
            "key": record.key.hex(),
        }

    def text(self) -> str:
        record = self.record
        # Of its first word, or its token: /api/devices says when it was last heard of.
        since = _time_text(record.seen_at)
        rejected = f"  {record.rejected} rejected" if record.rejected else ""
        reason = f"  {record.reason}" if record.reason else ""
        return f"{record.device}  {record.status.value:<11}  since {since}{rejected}{reason}"


def _time_text(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _list(options: argparse.Namespace) -> int:
    with _store(options) as store:
        records = store.devices.all()
    for record in records:
        line = _Line(record)
        print(json.dumps(line.facts()) if options.json else line.text())
    return 0


def _approve(options: argparse.Namespace) -> int:
    return _set(options, DeviceStatus.APPROVED, "")


def _revoke(options: argparse.Namespace) -> int:
    return _set(options, DeviceStatus.REVOKED, options.reason)


def _set(options: argparse.Namespace, status: DeviceStatus, reason: str) -> int:
    """Write it down: a daemon on this store sees it within a second."""
    with _store(options) as store:
        known = [record.device for record in store.devices.all()]
        chosen = [_chosen("device", known, beginning) for beginning in options.device]
        for device in chosen:
            store.devices.set_status(device, status, reason)
    for device in chosen:
        facts = {"device": device, "status": status.value}
        print(json.dumps(facts) if options.json else f"{device}: {status.value}")
    return 0


def _chosen(what: str, known: list[str], beginning: str) -> str:
    if not beginning:  # as from a variable that was never set
        raise ConfigurationError(what, "is empty; give its id, or the beginning of it")
    found = [one for one in known if one.startswith(beginning)]
    if len(found) != 1:
        problem = f"{len(found)} {what}s begin with" if found else f"the store has no {what}"
        raise ConfigurationError(what, f"{problem} {beginning!r}")
    return found[0]


def _token(options: argparse.Namespace) -> int:
    expires_at = time.time() + _seconds(options.expires)
    if not 1 <= options.count <= TOKENS_MAX:
        raise ConfigurationError("--count", f"expected 1 to {TOKENS_MAX}, got {options.count}")
    with _store(options) as store:
        # Nothing that a shell or a parser of flags takes for something else, as a "-" in front.
        tokens = [secrets.token_hex(24) for _ in range(options.count)]
        store.devices.add_tokens(tokens, expires_at)
    for token in tokens:
        facts = {"token": token, "id": _id_of(token_digest(token)), "expires_at": expires_at}
        print(json.dumps(facts) if options.json else token)
    return 0


def _id_of(digest: str) -> str:
    """What a token is called: it tells nobody what the token is."""
    return digest[:TOKEN_ID_DIGITS]


def _list_tokens(options: argparse.Namespace) -> int:
    with _store(options) as store:
        records = store.devices.tokens()
    for record in records:
        status, more = "unused", f"until {_time_text(record.expires_at)}"
        if record.used_by is not None:
            status, more = "used", f"by {record.used_by}"
        elif record.expires_at <= time.time():
            status, more = "expired", f"since {_time_text(record.expires_at)}"
        facts = {
            "id": _id_of(record.digest),
            "status": status,
            "expires_at": record.expires_at,
            "device": record.used_by,
        }
        print(json.dumps(facts) if options.json else f"{facts['id']}  {status:<7}  {more}")
    return 0


def _revoke_token(options: argparse.Namespace) -> int:
    """Write it down: it is asked for whenever a device comes with a token."""
    if options.all == bool(options.token):
        raise ConfigurationError("token", "expected tokens or their ids, or else --all")
    with _store(options) as store:
        known = store.devices.tokens()
        if options.all:
            chosen = [token.digest for token in known if token.used_by is None]
        else:
            chosen = list(dict.fromkeys(_chosen_token(known, given) for given in options.token))
        if chosen:
            store.devices.revoke_tokens(chosen)
        left = {token.digest: token.used_by for token in store.devices.tokens()}
    for digest in chosen:
        if digest not in left:
            facts = {"id": _id_of(digest), "status": "revoked"}
            print(json.dumps(facts) if options.json else f"{facts['id']}: revoked")
    used = [f"{_id_of(digest)} by device {left[digest]}" for digest in chosen if digest in left]
    if used:
        problem = f"used already, so that it is the device to revoke: {', '.join(used)}"
        raise ConfigurationError("token", problem)
    return 0


def _chosen_token(known: Sequence[TokenRecord], given: str) -> str:
    digests = [token.digest for token in known]
    itself = token_digest(given)
    return itself if itself in digests else _chosen("token", digests, given)


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if not found or not int(found[1]):
        raise ConfigurationError("--expires", f"{text!r} is no span of time, such as 30m, 1h or 7d")
    return float(int(found[1]) * _UNIT_S[found[2]])


def _store(options: argparse.Namespace) -> contextlib.closing[SqlStore]:
    return contextlib.closing(SqlStore(options.store, create=False))
