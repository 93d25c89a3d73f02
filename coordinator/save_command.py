"""`pf2lora-coordinator save`: the common adapter as PEFT loads it.

It only reads the store, which may be in use meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safetensors.numpy import save

from coordinator.errors import ConfigurationError
from coordinator.setting_flags import add_store_flag
from coordinator.start_file import read_frozen
from coordinator.store import views
from coordinator.store.sql import SqlStore
from coordinator.watch_commands import named
from protocol.command_parser import add_command as declared
from protocol.federation import FederationSettings, TaskKind
from protocol.methods import FedSALoRA, FFALoRA, LocalOnly, PFedLoRA
from protocol.peft_layout import (
    CONFIGURATION_FILE,
    METADATA,
    TENSORS_FILE,
    PeftAdapter,
    peft_configuration,
    peft_tensors,
)
from protocol.tensors import Array, NamedTensors


def add_command(commands: Any) -> None:
    """Add it to the parser's."""
    command = declared(commands, "save", _save, "write the common adapter as a PEFT adapter")
    add_store_flag(command)
    command.add_argument("--name", help="the federation, where the store has several")
    command.add_argument("--out", metavar="FOLDER", required=True, type=Path, help="a new folder")
    command.add_argument(
        "--after", metavar="N", type=int, help="as it was after so many rounds; else as it is now"
    )
    command.add_argument(
        "--start", metavar="FILE", type=Path, help="ffa-lora's start file: it has the A's"
    )


def kept_base(store: SqlStore, name: str, number: int, flag: str) -> NamedTensors:
    """The base version that there was after so many rounds.

    Raises:
        ConfigurationError: it is not kept; names `flag`, and those that are.
        StoreError: it is damaged.
    """
    kept = [one.number for one in store.bases(name)]
    base = store.base_after(name, number) if number in kept else None
    if base is None:
        raise ConfigurationError(flag, f"{number} is not kept; there are: {kept}")
    return base


def common_adapter(
    settings: FederationSettings, base: NamedTensors, frozen: Mapping[str, Array]
) -> PeftAdapter:
    """A base version, with those factors that are never sent, as one LoRA.

    Raises:
        ConfigurationError: factors lack their partners.
    """
    arrays = {**base.arrays(), **frozen}
    downs, ups = (
        {name.removesuffix(end): one for name, one in arrays.items() if name.endswith(end)}
        for end in (".A", ".B")
    )
    ranks = {layer: down.shape[:1] for layer, down in downs.items()}
    if not downs or ranks != {layer: up.shape[-1:] for layer, up in ups.items()}:
        problem = f"the common adapter of {settings.name!r} is no LoRA: its factors are not pairs"
        raise ConfigurationError("--name", problem)
    heads = {name: one for name, one in arrays.items() if name[-2:] not in (".A", ".B")}
    return PeftAdapter(
        {layer: (down, ups[layer]) for layer, down in downs.items()},
        heads,
        tuple(dict.fromkeys(name.partition(".")[0] for name in heads)),
        settings.adapter.alpha / settings.adapter.rank,
        # Only the checkpoint knows; PEFT looks at the layers itself, and says so.
        fan_in_fan_out=False,
    )


def _save(options: argparse.Namespace) -> int:
    with contextlib.closing(SqlStore(options.store, create=False)) as store:
        name = named(store, options.name)
        with store.database.begin() as db:
            settings = views.settings_of(db, name)
        frozen = _frozen(settings, options.start)
        number = store.bases(name)[-1].number if options.after is None else options.after
        base = kept_base(store, name, number, "--after")
    adapter = common_adapter(settings, base, frozen)
    kind, backbone = settings.task.kind, settings.backbone
    assert backbone is not None  # noqa: S101 - `_frozen` refuses the method that has none
    facts = {
        "federation": name,
        "rounds": str(number),
        "version": base.digest().hex(),
        "backbone": backbone.name,
        "fingerprint": backbone.fingerprint,
        "labels": json.dumps(settings.task.labels),
    }
    _write(
        options.out,
        {
            TENSORS_FILE: save(peft_tensors(adapter, kind), METADATA | facts),
            CONFIGURATION_FILE: peft_configuration(adapter, backbone.name, kind).encode(),
        },
    )
    done = f"{number} of {settings.rounds.count} rounds"
    print(f"wrote {options.out}: the common adapter of {name} after {done}")
    print(f"version {facts['version']}")
    print(f"for {backbone.name}, {backbone.fingerprint}")
    print(_head_text(adapter, settings))
    return 0


_NO_WHOLE_LORA: Final[Mapping[type, str]] = {
    LocalOnly: "nothing is common",
    FedSALoRA: "only A is common",
    PFedLoRA: "what is common fits a backbone through its device's projections alone",
}


def _frozen(settings: FederationSettings, start: Path | None) -> dict[str, Array]:
    """The factors that are not in the store, where the method has any.

    Raises:
        ConfigurationError: the method has no whole LoRA in common, or the start file is missing.
    """
    method = settings.algorithm
    if type(method) in _NO_WHOLE_LORA:
        what = _NO_WHOLE_LORA[type(method)]
        raise ConfigurationError(
            "--name",
            f"{settings.name!r} is of {method.NAME}, where {what}: its devices have the "
            "adapters, and `pf2lora-client save` writes one's",
        )
    if not isinstance(method, FFALoRA):
        if start is not None:
            problem = f"is for {FFALoRA.NAME}; {settings.name!r} is of {method.NAME}"
            raise ConfigurationError("--start", problem)
        return {}
    if start is None:
        problem = f"is missing: devices of {method.NAME} never send A; the start file has it"
        raise ConfigurationError("--start", problem)
    return read_frozen(start, "--start", settings)


def _head_text(adapter: PeftAdapter, settings: FederationSettings) -> str:
    if adapter.heads:
        labels = (
            f" for the labels {', '.join(settings.task.labels)}" if settings.task.labels else ""
        )
        return f"with the head {', '.join(adapter.head_modules)}{labels}"
    if settings.task.kind is TaskKind.CAUSAL_LM:
        return "with no head: this task has none"
    return 'without a head: each device has its own (adapter.head is "personal")'


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a new folder; they are all there, and on the disk, or it is not.

    Raises:
        ConfigurationError: the folder has something in it, or cannot be written.
    """
    partial = folder.parent / f".{folder.name}.{secrets.token_hex(4)}"
    try:
        partial.mkdir(parents=True)
        for name, data in files.items():
            with (partial / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        partial.rename(folder)  # an empty folder gives way
    except OSError as error:
        problem = f"{folder} cannot be written: {error.strerror}"
        raise ConfigurationError("--out", problem) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
