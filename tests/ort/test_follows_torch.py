"""From the same start and batches onnxruntime takes the steps that torch takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from edge_client.backends.ort import OrtTrainer, tokenizer_of
from quantization.artifact import load_artifact
from tests.ort.cases import CASES, PERSONAL_SEED, Case, follow, outlook

# Both runtimes round float32 in an order of their own. Losses may differ by this, relatively, and
# what a level has moved from its first step by this share of that movement's length.
LOSS = 2e-5
MOVED = 2e-3


def trainer_of(case: Case, artifacts: Path, **changes: object) -> OrtTrainer:
    artifact = load_artifact(artifacts / str(changes.get("artifact", case.artifact)))
    return OrtTrainer(case.settings, artifact, tokenizer_of(artifact), personal_seed=PERSONAL_SEED)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_both_levels_follow_step_by_step(artifacts: Path, name: str) -> None:
    case = CASES[name]
    if not (artifacts / f"{name}.npz").exists():
        pytest.skip("the stories260K weights are not here")
    wanted = np.load(artifacts / f"{name}.npz")
    found = follow(trainer_of(case, artifacts), case)
    errors = {"loss": float(np.abs(found["loss"] / wanted["loss"] - 1.0).max())}
    for level in ("common", "personal"):
        assert found[level].shape == wanted[level].shape
        if not wanted[level].size:
            continue
        moved = np.linalg.norm(wanted[level][-1] - wanted[level][0])
        errors[level] = float(np.linalg.norm(found[level] - wanted[level], axis=1).max() / moved)
    print(name, {key: f"{error:.1e}" for key, error in errors.items()})
    assert found["rank"] == wanted["rank"]
    assert errors.pop("loss") < LOSS
    assert max(errors.values()) < MOVED


@pytest.mark.parametrize("name", ["minilm", "minilm-balanced", "stories", "answers"])
def test_a_trained_model_answers_alike_and_is_written_alike(
    artifacts: Path, tmp_path: Path, name: str
) -> None:
    case = CASES[name]
    if not (artifacts / f"{name}.npz").exists():
        pytest.skip("the stories260K weights are not here")
    wanted = json.loads((artifacts / f"{name}.json").read_text())
    trainer = trainer_of(case, artifacts)
    follow(trainer, case)
    found = outlook(trainer, case, tmp_path)
    assert found.keys() == wanted.keys()
    for key in found.keys() & {"labels", "text", "answers"}:
        assert found[key] == wanted[key]
    for level, (ours, theirs) in enumerate(zip(found["levels"], wanted["levels"], strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6), level
    ours, theirs = (one.get("probabilities", 0.0) for one in (found, wanted))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for ours, theirs in zip(found["ranks"], wanted["ranks"], strict=True):
        assert ours[0] == theirs[0]
        assert ours[3] == pytest.approx(theirs[3], rel=1e-4)
    for kind in ("whole", "cut"):
        theirs_folder = artifacts / f"{name}.peft" / kind
        config = "adapter_config.json"
        assert (tmp_path / kind / config).read_text() == (theirs_folder / config).read_text()
        ours, theirs = (
            load_file(folder / "adapter_model.safetensors")
            for folder in (tmp_path / kind, theirs_folder)
        )
        assert ours.keys() == theirs.keys()
        if kind == "whole":
            for layer, array in ours.items():
                assert np.abs(array - theirs[layer]).max() < 1e-4, layer


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantised_weights_train_near_the_float_ones(artifacts: Path, scheme: str) -> None:
    case = replace(CASES["minilm"], steps=12)
    exact = np.load(artifacts / "minilm.npz")["loss"][:12]
    found = follow(trainer_of(case, artifacts, artifact=f"minilm-{scheme}"), case)["loss"]
    assert found[0] != exact[0]
    assert np.abs(found - exact).max() < {"int8": 0.03, "int4": 0.2}[scheme]
