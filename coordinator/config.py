"""The coordinator's configuration: flags over environment over `federation.toml`.

The file's sections are the dataclasses of protocol/federation.py and `[server]` below. A key
`rounds.cohort` has the flag `--rounds-cohort` and the variable `PF2LORA_ROUNDS_COHORT`; lists are
given there with commas. The first base version is a file that `pf2lora-client prepare` made.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Final

import sqlalchemy as sa

from coordinator.admin.settings import TOKEN_VARIABLE, AdminSettings, port_after, read_token
from coordinator.aggregation.base import UPDATE_ELEMENT_MAX
from coordinator.enrolment import NEWCOMERS_MAX
from coordinator.errors import ConfigurationError
from coordinator.screening import QUARANTINE_AFTER, UPDATE_RMS_MAX, Bounds
from coordinator.security import Enrolment, check_exposure
from coordinator.setting_keys import SettingKey, setting_keys
from coordinator.start_file import read_start
from coordinator.store.database import SQLITE, address_of
from coordinator.waiting import HOLD_S
from protocol import limits
from protocol.federation import FederationSettings, start_settings
from protocol.fingerprints import difference
from protocol.link import is_loopback
from protocol.scalars import Integer, Kind, Real, SchemaError, Text
from protocol.schema import Record, from_text, record_of, unknown_name
from protocol.tensors import NamedTensors

ENVIRONMENT: Final = "PF2LORA_"
CLIENT_ENVIRONMENT: Final = "PF2LORA_CLIENT_"  # a device's, on the same machine


@dataclass(frozen=True, slots=True)
class RateSettings:
    """`[server.rates]`: how often a second, on average; 0 is no limit.

    An address may stand for a whole fleet behind one router: these let 20,000 devices of one come
    at once, and 200 a second for good. Messages over the rate are not refused but read later.
    """

    connections_per_address: Annotated[float, Real(0.0, 1e6)] = 200.0
    connections_per_device: Annotated[float, Real(0.0, 1e6)] = 1.0
    messages_per_address: Annotated[float, Real(0.0, 1e9)] = 20_000.0
    messages_per_device: Annotated[float, Real(0.0, 1e9)] = 200.0


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """`[server]`: where to listen, what to keep where, and how much of everything.

    `hold_s` is how long a waiting device is held before it is told to come back later: to hold it
    costs a ping now and then, its coming back a connection with all its proofs;
    `uploads_mib` and `downloads_mib` bound the memory of all transfers under way together.
    `certificate` and `key` are PEM files for TLS; with `client_ca` devices must have certificates
    of that authority too. Without TLS only loopback is listened on, unless `insecure` allows it.
    `enrolment` says whether a device's key must be enrolled: coordinator/security.py. Where it need
    not, `newcomers_max` keys are kept of devices that were never asked in a round.
    The last three bound what a report may be; after so many rejected ones (0: never) a device is
    quarantined: coordinator/screening.py.
    """

    host: Annotated[str, Text(255, 1)] = "127.0.0.1"
    port: Annotated[int, Integer(0, 65535)] = 8765
    store: Annotated[str, Text(limits.TEXT_BYTES_MAX, 1)] = "sqlite:///pf2lora.sqlite"
    start: Annotated[str, Text(limits.TEXT_BYTES_MAX, 1)] = "start.safetensors"
    hold_s: Annotated[float, Real(0.1, 60.0)] = HOLD_S
    exit_when_finished: bool = False
    connections_max: Annotated[int, Integer(1, 1_000_000)] = 10_000
    uploads_mib: Annotated[int, Integer(1, 1 << 20)] = 48
    downloads_mib: Annotated[int, Integer(1, 1 << 20)] = 24
    rates: RateSettings = field(default_factory=RateSettings)
    certificate: Annotated[str, Text(limits.TEXT_BYTES_MAX)] = ""
    key: Annotated[str, Text(limits.TEXT_BYTES_MAX)] = ""
    client_ca: Annotated[str, Text(limits.TEXT_BYTES_MAX)] = ""
    insecure: bool = False
    enrolment: Enrolment = Enrolment.AUTO
    newcomers_max: Annotated[int, Integer(1, 1_000_000)] = NEWCOMERS_MAX
    update_rms_max: Annotated[float, Real(1e-6, UPDATE_ELEMENT_MAX)] = UPDATE_RMS_MAX
    examples_max: Annotated[int, Integer(1, limits.EXAMPLES_MAX)] = limits.EXAMPLES_MAX
    quarantine_after: Annotated[int, Integer(0, limits.ROUNDS_MAX)] = QUARANTINE_AFTER

    @property
    def bounds(self) -> Bounds:
        """What a device's report may be."""
        return Bounds(self.update_rms_max, self.examples_max, self.quarantine_after)


@dataclass(frozen=True, slots=True)
class Federation:
    """One federation to run, and its first base version."""

    settings: FederationSettings
    start: NamedTensors


