"""Sequence classification: a text, or a pair of texts, and one of the task's labels."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Final, TypeGuard

import numpy as np
from numpy.typing import NDArray

from edge_client.backends.base import Evaluation, Prediction
from edge_client.backends.encoding import EncodedRow, EncodedRows, Tokenizer, beginning
from edge_client.data import Example, FieldNames, Place, RawRow, listed
from edge_client.errors import DataError
from edge_client.tasks.base import Logits, Model, TaskRules, score_of
from quantization.tasks import IGNORED

_DIGITS_MAX: Final = 10


class Classification(TaskRules):
    """Targets [b] are labels, logits [b, labels]."""

    def read(self, row: RawRow, names: FieldNames) -> Example:
        text, pair = row.text(names.text), row.optional_text(names.text_pair)
        return Example(text, pair, self._label(row, names.label), place=row.place)

    def check(self, row: Example, place: Place, names: FieldNames) -> None:
        raw, count = RawRow(self.fields_of(row, names), place), len(self.task.labels)
        raw.text(names.text)
        raw.optional_text(names.text_pair)
        if not _is_whole(row.label) or not 0 <= int(row.label) < count:
            raise raw.error(f"{row.label!r} is not an index of the {count} labels", names.label)

    def asked(self, row: object, place: Place, names: FieldNames) -> Example:
        if isinstance(row, str):
            return Example(row, None, None, place=place)
        if not isinstance(row, Mapping):
            raise place.error(f"expected text or a row, got {type(row).__name__}")
        raw = RawRow(row, place)
        text, pair = raw.text(names.text), raw.optional_text(names.text_pair)
        return Example(text, pair, None, place=place)

    def encode(self, row: Example, tokenizer: Tokenizer) -> Sequence[EncodedRow]:
        length = self.task.max_length
        text, pair = (beginning(one or "", tokenizer, length) for one in (row.text, row.text_pair))
        ids, types = tokenizer.encode(text, pair or None, length_max=length)
        if not ids:
            raise DataError(f"a text leaves no token: {row.text[:40]!r}")
        label = IGNORED if row.label is None else row.label
        return [EncodedRow(ids, types, (label,))]

    def targets(self, rows: Sequence[EncodedRow]) -> NDArray[np.int64]:
        return np.array([row.targets[0] for row in rows], np.int64)

    def log_shares(self, rows: EncodedRows) -> NDArray[np.float32]:
        """With one row more that has all labels in equal parts: none is impossible."""
        labels = len(self.task.labels)
        counts = np.bincount(rows.targets[:, 0], minlength=labels) + 1.0 / labels
        shares: NDArray[np.float32] = np.log(counts / counts.sum()).astype(np.float32)
        return shares

    def evaluate(self, rows: EncodedRows, model: Model) -> Evaluation:
        whole = score_of(rows, model)
        hits, labels = whole.hits, whole.labels
        recalls = [float(hits[labels == label].mean()) for label in np.unique(labels)]
        balanced = sum(recalls) / len(recalls)
        return Evaluation(len(rows), whole.loss, whole.accuracy, balanced_accuracy=balanced)

    def predict(self, rows: Sequence[Example], model: Model) -> list[Prediction]:
        names, found = self.task.labels, []
        for batch in model.batches(self.encode_all(rows, model.tokenizer)):
            for row in _softmax(model.logits(batch)):
                found.append(Prediction(names[int(row.argmax())], tuple(row.tolist())))
        return found

    def _label(self, row: RawRow, name: str) -> int:
        """Its index: given by its name or, where no name is a number, as the index."""
        labels, value = self.task.labels, row.value(name)
        text = str(value) if _is_whole(value) or isinstance(value, str) else ""
        if text in labels:
            return labels.index(text)
        is_index = text.isdecimal() and len(text) < _DIGITS_MAX
        if is_index and not any(map(str.isdecimal, labels)) and int(text) < len(labels):
            return int(text)
        problem = f"{value!r} is not a label of the task: {listed(labels)}"
        form = unicodedata.normalize("NFC", text)
        if alike := [label for label in labels if unicodedata.normalize("NFC", label) == form]:
            problem = (
                f"{text!a} is not a label of the task, though it looks like {alike[0]!a}: "
                "another form of Unicode"
            )
        raise row.error(problem, name)


def _is_whole(value: object) -> TypeGuard[Integral]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _softmax(logits: Logits) -> Logits:
    powers: Logits = np.exp(logits - logits.max(-1, keepdims=True))
    powers /= powers.sum(-1, keepdims=True)
    return powers
