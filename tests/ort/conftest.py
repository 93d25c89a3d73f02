"""These tests run where torch is not, on what tests/ort/reference.py made where it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = os.environ.get("PF2LORA_ON_DEVICE", "")
collect_ignore_glob = [] if FOLDER else ["test_*.py"]


@pytest.fixture(scope="session")
def artifacts() -> Path:
    return Path(FOLDER)