@dataclass(frozen=True, slots=True)
class Configuration:
    """All that a coordinator runs from; `admin_token` is what readers of the admin port need."""

    server: ServerSettings
    federations: tuple[Federation, ...]
    admin: AdminSettings = AdminSettings()  # noqa: RUF009 - it is frozen
    admin_token: str = ""

    @property
    def admin_certificate(self) -> tuple[str, str]:
        """What the admin port speaks TLS with, off loopback: the server's certificate and key."""
        if is_loopback(self.admin.host):
            return "", ""
        return self.server.certificate, self.server.key


def all_keys() -> Iterator[SettingKey]:
    """Every single setting; a key that several methods or rules have comes once for each."""
    for section, cls in (
        ("", FederationSettings),
        ("server", ServerSettings),
        ("admin", AdminSettings),
    ):
        yield from setting_keys(section, record_of(cls))


def leaves() -> dict[str, Kind]:
    """Every single setting by its dotted key."""
    return {one.key: one.kind for one in all_keys()}


def flag_of(key: str) -> str:
    """The long flag of a dotted key."""
    return "--" + key.replace(".", "-").replace("_", "-")


def load(
    paths: Path | Sequence[Path], flags: Mapping[str, str], environ: Mapping[str, str]
) -> Configuration:
    """The configuration of one file or several, overridden by the environment, then by flags.

    Args:
        paths: `federation.toml`, or one such file for each federation; paths inside a file are
            relative to its folder. Of several files one has the `[server]` that all share.
        flags: dotted keys and their text.
        environ: the process's environment.

    Raises:
        ConfigurationError: naming the key, flag or variable, what is wrong and what would be right.
    """
    files = [paths] if isinstance(paths, Path) else list(paths)
    tables = [_read_toml(path) for path in files]
    for key, name, text in _overrides(flags, environ):
        if len(files) > 1:
            _check_is_shared(key, name, len(files))
            for table in tables:
                _drop(table, key)
        _put(tables[0], key, _parsed(key, text, name), name)
    for table in tables:
        _check_places(table)
    server, starts = _take_server(files, tables)
    admin = _take_admin(files, tables, server)
    federations = tuple(map(_federation, files, tables, starts))
    _check_names(files, federations)
    admin_token = read_token(admin, environ.get(TOKEN_VARIABLE, ""))
    _check_token_is_safe(admin, server)
    return Configuration(server, federations, admin, admin_token)


def _check_places(table: Mapping[str, Any], section: str = "") -> None:
    """Refuse a name that is known, but not here; of sections, also one that is not known at all."""
    sections = {key.rpartition(".")[0] for key in leaves()} - {""}
    known = sections.union(leaves())
    for name, value in table.items():
        key = f"{section}.{name}" if section else name
        if key in sections and isinstance(value, dict):
            _check_places(value, key)
        elif key not in known:
            elsewhere = sorted(one for one in known if one.rpartition(".")[2] == name)
            if elsewhere:
                there = " or ".join(map(repr, elsewhere))
                raise ConfigurationError(key, f"is unknown; did you mean {there}?")
            if not section:
                raise ConfigurationError(key, unknown_name(key, known))


def _check_is_shared(key: str, name: str, count: int) -> None:
    if not key.startswith(("server.", "admin.")) or key == "server.start":
        raise ConfigurationError(
            name, f"could be for any of {count} federations; set {key} in the file of the one"
        )


def _take_server(
    files: Sequence[Path], tables: Sequence[dict[str, Any]]
) -> tuple[ServerSettings, list[Path]]:
    """Take `[server]` out of the tables: what all share, and the start file of each."""
    starts = []
    for path, table in zip(files, tables, strict=True):
        own = _from_table(record_of(ServerSettings), table.get("server", {}), "server")
        starts.append(path.parent / own.start)
        table.get("server", {}).pop("start", None)
    server, said_in = _take_shared("server", record_of(ServerSettings), files, tables)
    beside = said_in.get("store", files[0])
    found = {
        name: str(said_in[name].parent / getattr(server, name))
        for name in ("certificate", "key", "client_ca")
        if getattr(server, name)
    }
    server = replace(server, store=_beside(beside, server.store), start=str(starts[0]), **found)
    _check_host("server.host", server.host)
    check_exposure(server)
    return server, starts


def _take_admin(
    files: Sequence[Path], tables: Sequence[dict[str, Any]], server: ServerSettings
) -> AdminSettings:
    """Take `[admin]` out of the tables; its port and token file as they are to be used."""
    admin: AdminSettings
    admin, said_in = _take_shared("admin", record_of(AdminSettings), files, tables)
    _check_host("admin.host", admin.host)
    beside = said_in.get("token_file", files[0])
    return replace(
        admin,
        port=admin.port or port_after(server.port),
        token_file=str(beside.parent / admin.token_file) if admin.token_file else "",
    )


def _check_host(key: str, host: str) -> None:
    if host.startswith("["):
        raise ConfigurationError(key, f"is {host!r}; only a URL has an address in brackets")


