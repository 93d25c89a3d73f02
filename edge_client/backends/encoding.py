"""Rows as token ids, and batches of them padded to their longest row. NumPy alone."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from edge_client.errors import DataError
from quantization.tasks import IGNORED

Numbers = Sequence[int] | NDArray[Any]

# So many characters for each token that is wanted: of nearly any text enough at once.
_CHARACTERS_A_TOKEN: Final = 64
# WordPiece has one token for a longer word, and many for what is left of one that is cut.
_WORD_MAX: Final = 100


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


@dataclass(frozen=True, slots=True, eq=False)
class EncodedRow:
    """One row's token ids, and their segments where the model takes any.

    `targets` says what is to be foretold, in as many numbers as the kind of task takes for any row;
    `part` is what it keeps of the row beside, to score it by.
    """

    ids: Numbers
    types: Numbers | None
    targets: Numbers
    part: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class EncodedRows(Sequence[EncodedRow]):
    """Many rows in few arrays; a row is made when it is asked for, of views.

    `ids` and `types` are those of all rows, [t]; a row's lie from its place in `begins`, [n], to
    that in `ends`. `targets` is [n, k].
    """

    ids: NDArray[np.int32]
    types: NDArray[np.int8] | None
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    targets: NDArray[np.int32]
    parts: Sequence[Any]

    @classmethod
    def of(cls, rows: Iterable[EncodedRow]) -> EncodedRows:
        """Take in rows one by one; none is kept as it was."""
        ids, types, ends, targets = array("i"), array("b"), array("q", [0]), array("i")
        parts = []
        for row in rows:
            ids.extend(row.ids)
            types.extend(() if row.types is None else row.types)
            targets.extend(row.targets)
            parts.append(row.part)
            ends.append(len(ids))
        places = np.frombuffer(ends, np.int64)
        return cls(
            np.frombuffer(ids, np.int32),
            np.frombuffer(types, np.int8) if types else None,
            places[:-1],
            places[1:],
            np.frombuffer(targets, np.int32).reshape(len(parts), -1 if parts else 0),
            parts if any(part is not None for part in parts) else (),
        )

    def taken(self, order: NDArray[np.int64]) -> EncodedRows:
        """The rows of these numbers, in this order."""
        parts = [self.parts[number] for number in order] if self.parts else ()
        begins, ends = self.begins[order], self.ends[order]
        return EncodedRows(self.ids, self.types, begins, ends, self.targets[order], parts)

    def shortest_first(self) -> EncodedRows:
        """Which leaves little to pad."""
        return self.taken(np.argsort(self.ends - self.begins, kind="stable"))

    def __len__(self) -> int:
        return len(self.begins)

    @overload
    def __getitem__(self, number: int) -> EncodedRow: ...

    @overload
    def __getitem__(self, number: slice) -> EncodedRows: ...

    def __getitem__(self, number: int | slice) -> EncodedRow | EncodedRows:
        if isinstance(number, slice):
            return self.taken(np.arange(len(self))[number])
        own = slice(self.begins[number], self.ends[number])
        return EncodedRow(
            self.ids[own],
            None if self.types is None else self.types[own],
            self.targets[number],
            self.parts[number] if self.parts else None,
        )


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


def beginning(text: str, tokenizer: Tokenizer, tokens_max: int) -> str:
    """A text, or of a long one as much as its first `tokens_max` tokens are made of.

    A tokenizer takes hundreds of bytes for every token, also for those that are cut off then. Of
    two such texts cut to one length, the odd token may go to the other one than without this.
    """
    size, enough = _CHARACTERS_A_TOKEN * tokens_max, 2 * tokens_max + _WORD_MAX
    while size < len(text):
        try:
            ids, _ = tokenizer.encode(text[:size], special=False, length_max=enough)
        except DataError:  # if what is wrong is not cut off, it will be met again
            return text[:size]
        if len(ids) >= enough:  # of which the last may be of a word that is cut
            return text[:size]
        size *= 4
    return text


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
    ids = padded([row.ids for row in rows], pad_id)
    lengths = np.array([len(row.ids) for row in rows])
    mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if rows[0].types is not None:
        inputs["token_type_ids"] = padded([row.types for row in rows if row.types is not None], 0)
    return Batch(inputs, targets, tuple(rows))


def padded(rows: Sequence[Numbers], filler: int) -> NDArray[np.int64]:
    """Rows of any lengths as [b, longest]."""
    found = np.full((len(rows), max(map(len, rows))), filler, np.int64)
    for into, row in zip(found, rows, strict=True):
        into[: len(row)] = row
    return found
