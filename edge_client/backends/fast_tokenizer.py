"""Text to token ids by the `tokenizers` library alone, from an artifact's tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_client.backends.encoding import Window, check_ids, window_of
from edge_client.errors import MissingExtraError
from quantization.errors import ArtifactError
from quantization.tokenizer_digest import digest_of_tokenizers


class FastTokenizer:
    """An encoding.Tokenizer on one tokenizer.json, for a model of so many embeddings.

    `with_types` says that the model takes segments; `digest` is tokenizer_digest's.

    Raises:
        ArtifactError: the file is not one that the library reads.
        MissingExtraError: the library is not installed.
    """

    def __init__(
        self,
        path: Path,
        *,
        pad_id: int,
        end_id: int | None,
        embedding_count: int,
        with_types: bool,
    ) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingExtraError("tokenizers", "ort") from error
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ArtifactError(f"{path}: the tokenizer cannot be read: {error}") from error
        # A file may bring lengths of its own; here the task decides, and batches are padded later.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._embedding_count = embedding_count
        self._with_types = with_types
        self.pad_id = pad_id
        self.end_id = end_id
        self.digest = digest_of_tokenizers(
            self._tokenizer, pad_id=pad_id, end_id=end_id, with_types=with_types
        )

    def encode(
        self, text: str, pair: str | None = None, *, special: bool = True, length_max: int = 0
    ) -> tuple[Sequence[int], Sequence[int] | None]:
        if length_max:
            self._tokenizer.enable_truncation(length_max, strategy="longest_first")
        else:
            self._tokenizer.no_truncation()
        # An empty second text is none, as transformers has it.
        encoded = self._tokenizer.encode(text, pair or None, add_special_tokens=special)
        self._check(encoded.ids, text)
        return encoded.ids, encoded.type_ids if self._with_types else None

    def windows(self, question: str, context: str, length_max: int, overlap: int) -> list[Window]:
        self._tokenizer.enable_truncation(length_max, stride=overlap, strategy="only_second")
        first = self._tokenizer.encode(question, context)
        found = [first, *first.overflowing]
        for one in found:
            self._check(one.ids, context)
        return [
            window_of(
                one.ids,
                one.type_ids if self._with_types else None,
                one.sequence_ids,
                one.offsets,
            )
            for one in found
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _check(self, ids: Sequence[int], text: str) -> None:
        check_ids(ids, self._embedding_count, text, self._tokenizer.id_to_token)
