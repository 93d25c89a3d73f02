"""Extractive question answering: a question, and a context that its answer is a part of.

Rows are those of the `squad` data set, flat: `{"question": ..., "context": ..., "answers": {"text":
[...], "answer_start": [...]}}`, starts in characters. A context too long for the task's longest
input is read in windows that overlap; a window without the answer has position 0 for a target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from edge_client.backends.base import Evaluation, FoundAnswer
from edge_client.backends.encoding import EncodedRow, EncodedRows, Tokenizer, Window
from edge_client.data import Answer, Example, FieldNames, Place, RawRow
from edge_client.errors import DataError
from edge_client.tasks.answer_scores import exact_match, f1
from edge_client.tasks.base import Logits, Model, TaskRules, cross_entropy
from quantization.tasks import IGNORED

# Longer answers are not looked for: nearly none of SQuAD's are.
ANSWER_TOKENS_MAX: Final = 30
# Around a question and its context, whatever the model: RoBERTa has four.
_SPECIAL_TOKENS: Final = 4


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """What all windows of a row share; every row has one of its own."""

    context: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """What a window shows of a context; `first` and `spans` are a Window's."""

    asked: _Asked
    first: int
    spans: NDArray[np.int32]


class QuestionAnswering(TaskRules):
    """Targets [b, 2] are the answer's first and last token; logits [b, 2, t]."""

    def read(self, row: RawRow, names: FieldNames) -> Example:
        context = row.text(names.context)
        answers = _answers(row, names.answers, context)
        return Example(row.text(names.question), context, None, answers, row.place)

    def fields_of(self, row: Example, names: FieldNames) -> dict[str, object]:
        texts, starts = [one.text for one in row.answers], [one.start for one in row.answers]
        answers = {"text": texts, "answer_start": starts}
        return {names.question: row.text, names.context: row.text_pair, names.answers: answers}

    def asked(self, row: object, place: Place, names: FieldNames) -> Example:
        if not isinstance(row, Mapping):
            wanted = f"an object with {names.question} and {names.context}"
            raise place.error(f"expected {wanted}, got {type(row).__name__}")
        raw = RawRow(row, place)
        return Example(raw.text(names.question), raw.text(names.context), None, place=place)

    def encode(self, row: Example, tokenizer: Tokenizer) -> Sequence[EncodedRow]:
        context, length = row.text_pair or "", self.task.max_length
        question_length = len(tokenizer.encode(row.text, special=False)[0])
        if question_length + _SPECIAL_TOKENS > length // 2:
            raise DataError(
                f"a question of {question_length} tokens leaves its context less than half of "
                f"max_length {length}: {row.text[:40]!r}"
            )
        windows = tokenizer.windows(row.text, context, length, overlap=length // 4)
        if not len(windows[0].spans):
            raise DataError(f"a context has no token: {context[:40]!r}")
        asked = _Asked(context, row.answers)
        return [_encoded(window, asked) for window in windows]

    def targets(self, rows: Sequence[EncodedRow]) -> NDArray[np.int64]:
        return np.array([row.targets for row in rows], np.int64)

    def evaluate(self, rows: EncodedRows, model: Model) -> Evaluation:
        if (rows.targets == IGNORED).any():
            raise DataError("a question has no answer to be scored by")
        losses, search = [], _Search()
        for batch in model.batches(rows.shortest_first()):
            logits = model.logits(batch)
            positions = logits.reshape(-1, logits.shape[-1])
            losses.append(cross_entropy(positions, batch.targets.reshape(-1)))
            search.look(batch.rows, logits)
        said = {asked: found.text for asked, found in search.found()}
        wanted = {asked: [answer.text for answer in asked.answers] for asked in said}
        exact = float(np.mean([exact_match(text, wanted[asked]) for asked, text in said.items()]))
        overlap = float(np.mean([f1(text, wanted[asked]) for asked, text in said.items()]))
        return Evaluation(len(said), float(np.concatenate(losses).mean()), exact, f1=overlap)

    def predict(self, rows: Sequence[Example], model: Model) -> list[FoundAnswer]:
        search = _Search()
        for batch in model.batches(self.encode_all(rows, model.tokenizer)):
            search.look(batch.rows, model.logits(batch))
        return [found for _, found in search.found()]


class _Search:
    """The best span of each context over its windows, and its share of what all spans come to."""

    def __init__(self) -> None:
        self._seen: dict[_Asked, list[tuple[NDArray[np.int32], Logits]]] = {}

    def look(self, rows: Sequence[EncodedRow], logits: Logits) -> None:
        """Take in windows and their logits, [b, 2, t]."""
        for row, both in zip(rows, logits, strict=True):
            part: _Part = row.part
            of_part = both[:, part.first : part.first + len(part.spans)].copy()
            self._seen.setdefault(part.asked, []).append((part.spans, of_part))

    def found(self) -> Iterator[tuple[_Asked, FoundAnswer]]:
        """Each context's answer, in the order in which they were first looked at."""
        for asked, windows in self._seen.items():
            start, end, probability = _likeliest(windows)
            # Tokens of some vocabularies begin with a space.
            text = asked.context[start:end]
            start += len(text) - len(text.lstrip())
            text = text.strip()
            yield asked, FoundAnswer(text, start, start + len(text), probability)


def _likeliest(windows: Sequence[tuple[NDArray[np.int32], Logits]]) -> tuple[int, int, float]:
    """The characters of the best span, and its probability; windows share spans."""
    begins, ends, scores = [], [], []
    for spans, logits in windows:
        found = _span_scores(*logits)
        first, more = np.nonzero(~np.isneginf(found))
        begins.append(spans[first, 0])
        ends.append(spans[first + more, 1])
        scores.append(found[first, more])
    begin, end, score = map(np.concatenate, (begins, ends, scores))
    best = int(score.argmax())
    powers = np.exp(score - score[best])
    is_same = (begin == begin[best]) & (end == end[best])
    return int(begin[best]), int(end[best]), float(powers[is_same].sum() / powers.sum())


def _span_scores(starts: Logits, ends: Logits) -> NDArray[np.float64]:
    """Scores [n, k] of the spans of k + 1 tokens from each of n on; -inf beyond the last."""
    longest = min(len(starts), ANSWER_TOKENS_MAX)
    beyond = np.full(longest - 1, -np.inf)
    later = sliding_window_view(np.concatenate([ends.astype(np.float64), beyond]), longest)
    scores: NDArray[np.float64] = starts.astype(np.float64)[:, None] + later
    return scores


def _encoded(window: Window, asked: _Asked) -> EncodedRow:
    targets = _target(window, asked.answers[0]) if asked.answers else (IGNORED, IGNORED)
    part = _Part(asked, window.first, window.spans)
    return EncodedRow(window.ids, window.types, targets, part)


def _target(window: Window, answer: Answer) -> tuple[int, int]:
    """The tokens that the answer begins and ends in; 0 where it is not whole in this window."""
    begin = answer.start + len(answer.text) - len(answer.text.lstrip())
    end = begin + len(answer.text.strip())
    spans = window.spans
    inside = np.flatnonzero((spans[:, 1] > begin) & (spans[:, 0] < end))
    if not len(inside) or spans[inside[0], 0] > begin or spans[inside[-1], 1] < end:
        return 0, 0
    return window.first + int(inside[0]), window.first + int(inside[-1])


def _answers(row: RawRow, name: str, context: str) -> tuple[Answer, ...]:
    value = row.value(name)
    if not isinstance(value, Mapping):
        wanted = "an object with the lists text and answer_start"
        raise row.error(f"expected {wanted}, got {type(value).__name__}", name)
    texts, starts = (_list(row, value, name, key) for key in ("text", "answer_start"))
    if len(texts) != len(starts):
        problem = f"has {len(starts)} starts for {len(texts)} texts"
        raise row.error(problem, f"{name}.answer_start")
    if not texts:
        raise row.error("is empty: a question needs an answer in its context", f"{name}.text")
    answers = []
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise row.error(f"expected text, got {text!r}", f"{name}.text")
        _check_start(row, f"{name}.answer_start", context, text, start)
        answers.append(Answer(text, int(start)))
    return tuple(answers)


def _list(row: RawRow, answers: Mapping[Any, Any], name: str, key: str) -> Sequence[Any]:
    value = answers.get(key)
    if isinstance(value, np.ndarray):  # as pandas reads lists
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise row.error(f"expected a list, got {type(value).__name__}", f"{name}.{key}")
    return value


def _check_start(row: RawRow, field: str, context: str, text: str, start: Any) -> None:
    is_whole = isinstance(start, Integral) and not isinstance(start, bool)
    if not is_whole or not 0 <= (at := int(start)) < len(context):
        raise row.error(
            f"{start!r} is no character of the context (0 to {len(context) - 1})", field
        )
    there = context[at : at + len(text)]
    if there != text:
        place = context.find(text)
        hint = f"it is at {place}" if place >= 0 else "it is nowhere in the context"
        raise row.error(f"{text!r} is not at {at}, where {there!r} is; {hint}", field)
