"""The kept corpus is run again every time, and coverage-led fuzzing goes on from it for a while.

An input that crashes a target is added to its corpus, under a name that says what it did. More is
found by: python tests/fuzz/run.py TARGET NEW_INPUTS tests/fuzz/corpus/TARGET
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from protocol import codec
from tests.fuzz.targets import TARGETS, script, steps
from tests.protocol.samples import SAMPLES

HERE = Path(__file__).parent
CORPUS = sorted((HERE / "corpus").glob("*/*"))
SHORT_S, LONG_S = 10, 200


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_kept_input_does_no_harm(path: Path) -> None:
    TARGETS[path.parent.name](path.read_bytes())


def test_every_target_has_a_corpus() -> None:
    assert {path.parent.name for path in CORPUS} == set(TARGETS)


def test_a_script_has_the_steps_that_it_was_made_of() -> None:
    said: list[int | bytes] = [0, b"raw", 3, b"", b"\x20"]
    assert steps(script(*said)) == said
    assert steps(script(0, *SAMPLES.values())) == [0, *map(codec.encode, SAMPLES.values())]


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris is not installed: it has wheels for Linux on x86-64 only",
)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "seconds",
    [SHORT_S, pytest.param(LONG_S, marks=[pytest.mark.soak, pytest.mark.timeout(LONG_S + 200)])],
)
def test_fuzzing_finds_nothing(tmp_path: Path, target: str, seconds: int) -> None:
    new = tmp_path / "new"
    new.mkdir()
    command = [sys.executable, str(HERE / "run.py"), target, str(new)]
    command += [str(HERE / "corpus" / target), f"-max_total_time={seconds}"]
    # A new process begins with the peak memory of the one that made it, which may be large: what
    # one input makes this one allot is bounded instead.
    command += ["-timeout=10", "-rss_limit_mb=0", "-malloc_limit_mb=256"]
    command += [f"-artifact_prefix={tmp_path}/crash-"]
    root = HERE.parent.parent
    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=root, env={"PYTHONPATH": str(root)}
    )
    found = {path.name: path.read_bytes().hex() for path in tmp_path.glob("crash-*")}
    assert ended.returncode == 0, f"{found}\n{ended.stderr[-3000:]}"
    assert "Done " in ended.stderr
    print(next(line for line in ended.stderr.splitlines() if "DONE" in line))
