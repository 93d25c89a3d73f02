"""Text to token ids by the tokenizer that transformers has read for a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edge_client.backends.encoding import Window, check_ids, window_of
from edge_client.errors import AdapterError


class TransformersTokenizer:
    """An encoding.Tokenizer on one of transformers, for a model of so many embeddings."""

    def __init__(self, tokenizer: Any, embedding_count: int) -> None:
        self._tokenizer = tokenizer
        self._embedding_count = embedding_count
        self.pad_id: int = tokenizer.pad_token_id
        self.end_id: int | None = tokenizer.eos_token_id

    def encode(
        self, text: str, pair: str | None = None, *, special: bool = True, length_max: int = 0
    ) -> tuple[Sequence[int], Sequence[int] | None]:
        cut = {"truncation": True, "max_length": length_max} if length_max else {}
        encoded = self._tokenizer(text, pair, add_special_tokens=special, **cut)
        ids = encoded["input_ids"]
        self._check(ids, text)
        return ids, encoded.get("token_type_ids")

    def windows(self, question: str, context: str, length_max: int, overlap: int) -> list[Window]:
        if not self._tokenizer.is_fast:
            kind = type(self._tokenizer).__name__
            raise AdapterError(f"{kind} does not say which characters a token stands for")
        encoded = self._tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=length_max,
            stride=overlap,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        types = encoded.get("token_type_ids")
        for ids in encoded["input_ids"]:
            self._check(ids, context)
        return [
            window_of(
                ids,
                None if types is None else types[number],
                encoded.sequence_ids(number),
                encoded["offset_mapping"][number],
            )
            for number, ids in enumerate(encoded["input_ids"])
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _check(self, ids: Sequence[int], text: str) -> None:
        check_ids(ids, self._embedding_count, text, self._tokenizer.convert_ids_to_tokens)
