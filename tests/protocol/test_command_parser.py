"""What `--help` says of each command, of either side."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

import coordinator.cli
import edge_client.cli
import edge_client.fleet.cli

MAINS = (coordinator.cli.main, edge_client.cli.main, edge_client.fleet.cli.main)


def _help(main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], *at: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*at, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def _all(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], *at: str
) -> dict[str, str]:
    """The help of a command, and of those below it."""
    text = _help(main, capsys, *at)
    found = {" ".join(at): text}
    for name in re.findall(r"(?m)^    ([a-z][a-z-]*)(?:  +\S|$)", text):
        found |= _all(main, capsys, *at, name)
    return found


@pytest.mark.parametrize(("main", "commands"), list(zip(MAINS, (21, 11, 1), strict=True)))
def test_each_command_says_what_it_does_what_each_flag_is_and_what_exit_codes_mean(
    main: Callable[[list[str]], int], commands: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _all(main, capsys)
    assert len(found) == commands
    for command, text in found.items():
        paragraphs = text.split("\n\n")
        assert re.fullmatch(r"[A-Z].*\.", paragraphs[1], re.DOTALL), command
        assert re.search(r"(?m)^exit codes: 0 ", paragraphs[-1]), command
        # A flag's text begins after two spaces, or on a line of its own below it.
        for flag in re.findall(r"(?m)^  (-\S.*\n(?: {8}.*\n)*)", text):
            assert re.search(r"\S(?: {2,}|\n +)\S", flag), f"{command}: {flag}"


def test_the_flag_of_a_setting_says_what_it_takes_and_its_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = " ".join(_help(coordinator.cli.main, capsys, "serve").split())
    for told in (
        "--name TEXT must be given",
        "--backbone-fingerprint TEXT default the start file's",
        "--rounds-deadline-s NUMBER default 600.0",
        "--rounds-mode {synchronous,asynchronous} default synchronous",
        "--server-insecure {true,false} default false",
        "--server-port N, --port N default 8765",
        "--server-certificate TEXT default none",
        "--aggregation-name {mean,norm-bound,median,trimmed-mean,multi-krum} default mean",
        "--aggregation-norm-max NUMBER default 1.0 (norm-bound)",
        "--server-step-learning-rate NUMBER default 1.0 (fedavgm), 0.01 (fedadam, fedyogi)",
    ):
        assert told in text
