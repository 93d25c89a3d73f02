"""Rows as token ids, and batches of them padded to their longest row. NumPy alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_client.errors import DataError

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

    def windows(self, question: str, context: str, length_max: int, overlap: int) -> list[Window]:
        """A question with each part of its context in turn; neighbours share `overlap` tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text, without special tokens."""


@dataclass(frozen=True, slots=True)
class Window:
    """A question and a part of its context, as token ids; segments where the model takes any.

    The tokens of the context begin at position `first`; `spans`, [n, 2], has the characters of the
    context that each of them stands for.
    """

    ids: Sequence[int]
    types: Sequence[int] | None
    first: int
    spans: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row's token ids, their segments where the model takes any, and what is to be foretold."""

    ids: tuple[int, ...]
    types: tuple[int, ...] | None
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded rows: `inputs` of shape [b, t] each, `targets` as their kind of task has them; int64.

    `rows` are those that it was made of.
    """

    inputs: dict[str, NDArray[np.int64]]
    targets: NDArray[np.int64]
    rows: tuple[EncodedRow, ...] = ()

    @property
    def weight(self) -> int:
        """How many targets the mean loss is over."""
        return int((self.targets != IGNORED).sum())


def check_ids(
    ids: Sequence[int], embedding_count: int, text: str, name_of: Callable[[int], object]
) -> None:
    """Refuse a token that a model of so many embeddings has none for.

    Raises:
        DataError: naming the token and the text.
    """
    if max(ids, default=0) >= embedding_count:
        raise DataError(
            f"a text holds the token {name_of(max(ids))!r}, for which the backbone has no "
            f"embedding: {text[:40]!r}"
        )


def window_of(
    ids: Sequence[int],
    types: Sequence[int] | None,
    parts: Sequence[int | None],
    offsets: Sequence[tuple[int, int]],
) -> Window:
    """A window as the `tokenizers` library has it: of each token its part and characters there."""
    places = [place for place, part in enumerate(parts) if part == 1]
    spans = np.array([offsets[place] for place in places], np.int32).reshape(-1, 2)
    return Window(ids, types, places[0] if places else 0, spans)


def batch_of(rows: Sequence[EncodedRow], targets: NDArray[np.int64], pad_id: int) -> Batch:
    """Rows padded on the right to the longest of them."""
    inputs = {
        "input_ids": padded([row.ids for row in rows], pad_id),
        "attention_mask": padded([(1,) * len(row.ids) for row in rows], 0),
    }
    if rows[0].types is not None:
        inputs["token_type_ids"] = padded([row.types or () for row in rows], 0)
    return Batch(inputs, targets, tuple(rows))


def padded(rows: Sequence[Sequence[int]], filler: int) -> NDArray[np.int64]:
    """Rows of any lengths as [b, longest]."""
    array = np.full((len(rows), max(map(len, rows))), filler, np.int64)
    for into, row in zip(array, rows, strict=True):
        into[: len(row)] = row
    return array
