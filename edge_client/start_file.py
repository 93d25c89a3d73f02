"""Writes a federation's start file: its first common adapter, and what that was made for.

The coordinator has the reader.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import save_file

from edge_client.errors import ConfigurationError
from protocol.federation import START_FORMAT, FederationSettings, start_settings


def write_start(
    path: Path,
    arrays: Mapping[str, Any],
    settings: FederationSettings,
    frozen: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write the first common adapter for the coordinator, with what it was made for.

    `frozen` are factors that no device trains or sends, and who takes the adapter out needs.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    metadata = {
        "format": START_FORMAT,
        "fingerprint": settings.fingerprint,
        "settings": json.dumps(start_settings(settings)),
        # safetensors orders tensors by itself; the federation's order is that of the model.
        "names": json.dumps(list(arrays)),
        "frozen": json.dumps(list(frozen)),
        # What the frozen ones were drawn from.
        "seed": str(settings.seed),
    }
    held = {name: array.copy() for name, array in {**arrays, **frozen}.items()}
    try:
        save_file(held, path, metadata)
    except (OSError, SafetensorError) as error:
        problem = f"{path} cannot be written: {error}"
        raise ConfigurationError("server.start", problem, "a path that can be") from error
