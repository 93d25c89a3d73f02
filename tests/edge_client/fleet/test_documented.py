"""docs/loadtest.md says what the command does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edge_client.fleet import cli
from edge_client.fleet.figures import TIMES, Figures
from edge_client.fleet.meter import saturation
from edge_client.fleet.thresholds import NUMBERS, OWN_NUMBERS, SHARES

TEXT = (Path(__file__).parents[3] / "docs" / "loadtest.md").read_text()


def test_names_are_those_of_the_table() -> None:
    rows = re.findall(r"(?m)^\| (`[a-z0-9_`, ]+) \| ", TEXT)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    first = {name for name in TIMES if name.endswith("_p50")}
    assert named == first | {*SHARES, *NUMBERS, *OWN_NUMBERS}


def test_flags_are_those_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    flags = set(re.findall(r"(?m)^ +(--[a-z-]+)", capsys.readouterr().out)) - {"--help"}
    written = set(re.findall(r"--[a-z][a-z-]+", TEXT)) - {"--count"}
    assert written == flags


def test_exit_codes_are_those_of_the_table() -> None:
    table = re.findall(r"(?m)^\| (\d+) \| ", TEXT)
    assert table == re.findall(r"(\d+) [a-z]", cli.EXIT_CODES.replace("\n", " "))


def test_a_load_test_that_is_the_bottleneck_says_so() -> None:
    figures = Figures()
    for _ in range(100):
        figures.took("upload", 1.0)
        figures.took("lag", 0.05)
    assert saturation(0.5, figures) is None
    assert "at its limit, 95 % of a core" in (saturation(0.95, figures) or "")
    for _ in range(20):
        figures.took("lag", 0.2)
    assert "late by 0.20 s at p95" in (saturation(0.5, figures) or "")
