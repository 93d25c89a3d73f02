"""A federation's first base version, as the file that `pf2lora-client prepare` made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import SafetensorError, safe_open

from coordinator.errors import ConfigurationError
from protocol.schema import record_of
from protocol.tensors import NamedTensors, Payload

START_FORMAT: Final = "pf2lora-start-1"


def read_start(start: Path, config: Path) -> tuple[str, dict[str, object], NamedTensors]:
    """The backbone's fingerprint, the settings it was made for, the first common adapter.

    Raises:
        ConfigurationError: there is no such file, or it is damaged; `config` is what it is made of.
    """
    if not start.is_file():
        raise ConfigurationError(
            "server.start", f"{start} is no file; make it with: pf2lora-client prepare {config}"
        )
    try:
        with safe_open(start, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != START_FORMAT:
                raise ConfigurationError("server.start", f"{start} is no {START_FORMAT} file")
            # safetensors orders tensors by itself; the federation's order is in the metadata.
            names = json.loads(metadata["names"])
            if sorted(names) != sorted(file.keys()):
                raise ValueError("its names are not those of its tensors")
            arrays = {name: file.get_tensor(name) for name in names}
            # Start files made by hand need not say more than their backbone.
            made_for = dict(json.loads(metadata.get("settings", "{}")))
        return metadata["fingerprint"], made_for, _as_tensors(arrays)
    except KeyError as error:
        raise ConfigurationError("server.start", f"{start} lacks {error} in its header") from error
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise ConfigurationError("server.start", f"{start} is damaged: {error}") from error


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
