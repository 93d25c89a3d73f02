"""Encoded rows as batches, of the sizes that training and evaluation have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

from edge_client.backends.encoding import Batch, EncodedRow, Tokenizer, batch_of
from edge_client.splits import batch_indices
from edge_client.tasks.base import TaskRules
from protocol.federation import Training


class Batches:
    """The batches of a federation's devices; of an evaluation `evaluated_max` rows at most."""

    def __init__(
        self, training: Training, rules: TaskRules, tokenizer: Tokenizer, evaluated_max: int
    ) -> None:
        self._training = training
        self._rules = rules
        self._tokenizer = tokenizer
        self._evaluated_max = evaluated_max

    def of(self, rows: Sequence[EncodedRow]) -> Batch:
        """Rows padded to the longest of them, with their targets."""
        rows = list(rows)  # a row of many is made anew each time that it is asked for
        return batch_of(rows, self._rules.targets(rows), self._tokenizer.pad_id)

    def to_train(self, rows: Sequence[EncodedRow], first: int, seed: int) -> Iterator[Batch]:
        """The stream of the device of this seed from the first-th on, without end."""
        for number in count(first):
            indices = batch_indices(len(rows), self._training.batch_size, number, seed)
            chosen = [rows[i] for i in indices]
            if self._training.micro_batch_size:
                chosen.sort(key=lambda row: len(row.ids))  # so that parts are padded little
            yield self.of(chosen)

    def to_evaluate(self, rows: Sequence[EncodedRow]) -> Iterator[Batch]:
        """All rows in their order."""
        size = self._evaluated_max
        if not self._rules.has_head:
            # Logits of a whole vocabulary at each token: no more of them than training holds.
            size = min(size, self._training.micro_batch_size or self._training.batch_size)
        return self._cut(rows, size)

    def parts(self, batch: Batch) -> list[Batch]:
        """Parts of at most so many rows as are worked through at a time.

        Each is padded to its own longest: rows that come in order of their length leave little.
        """
        size = self._training.micro_batch_size
        is_whole = not 0 < size < len(batch.rows)
        return [batch] if is_whole else list(self._cut(batch.rows, size))

    def _cut(self, rows: Sequence[EncodedRow], size: int) -> Iterator[Batch]:
        return (self.of(rows[at : at + size]) for at in range(0, len(rows), size))
