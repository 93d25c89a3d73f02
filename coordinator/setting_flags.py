"""The flags that commands share: one for each key of `federation.toml`, and `--store`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from coordinator import config
from coordinator.admin.settings import AdminSettings
from protocol.federation import FederationSettings
from protocol.scalars import Flag, Integer, Kind, Real
from protocol.schema import Choice, Maybe, Record, Tagged, record_of

_MUST = "must be given"
_WITHOUT = {"backbone.fingerprint": "default the start file's"}
_SHORT = ("server.host", "server.port", "server.store")


def add_setting_flags(command: argparse.ArgumentParser) -> None:
    """Add them all; what was given is kept as text, by the dotted key."""
    about = (
        "each key of federation.toml, as docs/settings.md has it; "
        "flags win over PF2LORA_... variables over the file"
    )
    group = command.add_argument_group("settings", about)
    defaults = _defaults()
    for key, kind in config.leaves().items():
        names = [config.flag_of(key)]
        if key in _SHORT:
            names.append("--" + key.removeprefix("server."))
        values, default = defaults[key]
        group.add_argument(*names, dest=key, metavar=values or _shape(kind), help=default)
    group.add_argument(
        "--insecure",
        dest="server.insecure",
        action="store_const",
        const="true",
        help="the same as --server-insecure true: listen without TLS where other machines connect",
    )


def add_store_flag(command: argparse.ArgumentParser) -> None:
    """Add the flag of a command that looks into a store."""
    about = "the coordinator's store: sqlite:/// and the path of its file"
    command.add_argument("--store", metavar="URL", required=True, help=about)


def _shape(kind: Kind) -> str:
    """What a flag takes, in a word."""
    match kind:
        case Choice(enum):
            return "{" + ",".join(str(member.value) for member in enum) + "}"
        case Flag():
            return "{true,false}"
        case Integer():
            return "N"
        case Real():
            return "NUMBER"
    return "TEXT"


def _defaults() -> dict[str, tuple[str, str]]:
    """Of each key its values, where they are names of methods or rules, and what help says."""
    found: dict[str, tuple[str, str]] = {}
    whose: dict[str, dict[str, list[str]]] = {}
    for key, values, owner, default in _all_keys():
        if owner:
            whose.setdefault(key, {}).setdefault(default, []).append(owner)
            default = ", ".join(f"{one} ({', '.join(who)})" for one, who in whose[key].items())
        found[key] = values, f"default {default}" if default else _WITHOUT.get(key, _MUST)
    return found


def _all_keys() -> Iterator[tuple[str, str, str, str]]:
    for section, cls in (
        ("", FederationSettings),
        ("server", config.ServerSettings),
        ("admin", AdminSettings),
    ):
        yield from _keys(section, record_of(cls), "")


def _keys(prefix: str, record: Record, owner: str) -> Iterator[tuple[str, str, str, str]]:
    """(key, the names it may have, the method or rule whose it is, its default if it has one)."""
    kinds = dict(record.kinds)
    for field in fields(record.cls):
        key = f"{prefix}.{field.name}" if prefix else field.name
        kind = kinds[field.name]
        if isinstance(kind, Maybe):
            kind = kind.kind
        if isinstance(kind, Record):
            yield from _keys(key, kind, owner)
        elif isinstance(kind, Tagged):
            assert field.default_factory is not MISSING  # noqa: S101 - each has one
            names = ",".join(name for name, _ in kind.records)
            yield f"{key}.name", "{" + names + "}", "", field.default_factory().NAME
            for name, option in kind.records:
                yield from _keys(key, option, name)
        else:
            given = field.default is MISSING
            yield key, "", owner, "" if given else _shown(kind.encode(field.default, key))


def _shown(plain: Any) -> str:
    if isinstance(plain, bool):
        return str(plain).lower()
    return "none" if plain in ("", []) else str(plain)
