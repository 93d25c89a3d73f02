"""The flags that commands share: one for each key of `federation.toml`, and `--store`."""

from __future__ import annotations

import argparse
from dataclasses import MISSING
from typing import Any

from coordinator import config
from protocol.scalars import Flag, Integer, Kind, Real
from protocol.schema import Choice

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
    for one in config.all_keys():
        default = "" if one.default is MISSING else _shown(one.kind.encode(one.default, one.key))
        if one.owner:
            whose.setdefault(one.key, {}).setdefault(default, []).append(one.owner)
            owners = whose[one.key].items()
            default = ", ".join(f"{each} ({', '.join(who)})" for each, who in owners)
        values = "{" + ",".join(one.names) + "}" if one.names else ""
        found[one.key] = values, f"default {default}" if default else _WITHOUT.get(one.key, _MUST)
    return found


def _shown(plain: Any) -> str:
    if isinstance(plain, bool):
        return str(plain).lower()
    return "none" if plain in ("", []) else str(plain)
