"""Rows as token ids, and batches of them padded to their longest row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from edge_client.data import Example
from edge_client.errors import DataError
from protocol.federation import Task, TaskKind

# torch's cross entropy passes over targets of this value.
IGNORED: Final = -100


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row's token ids, and its target: a label, or a label a token."""

    ids: tuple[int, ...]
    types: tuple[int, ...] | None
    label: int | None
    token_labels: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded rows: `inputs` of shape [b, t] each, `targets` [b], or [b, t] for causal LM."""

    inputs: dict[str, Tensor]
    targets: Tensor

    @property
    def weight(self) -> int:
        """How many targets the mean loss is over."""
        targets = self.targets[:, 1:] if self.targets.dim() == 2 else self.targets
        return int((targets != IGNORED).sum())

    def split(self, rows: int) -> list[Batch]:
        """Parts of at most so many rows, each padded to its own longest; 0 leaves it whole.

        Rows that come in order of their length leave little to pad.
        """
        if rows == 0 or len(self.targets) <= rows:
            return [self]
        cut = {name: torch.split(tensor, rows) for name, tensor in self.inputs.items()}
        parts = []
        for i, targets in enumerate(torch.split(self.targets, rows)):
            longest = int(cut["attention_mask"][i].sum(1).max())
            inputs = {name: tensors[i][:, :longest] for name, tensors in cut.items()}
            parts.append(Batch(inputs, targets[:, :longest] if targets.dim() == 2 else targets))
        return parts


class Encoder:
    """Tokenises rows of one task, and pads them into batches."""

    def __init__(self, tokenizer: Any, task: Task, device: str) -> None:
        self._tokenizer = tokenizer
        self._task = task
        self._device = device

    def rows(self, rows: Sequence[Example]) -> list[EncodedRow]:
        """Token ids, cut to the task's longest input."""
        if self._task.kind is TaskKind.CAUSAL_LM:
            return [self._causal(row) for row in rows]
        return [self._classified(row) for row in rows]

    def batch(self, rows: Sequence[EncodedRow]) -> Batch:
        """Rows padded on the right to the longest of them."""
        longest = max(len(row.ids) for row in rows)
        ids = self._padded([row.ids for row in rows], longest, self._tokenizer.pad_token_id)
        mask = self._padded([(1,) * len(row.ids) for row in rows], longest, 0)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if rows[0].types is not None:
            inputs["token_type_ids"] = self._padded([row.types or () for row in rows], longest, 0)
        if self._task.kind is TaskKind.CAUSAL_LM:
            targets = self._padded([row.token_labels or () for row in rows], longest, IGNORED)
        else:
            labels = [IGNORED if row.label is None else row.label for row in rows]
            targets = torch.tensor(labels, device=self._device)
        return Batch(inputs, targets)

    def _classified(self, row: Example) -> EncodedRow:
        encoded = self._tokenizer(
            row.text, row.text_pair, truncation=True, max_length=self._task.max_length
        )
        types = encoded.get("token_type_ids")
        return EncodedRow(
            tuple(encoded["input_ids"]), tuple(types) if types else None, row.label, None
        )

    def _causal(self, row: Example) -> EncodedRow:
        prompt = tuple(self._tokenizer(row.text)["input_ids"])
        if row.text_pair is None:
            ids, silent = prompt, 0
        else:
            more = self._tokenizer(row.text_pair, add_special_tokens=False)["input_ids"]
            ids, silent = prompt + tuple(more), len(prompt)
        end = self._tokenizer.eos_token_id
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

    def _padded(self, rows: Sequence[Sequence[int]], longest: int, filler: int) -> Tensor:
        padded = [list(row) + [filler] * (longest - len(row)) for row in rows]
        return torch.tensor(padded, device=self._device)
