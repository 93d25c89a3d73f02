"""Causal LM: texts to continue. A second text is what follows the first, and alone carries loss."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_client.backends.base import Evaluation
from edge_client.backends.encoding import (
    Batch,
    EncodedRow,
    EncodedRows,
    Tokenizer,
    beginning,
    padded,
)
from edge_client.data import Example, FieldNames, RawRow
from edge_client.errors import DataError
from edge_client.tasks.base import Model, TaskRules, score_of
from quantization.tasks import IGNORED

# Beyond it the perplexity is no float.
_LOSS_MAX: Final = math.log(sys.float_info.max)


class CausalLM(TaskRules):
    """Targets [b, t] are the tokens themselves, logits [b, t, vocabulary] of the one after each.

    An encoded row's target is the place of the first token that counts.
    """

    has_head = False

    def read(self, row: RawRow, names: FieldNames) -> Example:
        text, pair = row.text(names.text), row.optional_text(names.text_pair)
        return Example(text, pair, None, place=row.place)

    def encode(self, row: Example, tokenizer: Tokenizer) -> Sequence[EncodedRow]:
        length = self.task.max_length
        ids, silent = list(tokenizer.encode(beginning(row.text, tokenizer, length))[0]), 0
        if row.text_pair is not None:
            silent = len(ids)
            ids += tokenizer.encode(beginning(row.text_pair, tokenizer, length), special=False)[0]
        end = tokenizer.end_id
        ids += [end] if end is not None and ids[-1:] != [end] else []
        ids = ids[:length]
        # The first token is never foretold; a prompt's tokens are, but do not count.
        begin = max(silent, 1)
        if begin >= len(ids):
            why = "" if row.text_pair is None else ", for its prompt takes all of it"
            raise DataError(
                f"a text leaves no token to learn within max_length {length}{why}: "
                f"{row.text[:40]!r}"
            )
        return [EncodedRow(ids, None, (begin,))]

    def targets(self, rows: Sequence[EncodedRow]) -> NDArray[np.int64]:
        found = padded([row.ids for row in rows], IGNORED)
        begins = np.array([row.targets[0] for row in rows])
        found[np.arange(found.shape[1]) < begins[:, None]] = IGNORED
        return found

    def compared(self, logits: Any, targets: Any) -> tuple[Any, Any]:
        return logits[:, :-1], targets[:, 1:]

    def evaluate(self, rows: EncodedRows, model: Model) -> Evaluation:
        whole = score_of(rows, model)
        perplexity = math.inf if whole.loss > _LOSS_MAX else math.exp(whole.loss)
        return Evaluation(len(rows), whole.loss, whole.accuracy, perplexity=perplexity)

    def generate(self, prompt: str, new_tokens_max: int, model: Model) -> str:
        ids = list(model.tokenizer.encode(prompt)[0])
        begin, length_max = len(ids), model.length_max or len(ids) + new_tokens_max
        if not ids:
            raise DataError(f"a prompt has no token: {prompt!r}")
        if begin > length_max:
            raise DataError(f"a prompt has {begin} tokens, and the model takes {length_max}")
        for _ in range(min(new_tokens_max, length_max - begin + 1)):
            row = np.array([ids], np.int64)
            batch = Batch({"input_ids": row, "attention_mask": np.ones_like(row)}, row)
            ids.append(int(model.logits(batch)[0, -1].argmax()))
            if ids[-1] == model.tokenizer.end_id:
                break
        return model.tokenizer.decode(ids[begin:])
