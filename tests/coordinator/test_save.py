"""`save`: what a base version becomes in PEFT's files, and what cannot be taken out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from coordinator import cli
from coordinator.store.base import RoundRecord
from coordinator.store.sql import SqlStore
from protocol.federation import Adapter, FederationSettings, Group, start_settings
from protocol.methods import Algorithm, FedSALoRA, FFALoRA, LocalOnly, PFedLoRA
from protocol.tensors import NamedTensors
from tests.coordinator.small_disk import files_of_at_most
from tests.protocol.samples import FINGERPRINT, SETTINGS

FLOATS = np.random.default_rng(0).standard_normal
FACTORS = {
    "encoder.q.A": FLOATS((2, 3), np.float32),
    "encoder.q.B": FLOATS((5, 2), np.float32),
    "encoder.v.A": FLOATS((2, 3), np.float32),
    "encoder.v.B": FLOATS((4, 2), np.float32),
}
HEAD = {"score.bias": FLOATS(2, np.float32), "score.dense.weight": FLOATS((2, 5), np.float32)}


def _settings(name: str, method: Algorithm | None = None) -> FederationSettings:
    adapter = Adapter(rank=2, personal_rank=1, alpha=6.0, head=Group.COMMON)
    settings = replace(SETTINGS, name=name, adapter=adapter)
    if isinstance(method, PFedLoRA):
        settings = replace(settings, backbone=None, adapter=Adapter(), algorithm=method)
    return replace(settings, algorithm=method) if method else settings


class Saving:
    """A store and the command on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"sqlite:///{folder}/s.sqlite"
        self.store = SqlStore(self.url)

    def create(self, settings: FederationSettings, arrays: dict[str, Any], rounds: int = 0) -> None:
        """A federation whose base version after n rounds is the start times n + 1."""
        base = NamedTensors.from_arrays(arrays)
        self.store.create(settings, base)
        for number in range(1, rounds + 1):
            record = RoundRecord(number, 1, base.digest(), 10.0, 70.0, ())
            self.store.open_round(settings.name, record)
            moved = {name: array * np.float32(number + 1) for name, array in arrays.items()}
            base = NamedTensors.from_arrays(moved)
            self.store.close_round(settings.name, number, 1, base, 20.0)

    def save(self, *flags: str, out: str = "out") -> int:
        return cli.main(["save", "--store", self.url, "--out", str(self.folder / out), *flags])

    def tensors(self, out: str = "out") -> dict[str, Any]:
        return load_file(self.folder / out / "adapter_model.safetensors")

    def configuration(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "out" / "adapter_config.json").read_text()))


@pytest.fixture
def saving(tmp_path: Path) -> Iterator[Saving]:
    found = Saving(tmp_path)
    yield found
    found.store.close()


def test_factors_and_head_get_pefts_names(
    saving: Saving, capsys: pytest.CaptureFixture[str]
) -> None:
    saving.create(_settings("reviews"), FACTORS | HEAD, rounds=1)
    (saving.folder / "out").mkdir()  # empty: as good as none
    assert saving.save() == 0
    said = capsys.readouterr().out
    assert "the common adapter of reviews after 1 of 10 rounds" in said
    assert f"for tiny, {FINGERPRINT}" in said
    assert "with the head score for the labels no, yes" in said
    expected = {
        "encoder.q.lora_A.weight": FACTORS["encoder.q.A"],
        "encoder.q.lora_B.weight": FACTORS["encoder.q.B"],
        "encoder.v.lora_A.weight": FACTORS["encoder.v.A"],
        "encoder.v.lora_B.weight": FACTORS["encoder.v.B"],
        **HEAD,
    }
    found = saving.tensors()
    assert found.keys() == {f"base_model.model.{name}" for name in expected}
    for name, array in expected.items():
        np.testing.assert_array_equal(found[f"base_model.model.{name}"], array * np.float32(2))
    config = saving.configuration()
    assert config["target_modules"] == ["encoder.q", "encoder.v"]
    assert config["modules_to_save"] == ["score"]
    assert (config["r"], config["lora_alpha"]) == (2, 6.0)
    assert (config["task_type"], config["base_model_name_or_path"]) == ("SEQ_CLS", "tiny")
    with safe_open(saving.folder / "out" / "adapter_model.safetensors", "np") as file:
        facts = file.metadata()
    assert json.loads(facts["labels"]) == ["no", "yes"]
    assert facts["format"] == "pt"
    assert facts["version"] == saving.store.bases("reviews")[-1].version.hex()


def test_without_a_head_peft_is_not_told_of_a_task_that_has_one(
    saving: Saving, capsys: pytest.CaptureFixture[str]
) -> None:
    saving.create(_settings("reviews"), FACTORS)
    assert saving.save() == 0
    assert "without a head: each device has its own" in capsys.readouterr().out
    assert saving.configuration()["task_type"] is None
    assert saving.configuration()["modules_to_save"] is None


def test_any_base_version_that_is_kept_can_be_written(
    saving: Saving, capsys: pytest.CaptureFixture[str]
) -> None:
    saving.create(_settings("reviews"), FACTORS, rounds=2)
    assert saving.save("--after", "1") == 0
    (name,) = [name for name in saving.tensors() if name.endswith("q.lora_A.weight")]
    np.testing.assert_array_equal(saving.tensors()[name], FACTORS["encoder.q.A"] * np.float32(2))
    for other in ("3", "-1", str(2**70)):
        assert saving.save("--after", other, out="other") == 2
        assert f"--after: {other} is not kept; there are: [0, 1, 2]" in capsys.readouterr().err
    assert not (saving.folder / "other").exists()


