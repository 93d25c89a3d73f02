"""A small `federation.toml` with its start, made without torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

FINGERPRINT = "sha256:" + "1" * 64
TOML = """
name = "demo"
[backbone]
name = "tiny"
[task]
kind = "sequence-classification"
labels = ["no", "yes"]
[rounds]
cohort = 3
"""


def write_federation(folder: Path) -> Path:
    """The file's path; its start lies beside it."""
    arrays = {"z.A": np.ones((1, 2), np.float32), "a.A": np.zeros((2,), np.float32)}
    metadata = {
        "format": "pf2lora-start-2",
        "fingerprint": FINGERPRINT,
        "names": json.dumps(["z.A", "a.A"]),
    }
    save_file(arrays, folder / "start.safetensors", metadata)
    path = folder / "federation.toml"
    path.write_text(TOML)
    return path