def _check_token_is_safe(admin: AdminSettings, server: ServerSettings) -> None:
    if not admin.enabled or is_loopback(admin.host) or server.certificate or server.insecure:
        return
    raise ConfigurationError(
        "admin.host",
        f"{admin.host} can be reached from other machines, and without server.certificate the "
        "token would travel in the clear: give one, listen on 127.0.0.1, or say --insecure",
    )


def _take_shared(
    section: str, record: Record, files: Sequence[Path], tables: Sequence[dict[str, Any]]
) -> tuple[Any, dict[str, Path]]:
    """Take a section that all files share out of them, and say in which file each key is."""
    shared: dict[str, Any] = {}
    said_in: dict[str, Path] = {}
    for path, table in zip(files, tables, strict=True):
        own = table.pop(section, {})
        _from_table(record, own, section)
        for key, value in own.items():
            if shared.setdefault(key, value) != value:
                raise ConfigurationError(
                    f"{section}.{key}",
                    f"is {shared[key]!r} in {said_in[key]} and {value!r} in {path}; all share one "
                    f"[{section}], which is best in one file",
                )
            said_in.setdefault(key, path)
    return _from_table(record, shared, section), said_in


def _federation(path: Path, table: dict[str, Any], start_path: Path) -> Federation:
    fingerprint, made_for, start = read_start(start_path, path)
    backbone = table.get("backbone")
    if isinstance(backbone, dict):
        if not fingerprint:
            raise ConfigurationError(
                "backbone",
                f"{start_path} was made without one, for a method whose devices have each their "
                f"own: leave it out, or: pf2lora-client prepare {path}",
            )
        backbone.setdefault("fingerprint", fingerprint)
    settings: FederationSettings = _from_table(record_of(FederationSettings), table, "")
    found = settings.fingerprint
    if found and found != fingerprint:
        raise ConfigurationError(
            "backbone.fingerprint",
            f"is {found}, but {start_path} was made for {fingerprint}: "
            + difference(found, fingerprint),
        )
    for name, value in start_settings(settings).items():
        if made_for.get(name, value) != value:
            raise ConfigurationError(
                name,
                f"is {value!r}, but {start_path} was made for {made_for[name]!r}; what shapes the "
                f"common adapter belongs into {path}, then: pf2lora-client prepare {path}",
            )
    return Federation(settings, start)


def _check_names(files: Sequence[Path], federations: Sequence[Federation]) -> None:
    found: dict[str, Path] = {}
    for path, federation in zip(files, federations, strict=True):
        name = federation.settings.name
        if name in found:
            raise ConfigurationError(
                "name", f"is {name!r} in {found[name]} and in {path}; each federation needs its own"
            )
        found[name] = path


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        problem = f"{path}: {error.strerror}; expected a federation.toml"
        raise ConfigurationError("--config", problem) from error
    except ValueError as error:  # TOML's own, of bytes that are no text, of endless numbers
        raise ConfigurationError("--config", f"{path} is not TOML: {error}") from error
    except RecursionError:
        raise ConfigurationError("--config", f"{path} is nested too deeply") from None


def _overrides(flags: Mapping[str, str], environ: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(key, what the user calls it, text), the stronger last."""
    variables = {ENVIRONMENT + key.replace(".", "_").upper(): key for key in leaves()}
    found = []
    for name, text in environ.items():
        ours = name.startswith(ENVIRONMENT) and not name.startswith(CLIENT_ENVIRONMENT)
        if ours and name != TOKEN_VARIABLE:
            if name not in variables:
                raise ConfigurationError(name, unknown_name(name, variables))
            found.append((variables[name], name, text))
    found += [(key, flag_of(key), text) for key, text in flags.items()]
    return found


def _parsed(key: str, text: str, name: str) -> Any:
    try:
        return from_text(leaves()[key], text, name)
    except SchemaError as error:
        raise ConfigurationError(error.path, error.problem) from None


def _put(table: dict[str, Any], key: str, value: Any, name: str) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigurationError(name, f"{section} is no section in the file")
    table[leaf] = value


def _drop(table: dict[str, Any], key: str) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        table = table.get(section, {})
        if not isinstance(table, dict):
            return
    table.pop(leaf, None)


def _from_table(record: Record, table: Mapping[str, Any], path: str) -> Any:
    try:
        return record.from_mapping(table, path)
    except SchemaError as error:
        raise ConfigurationError(error.path, error.problem) from None


def _beside(path: Path, store: str) -> str:
    """A relative SQLite path counts from the configuration's folder."""
    try:
        url = address_of(store)
    except sa.exc.ArgumentError:
        raise ConfigurationError(
            "server.store", "is no database URL, such as sqlite:///pf2lora.sqlite"
        ) from None
    if not store.startswith(SQLITE) or url.database in ("", ":memory:"):
        # Elsewhere nothing would keep a second coordinator off the same rounds.
        raise ConfigurationError(
            "server.store", f"is {str(url)!r}; use a SQLite file, such as sqlite:///pf2lora.sqlite"
        )
    try:
        return f"{SQLITE}{(path.parent / str(url.database)).resolve()}"
    except ValueError:
        raise ConfigurationError("server.store", f"is {str(url)!r}, which is no path") from None