def test_of_several_federations_one_must_be_named(
    saving: Saving, capsys: pytest.CaptureFixture[str]
) -> None:
    assert saving.save() == 2
    assert "--name: is missing; the store has none" in capsys.readouterr().err
    for name in ("reviews", "intents"):
        saving.create(_settings(name), FACTORS)
    assert saving.save() == 2
    assert "--name: is missing; the store has 'intents', 'reviews'" in capsys.readouterr().err
    assert saving.save("--name", "other") == 2
    assert "no federation 'other'" in capsys.readouterr().err
    assert saving.save("--name", "intents") == 0


@pytest.mark.parametrize(
    ("method", "what"),
    [
        (LocalOnly(), "nothing is common"),
        (FedSALoRA(), "only A is common"),
        (PFedLoRA(), "what is common fits a backbone through its device's projections alone"),
    ],
)
def test_methods_whose_adapters_are_the_devices_are_refused(
    saving: Saving, capsys: pytest.CaptureFixture[str], method: Algorithm, what: str
) -> None:
    downs = {name: array for name, array in FACTORS.items() if name.endswith(".A")}
    saving.create(_settings("reviews", method), {} if isinstance(method, LocalOnly) else downs)
    assert saving.save() == 2
    error = capsys.readouterr().err
    assert f"'reviews' is of {method.NAME}, where {what}" in error
    assert "pf2lora-client save" in error
    assert not (saving.folder / "out").exists()


def _write_start(path: Path, settings: FederationSettings, /, **changes: str) -> list[str]:
    """A start file as prepare makes it for FFA-LoRA; the flags that name it."""
    names = {end: [name for name in FACTORS if name.endswith(end)] for end in (".A", ".B")}
    metadata = {
        "format": "pf2lora-start-2",
        "fingerprint": settings.fingerprint,
        "settings": json.dumps(start_settings(settings)),
        "names": json.dumps(names[".B"]),
        "frozen": json.dumps(names[".A"]),
        "seed": str(settings.seed),
    }
    save_file(FACTORS, path, metadata | changes)
    return ["--start", str(path)]


def test_what_ffa_lora_never_sends_comes_out_of_the_start_file(
    saving: Saving, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = _settings("reviews", FFALoRA())
    ups = {name: array for name, array in FACTORS.items() if name.endswith(".B")}
    saving.create(settings, ups, rounds=1)
    assert saving.save() == 2
    assert "--start: is missing: devices of ffa-lora never send A" in capsys.readouterr().err
    assert saving.save(*_write_start(saving.folder / "start.safetensors", settings)) == 0
    found = saving.tensors()
    for layer in ("encoder.q", "encoder.v"):
        down, up = (found[f"base_model.model.{layer}.lora_{letter}.weight"] for letter in "AB")
        np.testing.assert_array_equal(down, FACTORS[f"{layer}.A"])
        np.testing.assert_array_equal(up, FACTORS[f"{layer}.B"] * np.float32(2))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"seed": "1"}, "was made for seed '1', not '0'"),
        ({"fingerprint": "sha256:" + "1" * 64}, "was made for backbone.fingerprint 'sha256:111"),
        ({"settings": '{"adapter.rank": 4}'}, "was made for "),
        ({"frozen": "[]"}, "is damaged: its names are not those of its tensors"),
        ({"format": "other"}, "is no pf2lora-start-2 file"),
        (None, "is no file"),
    ],
)
def test_another_federations_start_file_is_refused(
    saving: Saving,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str] | None,
    problem: str,
) -> None:
    settings = _settings("reviews", FFALoRA())
    ups = {name: array for name, array in FACTORS.items() if name.endswith(".B")}
    saving.create(settings, ups)
    flags = _write_start(saving.folder / "start.safetensors", settings, **changes or {})
    if changes is None:
        (saving.folder / "start.safetensors").unlink()
    assert saving.save(*flags) == 2
    error = capsys.readouterr().err
    assert f"--start: {saving.folder}/start.safetensors {problem}" in error
    assert not (saving.folder / "out").exists()


def test_a_start_file_is_not_taken_where_none_is_needed(
    saving: Saving, capsys: pytest.CaptureFixture[str]
) -> None:
    saving.create(_settings("reviews"), FACTORS)
    assert saving.save("--start", "start.safetensors") == 2
    assert "--start: is for ffa-lora; 'reviews' is of pf2lora" in capsys.readouterr().err


@pytest.mark.parametrize("less", FACTORS)
def test_factors_without_their_partners_are_no_lora(
    saving: Saving, capsys: pytest.CaptureFixture[str], less: str
) -> None:
    saving.create(_settings("reviews"), {n: a for n, a in FACTORS.items() if n != less})
    assert saving.save() == 2
    assert "its factors are not pairs" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_leaves_no_trace(
    saving: Saving, capsys: pytest.CaptureFixture[str]
) -> None:
    large = {"q.A": np.ones((2, 100_000), np.float32), "q.B": np.ones((3, 2), np.float32)}
    saving.create(_settings("reviews"), large)
    (saving.folder / "full").mkdir()
    (saving.folder / "full" / "mine").write_text("mine")
    (saving.folder / "file").write_text("mine")
    before = sorted(saving.folder.rglob("*"))
    for out, problem in (
        ("full", "Directory not empty"),
        ("file", "Not a directory"),
        ("file/out", "Not a directory"),
    ):
        assert saving.save(out=out) == 2
        error = capsys.readouterr().err
        assert f"--out: {saving.folder}/{out} cannot be written: {problem}" in error
    with files_of_at_most(500_000):
        assert saving.save() == 2
    assert "cannot be written: File too large" in capsys.readouterr().err
    assert sorted(saving.folder.rglob("*")) == before
    assert saving.save() == 0
