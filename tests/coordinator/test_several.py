"""Several federations in one coordinator: one [server], and no doubt about what is meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator import cli, config
from coordinator.errors import ConfigurationError
from tests.coordinator.federation_file import write_federation


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Federations `a` and `b`, each in a folder of its own."""
    found = []
    for name in "ab":
        folder = tmp_path / name
        folder.mkdir()
        path = write_federation(folder)
        path.write_text(path.read_text().replace('name = "demo"', f'name = "{name}"', 1))
        found.append(path)
    return found


def _add(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def test_each_file_is_a_federation_and_one_has_the_server(files: list[Path]) -> None:
    _add(files[1], '[server]\nport = 9000\nstore = "sqlite:///all.sqlite"\n')
    loaded = config.load(files, {"server.port": "9001"}, {"PF2LORA_SERVER_HOLD_S": "3"})
    assert [federation.settings.name for federation in loaded.federations] == ["a", "b"]
    assert (loaded.server.port, loaded.server.hold_s) == (9001, 3.0)
    assert loaded.server.store == f"sqlite:///{files[1].parent.resolve()}/all.sqlite"


def test_without_a_server_section_the_store_lies_beside_the_first_file(files: list[Path]) -> None:
    loaded = config.load(files, {}, {})
    assert loaded.server.store == f"sqlite:///{files[0].parent.resolve()}/pf2lora.sqlite"


def test_starts_are_each_files_own_and_what_is_said_twice_alike_is_fine(files: list[Path]) -> None:
    for path in files:
        (path.parent / "start.safetensors").rename(path.parent / "other.safetensors")
        _add(path, '[server]\nport = 9000\nstart = "other.safetensors"\n')
    loaded = config.load(files, {}, {})
    assert loaded.server.port == 9000
    assert len(loaded.federations) == 2


def test_servers_that_differ_are_refused_with_both_files_named(files: list[Path]) -> None:
    for path, port in zip(files, (9000, 9001), strict=True):
        _add(path, f"[server]\nport = {port}\n")
    with pytest.raises(ConfigurationError) as refusal:
        config.load(files, {}, {})
    said = str(refusal.value)
    assert said.startswith(f"server.port: is 9000 in {files[0]} and 9001 in {files[1]}; all share")
    assert config.load(files, {"server.port": "9002"}, {}).server.port == 9002


def test_equal_names_are_refused_with_both_files_named(files: list[Path]) -> None:
    with pytest.raises(ConfigurationError, match=r"^name: is 'a' in .*/a/.* and in .*/a/"):
        config.load([files[0], files[0]], {}, {})


@pytest.mark.parametrize(
    ("flags", "environ", "said"),
    [
        ({"rounds.count": "3"}, {}, "--rounds-count: could be for any of 2 federations"),
        ({}, {"PF2LORA_ROUNDS_COUNT": "3"}, "PF2LORA_ROUNDS_COUNT: could be for any of 2"),
        ({"server.start": "x"}, {}, "--server-start: could be for any of 2 federations"),
    ],
)
def test_what_could_be_for_any_of_them_is_refused(
    files: list[Path], flags: dict[str, str], environ: dict[str, str], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        config.load(files, flags, environ)


def test_a_mistake_in_the_second_file_is_named(files: list[Path]) -> None:
    _add(files[1], "[server]\nprot = 1\n")
    with pytest.raises(ConfigurationError, match=r"server\.prot: is unknown; did you mean 'port'"):
        config.load(files, {}, {})


def test_the_commands_take_several_files(
    files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    both = [argument for path in files for argument in ("--config", str(path))]
    assert cli.main(["check-config", *both]) == 0
    said = capsys.readouterr().out
    assert "federation 'a'" in said
    assert "federation 'b'" in said
