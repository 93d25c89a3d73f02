"""A federation's first base version, as the file that `pf2lora-client prepare` made."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from coordinator.errors import ConfigurationError
from protocol.federation import START_FORMAT, FederationSettings, start_settings
from protocol.schema import record_of
from protocol.tensors import Array, NamedTensors, Payload


def read_start(start: Path, config: Path) -> tuple[str, dict[str, object], NamedTensors]:
    """The backbone's fingerprint, the settings it was made for, the first common adapter.

    The fingerprint is empty where each device has a backbone of its own.

    Raises:
        ConfigurationError: there is no such file, or it is damaged; `config` is what it is made of.
    """
    if not start.is_file():
        raise ConfigurationError(
            "server.start", f"{start} is no file; make it with: pf2lora-client prepare {config}"
        )
    with _opened(start, "server.start") as file:
        return file.metadata["fingerprint"], file.made_for, _as_tensors(file.arrays(file.names))


def read_frozen(start: Path, key: str, settings: FederationSettings) -> dict[str, Array]:
    """The factors that this federation's devices have as they were drawn, and never send.

    Raises:
        ConfigurationError: naming `key`; the file is none, damaged, or another federation's.
    """
    with _opened(start, key) as file:
        wanted = {
            **start_settings(settings),
            "seed": str(settings.seed),
            "backbone.fingerprint": settings.fingerprint,
        }
        made_for = {
            **file.made_for,
            "seed": file.metadata["seed"],
            "backbone.fingerprint": file.metadata["fingerprint"],
        }
        for name, value in wanted.items():
            if made_for.get(name) != value:
                raise ConfigurationError(
                    key, f"{start} was made for {name} {made_for.get(name)!r}, not {value!r}"
                )
        return _as_tensors(file.arrays(file.frozen)).arrays()


@dataclass(frozen=True, slots=True)
class _Start:
    """An open start file; `names` are the first common adapter's, in the federation's order."""

    tensors: Any
    metadata: dict[str, str]
    names: list[str]
    frozen: list[str]
    made_for: dict[str, object]

    def arrays(self, names: list[str]) -> dict[str, Any]:
        return {name: self.tensors.get_tensor(name) for name in names}


@contextlib.contextmanager
def _opened(start: Path, key: str) -> Iterator[_Start]:
    try:
        with start.open("rb"):  # of one that may not be read safetensors says that there is none
            pass
        with safe_open(start, "numpy") as tensors:
            metadata = tensors.metadata() or {}
            if metadata.get("format") != START_FORMAT:
                problem = f"{start} is no {START_FORMAT} file"
                raise ConfigurationError(key, f"{problem}; make it with: pf2lora-client prepare")
            # safetensors orders tensors by itself; the federation's order is in the metadata.
            names, frozen = json.loads(metadata["names"]), json.loads(metadata.get("frozen", "[]"))
            if sorted([*names, *frozen]) != sorted(tensors.keys()):
                raise ValueError("its names are not those of its tensors")
            # Start files made by hand need not say more than their backbone.
            made_for = dict(json.loads(metadata.get("settings", "{}")))
            yield _Start(tensors, metadata, names, frozen, made_for)
    except FileNotFoundError as error:
        raise ConfigurationError(key, f"{start} is no file") from error
    except PermissionError as error:
        raise ConfigurationError(key, f"{start} may not be read by this user") from error
    except KeyError as error:
        raise ConfigurationError(key, f"{start} lacks {error} in its header") from error
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise ConfigurationError(key, f"{start} is damaged: {error}") from error


def _as_tensors(arrays: dict[str, Any]) -> NamedTensors:
    """The arrays as they will travel; ValueError if they cannot."""
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise ValueError(f"{name} is {array.dtype}, not float32")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has numbers that are not finite")
    tensors = NamedTensors.from_arrays(arrays)
    record_of(Payload).encode(tensors.payload(), "tensors")
    return tensors
