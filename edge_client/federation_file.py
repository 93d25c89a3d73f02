"""A federation.toml, as who prepares a federation or compiles its backbone reads it.

The coordinator has its own reader, with flags and variables.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from edge_client.errors import ConfigurationError
from protocol.federation import FederationSettings
from protocol.fingerprints import difference
from protocol.methods import PFedLoRA
from protocol.scalars import SchemaError
from protocol.schema import record_of
from quantization.fingerprint import check_shared, fingerprint, resolve_backbone


def read_federation(path: Path) -> tuple[dict[str, Any], Path]:
    """The settings in a federation.toml, unchecked, and where its start file is.

    Raises:
        ConfigurationError: no such file, not TOML, or it names no backbone and its method asks for
            one.
        BackboneError: it names a folder by a relative path.
    """
    try:
        table = tomllib.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:  # TOML's own, of bytes that are no text, ...
        raise ConfigurationError("config", f"{path}: {error}", "a federation.toml") from error
    except RecursionError:
        raise ConfigurationError("config", f"{path} is nested too deeply") from None
    server = table.pop("server", {})
    table.pop("admin", None)  # the coordinator's alone
    start = path.parent / str(server.get("start", "start.safetensors"))
    if has_own_backbones(table):
        if "backbone" in table:
            problem = "is here, and each device of pfedlora has its own"
            raise ConfigurationError("backbone", problem, "none; devices say --backbone")
        return table, start
    if not isinstance(table.get("backbone"), dict) or "name" not in table["backbone"]:
        raise ConfigurationError("backbone.name", "is missing", "a folder or a name")
    check_shared(str(table["backbone"]["name"]))
    return table, start


def has_own_backbones(table: dict[str, Any]) -> bool:
    """Whether a federation.toml is of the method whose devices have each their own backbone."""
    algorithm = table.get("algorithm")
    return isinstance(algorithm, dict) and algorithm.get("name") == PFedLoRA.NAME


def checked_settings(table: dict[str, Any], backbone: str) -> FederationSettings:
    """A federation.toml's settings, with the fingerprint of `backbone`, which it may lack.

    Raises:
        ConfigurationError: a setting is wrong, or the fingerprint another.
        BackboneError: there is no such backbone.
    """
    digest = fingerprint(resolve_backbone(backbone))
    table["backbone"].setdefault("fingerprint", digest)
    settings = settings_in(table)
    found = settings.fingerprint
    if found != digest:
        problem = f"is {found}, and of {backbone} {difference(found, digest)}"
        raise ConfigurationError("backbone.fingerprint", problem, f"{digest}, or none")
    return settings


def settings_in(table: dict[str, Any]) -> FederationSettings:
    """A federation.toml's settings, as they stand there.

    Raises:
        ConfigurationError: a setting is wrong.
    """
    try:
        settings: FederationSettings = record_of(FederationSettings).from_mapping(table, "")
    except SchemaError as error:
        raise ConfigurationError(error.path, error.problem) from None
    return settings
