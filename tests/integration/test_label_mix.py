"""The balanced softmax: the device's label shares are added to the logits, not learned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client import cli
from edge_client.backends.base import Level
from edge_client.backends.label_offset import LabelOffset
from edge_client.client import EdgeClient, LabelMix
from edge_client.errors import ConfigurationError
from edge_client.tasks.base import cross_entropy
from protocol.federation import FederationSettings, Loss, Task, TaskKind
from protocol.methods import HomLoRA
from protocol.scalars import SchemaError
from tests.integration.device import SETTINGS, Device

# One row of eight is good.
ROWS = [
    {"text": f"a {'fine' if n % 8 == 0 else 'dull'} film {n}", "label": ("bad", "good")[n % 8 == 0]}
    for n in range(40)
]


def _settings(loss: Loss = Loss.BALANCED_SOFTMAX, **training: Any) -> FederationSettings:
    task, training_ = replace(SETTINGS.task, loss=loss), replace(SETTINGS.training, **training)
    return replace(SETTINGS, task=task, training=training_)


def _log_shares(device: Device) -> np.ndarray:
    labels = [row.label for row in device.worker.training_rows]
    counts = 0.5 + np.bincount(np.array(labels, np.int64), minlength=2)
    return np.log(counts / counts.sum())


def _logits(device: Device, mix: LabelMix) -> np.ndarray:
    """Logits of the held-out rows, but for a constant a row."""
    asked = [(row.place, row.text) for row in device.worker.held_out_rows]
    with device.worker.ready() as model:
        found: Any = model.predict(asked, Level.PERSONAL, mix)  # type: ignore[arg-type]
    return np.log([one.probabilities for one in found])


def test_the_loss_and_answers_for_the_own_mix_add_the_log_of_label_shares(tmp_path: Path) -> None:
    device = Device(tmp_path, _settings(), rows=ROWS)
    device.round(1)
    shares, held_out = _log_shares(device), device.worker.held_out_rows
    own, even = _logits(device, LabelMix.OWN), _logits(device, LabelMix.EVEN)
    assert np.diff(own - even) == pytest.approx(np.diff(shares)[0], abs=1e-4)
    labels = np.array([row.label for row in held_out], np.int64)
    trainer: Any = device.worker.trainer
    batch = trainer.batch(trainer.encode(held_out))
    wanted = float(cross_entropy(even + shares, labels).mean())
    assert trainer.gradients(batch).loss == pytest.approx(wanted, abs=1e-4)
    for mix, logits in ((LabelMix.OWN, own), (LabelMix.EVEN, even)):
        with device.worker.ready() as model:
            found = model.evaluate(held_out, Level.PERSONAL, mix)
        assert found.loss == pytest.approx(float(cross_entropy(logits, labels).mean()), abs=1e-4)


def test_rare_labels_are_found_sooner_where_shares_are_not_learned(tmp_path: Path) -> None:
    recall = {}
    for loss in Loss:
        settings = _settings(loss, learning_rate=0.01, local_steps=8)
        device = Device(tmp_path / loss.value, settings, rows=ROWS)
        device.round(1)
        mix = LabelMix.EVEN if loss is Loss.BALANCED_SOFTMAX else LabelMix.OWN
        with device.worker.ready() as model:
            rare = [row for row in model.read(ROWS) if row.label == 1]
            recall[loss] = model.evaluate(rare, Level.PERSONAL, mix).accuracy
    assert recall[Loss.CROSS_ENTROPY] == 0.0
    assert recall[Loss.BALANCED_SOFTMAX] == 1.0


def test_a_restart_changes_no_answer(tmp_path: Path) -> None:
    def said(device: Device) -> list[Any]:
        with device.worker.ready() as model:
            return [model.evaluate(model.held_out_rows, level) for level in Level]

    device = Device(tmp_path, _settings(), rows=ROWS)
    device.round(1)
    assert said(device) == said(Device(tmp_path, _settings(), rows=ROWS))


def test_what_the_backbone_gave_before_is_for_the_own_mix_too(tmp_path: Path) -> None:
    device = Device(tmp_path, _settings(), rows=ROWS)
    with device.worker.ready() as model:
        found = model.evaluate(model.held_out_rows, Level.BACKBONE)
    assert device.state.facts["before_loss"] == found.loss
    assert found.accuracy > 0.5


def test_an_app_and_the_shell_ask_for_an_even_mix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = Device(tmp_path / "state", _settings(), rows=ROWS)
    device.round(1)
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)))
    with EdgeClient("localhost:1", data, tmp_path / "state", scheme="none") as client:
        (own,), (even,) = (client.predict(["a film"], label_mix=mix) for mix in LabelMix)
        scores = client.evaluate(label_mix=LabelMix.EVEN)
        with pytest.raises(ConfigurationError, match=r"label_mix: 'even' is none; use LabelMix\.O"):
            client.predict(["a film"], label_mix="even")  # type: ignore[call-overload]
    assert own.probabilities[0] > even.probabilities[0]
    flags = ["--data", str(data), "--state-dir", str(tmp_path / "state"), "--scheme", "none"]
    flags += ["--json", "--label-mix", "even"]
    assert cli.main(["predict", *flags, "a film"]) == 0
    shares = json.loads(capsys.readouterr().out.splitlines()[-1])["probabilities"]
    assert list(shares.values()) == pytest.approx(even.probabilities)
    assert cli.main(["evaluate", *flags]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["loss"] == scores.loss


def test_shares_that_a_personal_head_has_learned_are_taken_out_of_its_answers(
    tmp_path: Path,
) -> None:
    device = Device(tmp_path, _settings(Loss.CROSS_ENTROPY), rows=ROWS)
    device.round(1)
    own, even = _logits(device, LabelMix.OWN), _logits(device, LabelMix.EVEN)
    assert np.diff(own - even) == pytest.approx(np.diff(_log_shares(device))[0], abs=1e-4)


def test_what_cannot_answer_for_an_even_mix_says_so(tmp_path: Path) -> None:
    settings = _settings(Loss.CROSS_ENTROPY)
    device = Device(tmp_path, replace(settings, algorithm=HomLoRA()), rows=ROWS)
    device.round(1)
    with pytest.raises(ConfigurationError, match=r'^label_mix: .*; use task.loss = "balanced-'):
        _logits(device, LabelMix.EVEN)
    assert _logits(device, LabelMix.OWN).shape == (8, 2)
    with pytest.raises(SchemaError, match=r"^loss: must be 'cross-entropy': causal-lm"):
        Task(TaskKind.CAUSAL_LM, loss=Loss.BALANCED_SOFTMAX)


def test_shares_that_nobody_has_counted_are_not_taken_for_none() -> None:
    """A head that has learned them may have come out of the state folder, its rows not yet."""
    offset = LabelOffset(SETTINGS.task, head_is_personal=True)
    with pytest.raises(RuntimeError, match="personalise first"):
        offset.answering(LabelMix.EVEN)
    balanced = LabelOffset(_settings().task, head_is_personal=True)
    with pytest.raises(RuntimeError, match="personalise first"):
        balanced.answering(LabelMix.OWN)
    offset.learn(np.log(np.array([0.75, 0.25], np.float32)))
    with offset.answering(LabelMix.EVEN):
        assert np.exp(offset.added_to(np.zeros(2))) == pytest.approx([4 / 3, 4])
