"""What a kind of task has to say: how its rows are read, encoded, scored and answered. No torch."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edge_client.backends.base import Evaluation, FoundAnswer, Prediction
from edge_client.backends.encoding import Batch, EncodedRow, EncodedRows, Tokenizer
from edge_client.data import Example, FieldNames, Place, RawRow
from edge_client.errors import AdapterError, DataError
from protocol.federation import Task, TaskKind

Logits = np.ndarray[Any, Any]
Predictions = list[Prediction] | list[FoundAnswer]


@dataclass(frozen=True, slots=True)
class Score:
    """A summed loss; of each target that counts whether it was foretold, and its label."""

    loss_sum: float
    hits: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]

    @property
    def loss(self) -> float:
        """The mean loss of a target."""
        return self.loss_sum / len(self.hits)

    @property
    def accuracy(self) -> float:
        """The share of the targets that was foretold."""
        return float(self.hits.mean())


@dataclass(frozen=True, slots=True)
class Model:
    """A model at its present level, whatever runs it; `length_max` tokens at most, if not None."""

    tokenizer: Tokenizer
    batches: Callable[[Sequence[EncodedRow]], Iterable[Batch]]
    score: Callable[[Batch], Score]
    logits: Callable[[Batch], Logits]
    length_max: int | None = None


class TaskRules(abc.ABC):
    """One kind of task, with one federation's settings for it.

    `has_head` says that the task adds a head to the backbone, which is trained from the start.
    """

    has_head: ClassVar[bool] = True

    def __init__(self, task: Task) -> None:
        self.task = task

    @abc.abstractmethod
    def read(self, row: RawRow, names: FieldNames) -> Example:
        """A row of training or held-out data.

        Raises:
            DataError: a field is missing or malformed.
        """

    def check(self, row: Example, place: Place, names: FieldNames) -> None:
        """Look at an Example that an app has made, which may be wrong as any row may.

        Raises:
            DataError: a field is missing or malformed.
        """
        self.read(RawRow(self.fields_of(row, names), place), names)

    def fields_of(self, row: Example, names: FieldNames) -> dict[str, object]:
        """The fields of the row that an Example would be read from."""
        return {names.text: row.text, names.text_pair: row.text_pair}

    def asked(self, row: object, place: Place, names: FieldNames) -> Example:  # noqa: ARG002
        """What `predict` is given, without its label or answer.

        Raises:
            DataError: it is not what this kind of task predicts from.
            AdapterError: this kind predicts nothing; use `generate`.
        """
        raise self._no_choice()

    @abc.abstractmethod
    def encode(self, row: Example, tokenizer: Tokenizer) -> Sequence[EncodedRow]:
        """Token ids within the task's longest input: one row, or several that share the work.

        Raises:
            DataError: nothing is left to be learned within that length.
        """

    def encode_all(self, rows: Iterable[Example], tokenizer: Tokenizer) -> EncodedRows:
        """The same of many rows.

        Raises:
            DataError: of one nothing is left to be learned; names its file and line.
        """
        return EncodedRows.of(self._encoded(rows, tokenizer))

    def _encoded(self, rows: Iterable[Example], tokenizer: Tokenizer) -> Iterator[EncodedRow]:
        for row in rows:
            try:
                yield from self.encode(row, tokenizer)
            except DataError as error:
                if row.place is None:
                    raise
                raise row.place.error(str(error)) from None

    @abc.abstractmethod
    def targets(self, rows: Sequence[EncodedRow]) -> NDArray[np.int64]:
        """The targets of a batch."""

    def compared(self, logits: Any, targets: Any) -> tuple[Any, Any]:
        """Logits [..., classes] beside the targets [...] that they foretell; torch's or NumPy's."""
        return logits, targets

    def log_shares(self, rows: EncodedRows) -> NDArray[np.float32] | None:  # noqa: ARG002
        """The log of each label's share of some rows, [labels]; None where there are no labels."""
        return None

    @abc.abstractmethod
    def evaluate(self, rows: EncodedRows, model: Model) -> Evaluation:
        """Loss and scores on rows."""

    def predict(self, rows: Sequence[Example], model: Model) -> Predictions:  # noqa: ARG002
        """What is likeliest of each row.

        Raises:
            AdapterError: this kind predicts nothing; use `generate`.
        """
        raise self._no_choice()

    def generate(self, prompt: str, new_tokens_max: int, model: Model) -> str:  # noqa: ARG002
        """The likeliest continuation of a prompt, token by token, as far as the model's input goes.

        Raises:
            DataError: the prompt has no token, or more than the model takes.
            AdapterError: this kind of task continues nothing; use `predict`.
        """
        only = TaskKind.CAUSAL_LM.value
        raise AdapterError(f"generate is for {only}; use predict for {self.task.kind.value}")

    def _no_choice(self) -> AdapterError:
        return AdapterError(f"there is nothing to predict for {self.task.kind.value}; use generate")


def score_of(rows: EncodedRows, model: Model) -> Score:
    """The score of all rows together."""
    scores = [model.score(batch) for batch in model.batches(rows.shortest_first())]
    return Score(
        sum(score.loss_sum for score in scores),
        np.concatenate([score.hits for score in scores]),
        np.concatenate([score.labels for score in scores]),
    )


def cross_entropy(logits: Logits, targets: NDArray[np.int64]) -> NDArray[Any]:
    """The loss [k] of logits [k, classes] at targets [k]."""
    highest = logits.max(-1)
    log_sums = highest + np.log(np.exp(logits - highest[:, None]).sum(-1))
    losses: NDArray[Any] = log_sums - logits[np.arange(len(targets)), targets]
    return losses
