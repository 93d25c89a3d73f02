"""Flags over environment over file, and errors that name the key."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator import cli, config
from coordinator.errors import ConfigurationError
from coordinator.store.sql import SqlStore
from edge_client.start_file import write_start
from protocol.federation import FederationSettings, Task, TaskKind, Weighting
from protocol.methods import HomLoRA, PF2LoRA, PFedLoRA
from tests.coordinator.federation_file import FINGERPRINT, TOML, write_federation


def _only(loaded: config.Configuration) -> config.Federation:
    (federation,) = loaded.federations
    return federation


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_federation(tmp_path)


def test_a_file_gives_settings_defaults_and_the_start_in_its_order(path: Path) -> None:
    loaded = config.load(path, {}, {})
    assert _only(loaded).settings.rounds.cohort == 3
    assert _only(loaded).settings.fingerprint == FINGERPRINT
    assert isinstance(_only(loaded).settings.algorithm, PF2LoRA)
    assert [spec.name for spec in _only(loaded).start.specs] == ["z.A", "a.A"]
    assert loaded.server.store == f"sqlite:///{path.parent.resolve()}/pf2lora.sqlite"


@pytest.mark.parametrize("folder", ["a?b=c", "a#b", "a%3Fb", "ä b"])
def test_a_store_lies_beside_its_file_whatever_the_folders_name(
    tmp_path: Path, folder: str
) -> None:
    (tmp_path / folder).mkdir()
    path = write_federation(tmp_path / folder)
    path.write_text(path.read_text() + "\n[server]\nstore = 'sqlite:///x?y.sqlite'")
    store = config.load(path, {}, {}).server.store
    assert store == f"sqlite:///{tmp_path.resolve()}/{folder}/x?y.sqlite"
    SqlStore(store).close()
    assert (tmp_path / folder / "x?y.sqlite").is_file()


def test_flags_win_over_environment_over_file(path: Path) -> None:
    environ = {
        "PF2LORA_ROUNDS_COHORT": "5",
        "PF2LORA_ROUNDS_COUNT": "7",
        "PF2LORA_SERVER_EXIT_WHEN_FINISHED": "true",
        "PF2LORA_ROUNDS_WEIGHTING": "uniform",
        "HOME": "/",
    }
    loaded = config.load(path, {"rounds.cohort": "6", "server.port": "0"}, environ)
    assert (_only(loaded).settings.rounds.cohort, _only(loaded).settings.rounds.count) == (6, 7)
    assert _only(loaded).settings.rounds.weighting is Weighting.UNIFORM
    assert loaded.server.exit_when_finished
    assert loaded.server.port == 0


def test_lists_and_algorithms_can_be_given_as_text(path: Path) -> None:
    flags = {"adapter.target_modules": "query,key", "algorithm.name": "homlora"}
    loaded = config.load(path, flags, {})
    assert _only(loaded).settings.adapter.target_modules == ("query", "key")
    assert _only(loaded).settings.algorithm == HomLoRA()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("\n[adapter]\nrnak = 8", r"adapter\.rnak: is unknown; did you mean 'rank'"),
        ("\n[adapter]\nrank = 0", r"adapter\.rank: expected 1 to 1024, got 0"),
        ("\n[adapter]\nrank = '8'", r"adapter\.rank: expected a whole number"),
        ("\n[algorithm]\nname = 'sgd'", r"algorithm\.name: expected one of 'pf2lora'"),
        ("\n[algorithm]\npenalty = 1", r"algorithm\.name: is missing"),
        ("\n[server]\nport = 70000", r"server\.port: expected 0 to 65535"),
        ("\n[sever]\nport = 7", r"sever: is unknown; did you mean 'server'"),
        ("\n[admin]\nprot = 7", r"admin\.prot: is unknown; did you mean 'port'"),
        ("\n[admn]\nport = 7", r"admn: is unknown; did you mean 'admin'"),
        ("seed = 3", r"rounds\.seed: is unknown; did you mean 'seed'\?"),
        ("\n[rates]\nmessages_per_device = 1", r"rates: is unknown; did you mean 'server\.rates'"),
        ("\n[training]\nrank = 4", r"training\.rank: .* mean 'adapter\.rank'\?"),
        ("\n[admin]\nstart = 'a'", r"admin\.start: is unknown; did you mean 'server\.start'"),
        ("\n[adapter]\npersonal_rank = 0", r"personal_rank: pf2lora needs"),
        (
            "\n[server]\nstore = 'postgresql://me:secret@db/x'",
            r"server\.store: .*use a SQLite file",
        ),
        ("\n[server]\nstore = 'sqlite://'", r"server\.store: is 'sqlite://'; use a SQLite file"),
        ("\n[server]\nstore = 'sqlite:///'", r"server\.store: is .*; use a SQLite file"),
        ("minimum_reports = 9", r"rounds\.minimum_reports: is over the cohort of 3"),
        ("\n[rounds", "is not TOML"),
        (
            f"\n[adapter]\nalpha = 1{'0' * 400}",
            r"adapter\.alpha: expected 1e-06 to 1e\+06, got inf",
        ),
        (f"\n[adapter]\nalpha = -1{'0' * 400}", r"adapter\.alpha: expected .*, got -inf"),
        (f"\n[adapter]\nalpha = 1{'0' * 5000}", "is not TOML"),
        (f"\nx = {'[' * 10000}", "is nested too deeply"),
        ("\n[server]\nstore = 'sqlite:///a\0b'", r"is not TOML"),
        ('\n[server]\nstore = "sqlite:///a\\u0000b"', r"server\.store: is .*, which is no path"),
    ],
)
def test_a_wrong_key_is_named_with_what_would_be_right(
    path: Path, change: str, problem: str
) -> None:
    path.write_text(TOML + change)
    with pytest.raises(ConfigurationError, match=problem):
        config.load(path, {}, {})


def test_wrong_flags_and_variables_are_named_as_the_user_wrote_them(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--rounds-count: expected a whole number, got"):
        config.load(path, {"rounds.count": "many"}, {})
    with pytest.raises(ConfigurationError, match=r"PF2LORA_ROUNDS_CUONT: is unknown.*ROUNDS_COUNT"):
        config.load(path, {}, {"PF2LORA_ROUNDS_CUONT": "3"})


def test_a_start_that_may_not_be_read_is_not_said_to_be_missing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:  # tests may run as root, who may read all
        raise PermissionError

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_text", lambda *_: TOML)
    with pytest.raises(ConfigurationError, match=r"server\.start: .* may not be read by this user"):
        config.load(path, {}, {})


def test_a_start_of_another_backbone_is_refused_with_both_named(path: Path) -> None:
    other = "sha256:" + "2" * 64
    path.write_text(TOML.replace('name = "tiny"', f'name = "tiny"\nfingerprint = "{other}"'))
    with pytest.raises(ConfigurationError, match=f"{other}.*{FINGERPRINT}"):
        config.load(path, {}, {})


def test_a_start_that_was_made_for_another_method_is_refused(path: Path) -> None:
    settings = _only(config.load(path, {}, {})).settings
    start = path.parent / "start.safetensors"
    write_start(start, load_file(start), settings)
    assert _only(config.load(path, {"rounds.cohort": "2"}, {})).start.specs
    with pytest.raises(
        ConfigurationError, match=r"algorithm\.name: is 'ffa-lora', .*made for 'pf2lora'.* prepare"
    ):
        config.load(path, {"algorithm.name": "ffa-lora"}, {})
    with pytest.raises(ConfigurationError, match=r"adapter\.rank: is 3, .* made for 8"):
        config.load(path, {"adapter.rank": "3"}, {})


def test_a_federation_without_a_backbone_has_a_start_without_one(path: Path) -> None:
    own = TOML.replace('[backbone]\nname = "tiny"\n', '[algorithm]\nname = "pfedlora"\n')
    for_one = path.with_name("one.toml")
    for_one.write_text(own + '\n[server]\nstart = "own.safetensors"')
    task = Task(TaskKind.SEQUENCE_CLASSIFICATION, ("no", "yes"))
    settings = FederationSettings("demo", None, task, algorithm=PFedLoRA())
    start = {"shared.0.A": np.ones((8, 64), np.float32)}
    write_start(path.parent / "own.safetensors", start, settings)
    loaded = _only(config.load(for_one, {}, {}))
    assert loaded.settings.backbone is None
    assert [spec.name for spec in loaded.start.specs] == ["shared.0.A"]
    with pytest.raises(ConfigurationError, match=r"shared_width: is 32, .* made for 64"):
        config.load(for_one, {"algorithm.shared_width": "32"}, {})
    with pytest.raises(ConfigurationError, match=r"backbone: .*made without one, .*leave it out"):
        config.load(path, {"server.start": "own.safetensors"}, {})
    # One that a backbone was there for is another method's.
    made = _only(config.load(path, {}, {})).settings
    write_start(path.parent / "own.safetensors", start, made)
    with pytest.raises(ConfigurationError, match=r"algorithm\.name: is 'pfedlora', .*'pf2lora'"):
        config.load(for_one, {}, {})


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--rounds-cohort", "4", "--task-max-length", "32"],
            "task.max_length: is 32, but the store holds the federation 'demo' with 64; put it",
        ),
        (
            ["--server-step-name", "fedavgm", "--server-step-momentum", "0.5"],
            "server_step.name: is 'fedavgm', but the store holds the federation 'demo' with 'aver",
        ),
        (
            ["--seed", "7", "--rounds-mode", "asynchronous", "--rounds-report-goal", "2"],
            "rounds.mode: is 'asynchronous', but the store holds the "
            "federation 'demo' with 'synchronous' (also changed: seed); put",
        ),
    ],
)
def test_a_setting_that_cannot_change_is_named(
    path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    federation = _only(config.load(path, {}, {}))
    with contextlib.closing(SqlStore(f"sqlite:///{path.parent}/pf2lora.sqlite")) as store:
        store.create(federation.settings, federation.start)
    for command in (["serve", "--port", "0"], ["check-config"]):
        assert cli.main([*command, "--config", str(path), *flags]) == 2
        assert said in capsys.readouterr().err


def test_what_will_change_is_told_before_the_coordinator_starts(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    federation = _only(config.load(path, {}, {}))
    with contextlib.closing(SqlStore(f"sqlite:///{path.parent}/pf2lora.sqlite")) as store:
        store.create(federation.settings, federation.start)
    command = ["check-config", "--config", str(path)]
    flags = ["--rounds-cohort", "4", "--training-learning-rate", "0.1"]
    assert cli.main([*command, *flags, "--aggregation-name", "median"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"{path}: since it last ran training.learning_rate was 0.001 and is 0.1",
        f"{path}: since it last ran rounds.cohort was 3 and is 4",
        f"{path}: since it last ran aggregation.name was 'mean' and is 'median'",
    ]
    tls = ["--server-certificate", "no.pem", "--server-key", "no.key"]
    assert cli.main([*command, *tls]) == 2
    assert "server.certificate: " in capsys.readouterr().err


def test_what_is_not_there_or_taken_is_named(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve = ["serve", "--config", str(path), "--port", "0", "--admin-enabled", "false"]
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        assert cli.main([*serve, "--port", str(port)]) == 4
    said = f"server.host, server.port: cannot listen on 127.0.0.1:{port}: Address already in use; "
    assert said + "use another port, or 0 for any" in capsys.readouterr().err
    tls = ["--server-certificate", str(path), "--server-key", "none.pem"]
    assert cli.main([*serve, *tls]) == 2
    assert "server.key: " in (said := capsys.readouterr().err)
    assert "none.pem: No such file" in said
    assert cli.main([*serve, "--store", f"sqlite:///{path}/x.sqlite"]) == 3
    assert f"{path} is no folder" in capsys.readouterr().err


def test_exit_codes_and_messages_of_the_commands(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check-config", "--config", str(path)]) == 0
    assert "2 tensors" in capsys.readouterr().out
    assert cli.main(["check-config", "--config", str(path), "--port", "x"]) == 2
    assert "--server-port" in capsys.readouterr().err
    assert cli.main(["serve", "--config", str(path.parent / "none.toml")]) == 2
    (path.parent / "bad.sqlite").write_bytes(b"rubbish" * 1000)
    assert cli.main(["serve", "--config", str(path), "--store", "sqlite:///bad.sqlite"]) == 3
    elsewhere = ["serve", "--config", str(path), "--host", "203.0.113.7"]
    assert cli.main(elsewhere) == 2
    assert cli.main([*elsewhere, "--insecure"]) == 4
    (path.parent / "start.safetensors").unlink()
    assert cli.main(["check-config", "--config", str(path)]) == 2
    assert "pf2lora-client prepare" in capsys.readouterr().err
