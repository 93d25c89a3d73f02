"""The benchmarks' commands begin, with the flags that are written down; README names them all."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
README = (FOLDER / "README.md").read_text()
WRITTEN = README + (FOLDER / "RESULTS.md").read_text()
COMMANDS = sorted(set(re.findall(r"python -m (benchmarks\.\w+)([^`\n#]*)", WRITTEN)))


@pytest.mark.parametrize(("module", "flags"), COMMANDS)
def test_a_command_begins_and_knows_its_flags(module: str, flags: str) -> None:
    told = _help(module)
    for flag in re.findall(r"--[a-z-]+", flags):
        assert flag in told


@cache
def _help(module: str) -> str:
    """What a command says of itself, in a process of its own."""
    run = [sys.executable, "-m", module, "--help"]
    told = subprocess.run(run, cwd=FOLDER.parent, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    return told.stdout


def test_the_readme_names_every_file() -> None:
    named = set(re.findall(r"\b(\w+)\.py`", README)) | set(re.findall(r"\| `(\w+)` \|", README))
    assert named == {path.stem for path in FOLDER.glob("*.py")}
