"""The accuracy matrix measures what it says: scores, deals, and cells that are not run twice."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import accuracy, matrix
from benchmarks.accuracy import METHODS, best_learning_rate, run_cell, settings_of
from benchmarks.matrix import key_of
from benchmarks.simulation import scores
from benchmarks.tasks import DATA, TASKS, DeviceRows, deal
from protocol.methods import PF2LoRA

needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"no data at {DATA}")
CELL = {
    "task": "sst2-s0.5",
    "method": "pf2lora",
    "scheme": "none",
    "device": "cpu",
    "rows": 8,
    "set": ["training.local_steps=1", "training.batch_size=4"],
    "seed": 3,
    "split": "dev",
    "rounds": 2,
    "every": 1,
    "learning_rate": 1e-3,
}


@pytest.mark.parametrize("classes", [2, 5])
def test_scores_are_scikit_learns(classes: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(classes)
    probabilities = rng.dirichlet(np.ones(classes), 200)
    wanted = rng.integers(classes, size=200)
    found, chosen = scores(probabilities, wanted), probabilities.argmax(1)
    assert found == pytest.approx(
        {
            "accuracy": metrics.accuracy_score(wanted, chosen),
            "balanced_accuracy": metrics.balanced_accuracy_score(wanted, chosen),
            "loss": metrics.log_loss(wanted, probabilities),
            "matthews": metrics.matthews_corrcoef(wanted, chosen),
        }
    )


def test_matthews_of_one_answer_for_all_is_zero() -> None:
    probabilities = np.tile([0.9, 0.1], (4, 1))
    assert scores(probabilities, np.array([0, 1, 1, 0]))["matthews"] == 0.0


@needs_data
@pytest.mark.parametrize("name", ["sst2-s0.9", "clinc150", "cola-s0.5"])
@pytest.mark.parametrize("split", ["dev", "test"])
def test_devices_are_tested_on_their_own_mix_and_on_other_rows(name: str, split: str) -> None:
    shares = deal(TASKS[name], split, 0)
    assert len(shares) == TASKS[name].devices
    assert shares == deal(TASKS[name], split, 0) != deal(TASKS[name], split, 1) or "clinc" in name
    for share in shares:
        training, evaluation = (
            Counter(row.label for row in rows) for rows in (share.training, share.evaluation)
        )
        for label in training | evaluation:
            own = training[label] / training.total()
            assert evaluation[label] / evaluation.total() == pytest.approx(own, abs=0.12)
    if name == "cola-s0.5":  # choices are made on rows that no training, nor a report, has
        choices = {id_ for share in deal(TASKS[name], "dev", 0) for id_ in share.evaluation}
        assert not choices & {row for share in shares for row in share.training}


@needs_data
@pytest.mark.parametrize("name", ["e2e", "squad"])
def test_devices_by_a_field_have_rows_in_every_part_and_nobody_reads_a_test_text(name: str) -> None:
    task = TASKS[name]
    parts = {split: deal(task, split, 0) for split in ("dev", "test")}
    for split, shares in parts.items():
        assert len(shares) == task.devices
        assert min(len(share.evaluation) for share in shares) >= 40, split
    if name == "squad":
        texts = [{row.text_pair for s in parts["test"] for row in s.training}]
        texts += [{row.text_pair for s in parts[p] for row in s.evaluation} for p in parts]
        assert len(set.union(*texts)) == sum(map(len, texts))
        for row in (row for share in parts["test"] for row in share.training):
            for answer in row.answers:
                assert (row.text_pair or "").startswith(answer.text, answer.start)


@needs_data
def test_a_cell_is_a_whole_federation_and_comes_out_the_same_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def few(*arguments: Any) -> list[DeviceRows]:
        return [DeviceRows(s.training, s.evaluation[:4]) for s in deal(*arguments)]

    monkeypatch.setattr(accuracy, "deal", few)
    record, again = run_cell(CELL), run_cell(CELL)
    assert record["devices"] == again["devices"]
    assert [point["round"] for point in record["curve"]] == [1, 2]
    # Two reports of the common adapter, float32, and little besides.
    payload = 4 * 12 * 8 * (384 + 384)
    assert 2 * payload < record["curve"][-1]["sent_bytes"] < 2 * payload + 10_000
    assert record["training_rows"] == [8] * 8


def test_what_a_cell_sets_reaches_the_federation() -> None:
    settings = settings_of({**CELL, "set": ["algorithm.lower_learning_rate=0.5"]}, 8, ("a", "b"))
    assert settings.algorithm == PF2LoRA(lower_learning_rate=0.5)
    for method in METHODS:
        central = method == "centralised"
        settings = settings_of({**CELL, "method": method, "set": []}, 8, ("a", "b"))
        assert settings.rounds.cohort * settings.training.local_steps == 80
        assert settings.rounds.cohort == (1 if central else 8)


def test_a_data_set_stands_for_its_first_task() -> None:
    parser = accuracy._parser()
    assert parser.parse_args(["--tasks", "sst2", "sst2-s0.9"]).tasks == ["sst2-s0.5", "sst2-s0.9"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--tasks", "sst3"])


def test_finished_cells_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path / "results" / "accuracy.jsonl")
    matrix.append(accuracy.RESULTS, {"cell": CELL, "curve": []})
    accuracy._run_matrix([CELL], 1, again=False)
    assert "1 cells, 0 to run" in capsys.readouterr().out
    assert len(accuracy.RESULTS.read_text().splitlines()) == 1


def test_the_rate_is_the_best_on_the_rows_for_choices_and_all_must_be_tried() -> None:
    def record(rate: float, accuracy: float) -> dict[str, object]:
        cell = {**CELL, "set": [], "rounds": 10, "learning_rate": rate}
        return {"cell": cell, "curve": [{"accuracy": accuracy}]}

    tried = [record(rate, score) for rate, score in ((2e-3, 0.7), (4e-3, 0.6))]
    assert best_learning_rate(tried, "sst2-s0.5", "pf2lora") == 2e-3
    with pytest.raises(SystemExit, match="run --search first"):
        best_learning_rate(tried[:1], "sst2-s0.5", "pf2lora")
    assert json.loads(key_of(CELL)) == CELL
