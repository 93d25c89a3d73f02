"""Each kind of task reports the scores that mean something for it, and no others."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from edge_client.backends.base import Evaluation
from edge_client.backends.encoding import Batch, EncodedRow, EncodedRows
from edge_client.tasks import rules_for
from edge_client.tasks.base import Model, Score
from protocol.federation import Task, TaskKind

NO_TOKENIZER: Any = None  # the rows are encoded already


def _evaluated(task: Task, *scores: Score) -> Evaluation:
    """What a task's rules make of a model that scores its batches, of one row each, so."""
    rows = EncodedRows.of(EncodedRow((1,), None, (0,)) for _ in scores)
    found = iter(scores)
    array = np.zeros((1, 1), np.int64)
    model = Model(
        tokenizer=NO_TOKENIZER,
        batches=lambda rows: [Batch({"input_ids": array}, array, (row,)) for row in rows],
        score=lambda batch: next(found),
        logits=lambda batch: array,
    )
    return rules_for(task).evaluate(rows, model)


def _score(loss_sum: float, hits: list[bool], labels: list[int]) -> Score:
    return Score(loss_sum, np.array(hits), np.array(labels))


def test_of_labels_each_that_is_there_counts_alike_when_balanced() -> None:
    task = Task(TaskKind.SEQUENCE_CLASSIFICATION, ("a", "b", "c"))
    found = _evaluated(task, _score(3.0, [True, True], [0, 0]), _score(1.0, [True, False], [0, 1]))
    assert found == Evaluation(2, 1.0, 0.75, balanced_accuracy=0.5)
    assert list(found.scores) == ["accuracy", "balanced_accuracy"]


def test_of_next_tokens_the_mean_is_over_tokens_and_perplexity_is_its_power() -> None:
    task = Task(TaskKind.CAUSAL_LM)
    found = _evaluated(task, _score(6.0, [True, False, False], [5, 6, 7]), _score(2.0, [True], [5]))
    assert found == Evaluation(2, 2.0, 0.5, perplexity=math.exp(2.0))
    assert list(found.scores) == ["accuracy", "perplexity"]


@pytest.mark.parametrize("loss", [800.0, math.inf])
def test_a_loss_beyond_all_bounds_has_a_perplexity_too(loss: float) -> None:
    assert _evaluated(Task(TaskKind.CAUSAL_LM), _score(loss, [False], [5])).perplexity == math.inf


def test_of_answers_the_accuracy_is_called_exact_match() -> None:
    assert Evaluation(4, 1.0, 0.25, f1=0.5).scores == {"exact_match": 0.25, "f1": 0.5}
