"""The commands beside the figures of RESULTS.md begin, with the flags that are written there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = (ROOT / "benchmarks" / "RESULTS.md").read_text()
COMMANDS = sorted(set(re.findall(r"python -m (benchmarks\.\w+)([^`\n]*)", RESULTS)))


@pytest.mark.parametrize(("module", "flags"), COMMANDS)
def test_a_command_begins_and_knows_its_flags(module: str, flags: str) -> None:
    run = [sys.executable, "-m", module, "--help"]
    told = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    for flag in re.findall(r"--[a-z-]+", flags):
        assert flag in told.stdout
