"""Rows as token ids, and batches of them padded to their longest row. NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_client.data import Example
from edge_client.errors import DataError
from protocol.federation import Task, TaskKind

# torch's cross entropy passes over targets of this value, and so does everything here.
IGNORED: Final = -100


class Tokenizer(Protocol):
    """Text to token ids and back: of transformers, or of the tokenizers library alone."""

    pad_id: int
    end_id: int | None

    def encode(
        self, text: str, pair: str | None = None, *, special: bool = True, length_max: int = 0
    ) -> tuple[Sequence[int], Sequence[int] | None]:
        """Ids, and the segment of each where the model asks for it.

        Cut to `length_max`, the longer text first; 0 does not cut. `special` adds the tokens that
        the model wants around a text.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text, without special tokens."""


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row's token ids, and its target: a label, or a label a token."""

    ids: tuple[int, ...]
    types: tuple[int, ...] | None
    label: int | None
    token_labels: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded rows: `inputs` of shape [b, t] each, `targets` [b], or [b, t] for causal LM; int64."""

    inputs: dict[str, NDArray[np.int64]]
    targets: NDArray[np.int64]

    @property
    def weight(self) -> int:
        """How many targets the mean loss is over."""
        targets = self.targets[:, 1:] if self.targets.ndim == 2 else self.targets
        return int((targets != IGNORED).sum())

    def split(self, rows: int) -> list[Batch]:
        """Parts of at most so many rows, each padded to its own longest; 0 leaves it whole.

        Rows that come in order of their length leave little to pad.
        """
        if rows == 0 or len(self.targets) <= rows:
            return [self]
        parts = []
        for at in range(0, len(self.targets), rows):
            inputs = {name: array[at : at + rows] for name, array in self.inputs.items()}
            longest = int(inputs["attention_mask"].sum(1).max())
            targets = self.targets[at : at + rows, ...]
            parts.append(
                Batch(
                    {name: array[:, :longest] for name, array in inputs.items()},
                    targets[:, :longest] if targets.ndim == 2 else targets,
                )
            )
        return parts


class Encoder:
    """Tokenises rows of one task, and pads them into batches."""

    def __init__(self, tokenizer: Tokenizer, task: Task) -> None:
        self._tokenizer = tokenizer
        self._task = task

    def rows(self, rows: Sequence[Example]) -> list[EncodedRow]:
        """Token ids, cut to the task's longest input."""
        if self._task.kind is TaskKind.CAUSAL_LM:
            return [self._causal(row) for row in rows]
        return [self._classified(row) for row in rows]

    def batch(self, rows: Sequence[EncodedRow]) -> Batch:
        """Rows padded on the right to the longest of them."""
        inputs = {
            "input_ids": _padded([row.ids for row in rows], self._tokenizer.pad_id),
            "attention_mask": _padded([(1,) * len(row.ids) for row in rows], 0),
        }
        if rows[0].types is not None:
            inputs["token_type_ids"] = _padded([row.types or () for row in rows], 0)
        if self._task.kind is TaskKind.CAUSAL_LM:
            targets = _padded([row.token_labels or () for row in rows], IGNORED)
        else:
            labels = [IGNORED if row.label is None else row.label for row in rows]
            targets = np.array(labels, np.int64)
        return Batch(inputs, targets)

    def _classified(self, row: Example) -> EncodedRow:
        ids, types = self._tokenizer.encode(
            row.text, row.text_pair, length_max=self._task.max_length
        )
        if not ids:
            raise DataError(f"a text leaves no token: {row.text[:40]!r}")
        return EncodedRow(tuple(ids), tuple(types) if types else None, row.label, None)

    def _causal(self, row: Example) -> EncodedRow:
        prompt = tuple(self._tokenizer.encode(row.text)[0])
        if row.text_pair is None:
            ids, silent = prompt, 0
        else:
            more, _ = self._tokenizer.encode(row.text_pair, special=False)
            ids, silent = prompt + tuple(more), len(prompt)
        end = self._tokenizer.end_id
        ids = (ids + ((end,) if end is not None and ids[-1:] != (end,) else ()))[
            : self._task.max_length
        ]
        # The first token is never foretold; a prompt's tokens are, but do not count.
        counted = ids[max(silent, 1) :]
        if not counted:
            raise DataError(
                f"a text leaves no token to learn within max_length {self._task.max_length}: "
                f"{row.text[:40]!r}"
            )
        return EncodedRow(ids, None, None, (IGNORED,) * (len(ids) - len(counted)) + counted)


def _padded(rows: Sequence[Sequence[int]], filler: int) -> NDArray[np.int64]:
    padded = np.full((len(rows), max(map(len, rows))), filler, np.int64)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return padded
