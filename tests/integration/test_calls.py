"""What apps call, and how they are told that a call is wrong."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_client import cli, client, own_rows
from edge_client.backends import loading
from edge_client.backends.base import Level
from edge_client.client import EdgeClient
from edge_client.data import FieldNames
from edge_client.errors import (
    AdapterError,
    BackboneError,
    ConfigurationError,
    DataError,
    EdgeClientError,
)
from edge_client.own_rows import DataSettings
from edge_client.private_store import PrivateStore
from edge_client.worker import DeviceWorker
from protocol.federation import Backbone, FederationSettings, Task, TaskKind
from quantization.fingerprint import resolve_backbone
from tests.integration.device import ROWS, SETTINGS, Device
from tests.integration.test_federation import (
    MINILM,
    _write_data,
)
from tests.quantization.tiny import write_gpt2


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ({"data": "none.jsonl"}, DataError, r"none\.jsonl: cannot be read: No such file"),
        ({"data": "d.parquet"}, DataError, r"d\.parquet: expected a \.jsonl"),
        ({"data": {"text": ["a"]}}, DataError, "data: expected a file, or rows"),
        ({"data": iter(ROWS)}, DataError, "data: expected rows that can be read again, got list_i"),
        ({"scheme": "nf5"}, ConfigurationError, "scheme: 'nf5' is none; use none, bf16, nf4"),
        ({"compute_dtype": "f8"}, ConfigurationError, "compute_dtype: 'f8' is none; use float32"),
        ({"held_out": 1.0}, ConfigurationError, "held_out: 1.0 is no share"),
        ({"held_out": "0.2"}, ConfigurationError, "held_out: '0.2' is no share"),
        ({"fields": {"text": "t"}}, ConfigurationError, "fields: .*FieldNames"),
        ({"seed": 1.5}, ConfigurationError, "seed: 1.5 is none; use a whole number"),
        ({"seed": "a"}, ConfigurationError, "seed: 'a' is none; use a whole number"),
        ({"federation": "my reviews"}, ConfigurationError, "federation: is none; use the name in"),
        ({"token": "s3cret\n"}, ConfigurationError, "token: is none; use what .* without"),
        ({"token": 5}, ConfigurationError, "token: is none"),
        ({"coordinator": "ws://here:1#top"}, ConfigurationError, "coordinator: .* is no address"),
        ({"coordinator": None}, ConfigurationError, "coordinator: None is no address; use ws://h"),
        ({"state_dir": ""}, ConfigurationError, "state_dir: is ''; use a folder's path"),
        ({"state_dir": None}, ConfigurationError, "state_dir: is None; use a folder's path"),
        (
            {"state_dir": "a\0b"},
            ConfigurationError,
            r"state_dir: is 'a\\x00b'; use a fold",
        ),
        ({"backbone": ""}, ConfigurationError, "backbone: is ''; use a folder, a name, or pack"),
        ({"device": None}, ConfigurationError, 'device: is None; use "cpu" or "cuda"'),
        ({"scheme": ""}, ConfigurationError, "scheme: '' is none; use none, bf16, nf4"),
        ({"tell_accuracy": "no"}, ConfigurationError, "tell_accuracy: is 'no'; use True or False"),
        ({"progress": 5}, ConfigurationError, "progress: 5 cannot be called; use a function"),
    ],
)
def test_what_is_wrong_in_a_call_is_said_before_anyone_is_asked(
    tmp_path: Path, arguments: dict[str, Any], error: type[Exception], reason: str
) -> None:
    given: dict[str, Any] = {
        "coordinator": "localhost:1",
        "data": ROWS,
        "state_dir": tmp_path / "s",
    }
    with pytest.raises(error, match=reason) as refused:
        EdgeClient(**given | arguments)
    assert not (tmp_path / "s").exists()
    assert "s3cret" not in str(refused.value)


class Table(list[str]):
    """As pandas has it: who goes through it is given the names of its columns."""

    columns = ("text", "label")


@pytest.mark.parametrize("ask", ["predict", "evaluate", "generate"])
def test_a_level_is_none_but_a_level(tmp_path: Path, ask: str) -> None:
    texts: Any = ([],) if ask == "predict" else ("a",)
    with (
        EdgeClient("localhost:1", ROWS, tmp_path, scheme="none") as client,
        pytest.raises(ConfigurationError, match=r"level: 'common' is none; use Level\.BACKBONE"),
    ):
        getattr(client, ask)(*texts, level="common")


def test_more_rows_than_a_device_may_have_are_refused_before_the_backbone_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_rows, "EXAMPLES_MAX", 3)
    monkeypatch.setattr(Device, "_trainer", None)
    with pytest.raises(DataError, match="the rows given: 8 rows to train on; a device has 3 at m"):
        Device(tmp_path)


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ("one text", "texts: expected a list of texts, got one text"),
        (["a", None], "the texts given, line 2: expected text, got NoneType"),
        (["\ud800"], "line 1: holds half of a character"),
        (None, "texts: expected a list of texts or rows, got NoneType"),
        ({"text": "a", "text_pair": "b"}, "texts: expected a list of texts or rows, got dict"),
        (Table(), "texts: expected a list of texts or rows, got Table"),
    ],
)
def test_what_cannot_be_foretold_is_refused(tmp_path: Path, texts: Any, reason: str) -> None:
    with (
        EdgeClient("localhost:1", ROWS, tmp_path, scheme="none") as client,
        pytest.raises(DataError, match=reason),
    ):
        client.predict(texts)


def test_an_app_and_the_shell_have_a_text_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, rows = str(write_gpt2(tmp_path / "model")), [{"text": "The gradient So"}] * 4
    task, backbone = Task(TaskKind.CAUSAL_LM, (), 8), Backbone(model, SETTINGS.fingerprint)
    device = Device(tmp_path / "a", replace(SETTINGS, backbone=backbone, task=task), rows=rows)
    device.round(1)
    with EdgeClient("localhost:1", rows, tmp_path / "a", scheme="none") as client:
        assert client.generate("The gradient", 3) == device.worker.trainer.generate(
            "The gradient", 3, Level.PERSONAL
        )
        for wrong in (1, {"text": "The"}):
            with pytest.raises(DataError, match=f"expected text, got {type(wrong).__name__}"):
                client.generate(wrong)  # type: ignore[arg-type]
        for count in (0, -1, 1.5):
            said = f"new_tokens_max: is {count}; use a whole number from 1 on"
            with pytest.raises(ConfigurationError, match=said):
                client.generate("The gradient", count)  # type: ignore[arg-type]
        with pytest.raises(AdapterError, match="nothing to predict for causal-lm; use generate"):
            client.predict(["The"])
    asked = tmp_path / "asked.jsonl"
    asked.write_text(f'{json.dumps(rows[0])}\n\n{{"text": "{"The " * 40}"}}\n')
    flags = ["--data", str(asked), "--state-dir", str(tmp_path / "a"), "--scheme", "none"]
    assert cli.main(["predict", "The", *flags, "--rows", str(asked)]) == 1
    said = capsys.readouterr().err
    assert f"{asked}, line 3: a prompt has 40 tokens, and the model takes 32" in said


def test_a_backbones_folder_is_the_same_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Device(tmp_path / "a")
    (tmp_path / "model").symlink_to(resolve_backbone(MINILM))
    monkeypatch.chdir(tmp_path)
    how: dict[str, Any] = {"scheme": "none", "backbone": "model"}
    with EdgeClient("localhost:1", ROWS, tmp_path / "a", **how) as client:
        monkeypatch.chdir("/")
        client.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "model")
    # A federation's own name for it is for devices elsewhere.
    monkeypatch.chdir(tmp_path)
    relative = replace(SETTINGS, backbone=Backbone("model", SETTINGS.fingerprint))
    said = rf"'model': a relative path, here {tmp_path}/model; each device would"
    with pytest.raises(BackboneError, match=said):
        loading.load_trainer(loading.TorchChoice(None, "none"), relative, 0)
    (tmp_path / "federation.toml").write_text('[backbone]\nname = "model"')
    assert cli.main(["prepare", "federation.toml"]) == 1
    assert re.search(said, capsys.readouterr().err)


def test_an_app_catches_all_that_may_be_wrong_as_one_kind_of_error(tmp_path: Path) -> None:
    Device(tmp_path / "a")
    how: dict[str, Any] = {"scheme": "none", "backbone": str(tmp_path)}  # no model in there
    with (
        EdgeClient("localhost:1", ROWS, tmp_path / "a", **how) as client,
        pytest.raises(EdgeClientError, match=r"config\.json") as refused,
    ):
        client.evaluate()
    assert isinstance(refused.value, BackboneError)
    (tmp_path / "quantized.json").write_text("{")
    with pytest.raises(BackboneError, match=r"quantized\.json"):
        EdgeClient("localhost:1", ROWS, tmp_path / "b", **how)


def test_an_app_may_import_what_it_is_answered_with_from_where_the_client_is() -> None:
    asked = [getattr(EdgeClient, name) for name in dir(EdgeClient) if not name.startswith("_")]
    said = " ".join(str(ask.__annotations__["return"]) for ask in asked if callable(ask))
    types = set(re.findall(r"\w+", said)) - {"None", "Any", "str", "dict", "list"}
    assert types <= set(client.__all__)
    assert len(types) == 6


def test_an_adapter_that_cannot_be_written_is_an_error_with_a_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Device(tmp_path / "a")
    taken = _write_data(tmp_path / "a.jsonl", 0.5)
    command = ["save", "--data", str(taken), "--state-dir", str(tmp_path / "a"), "--scheme", "none"]
    assert cli.main([*command, "--out", str(taken)]) == 1
    assert f"pf2lora-client: folder: {taken} cannot be written" in capsys.readouterr().err


def test_a_question_from_progress_while_the_model_is_loaded_is_refused_by_name(
    tmp_path: Path,
) -> None:
    def ask(_: str) -> None:
        with worker.ready():
            raise AssertionError("there is no model yet")

    def load(_: FederationSettings) -> Any:
        raise AssertionError("asked after the model was loaded")

    worker = DeviceWorker(DataSettings(ROWS, FieldNames()), PrivateStore(tmp_path), load, ask)
    with pytest.raises(ConfigurationError, match="progress: the model is being loaded"):
        asyncio.run(worker.prepare(SETTINGS))
