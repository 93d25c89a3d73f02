"""A backbone's tokenizer as transformers reads it. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from quantization.errors import BackboneError, brief
from quantization.tokenizer_digest import tokenizer_digest


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, with a token to fill batches up.

    Raises:
        BackboneError: there is none, it cannot be read, or it lacks what every task needs of it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # as many kinds as there are tokenizers
        raise BackboneError(f"{folder}: the tokenizer cannot be read: {brief(error)}") from error
    files = tokenizer.vocab_files_names.values()
    if files and not any((folder / file).is_file() for file in files):
        # transformers makes an empty tokenizer of nothing, without a word.
        raise BackboneError(f"{folder}: the tokenizer has no vocabulary: none of {sorted(files)}")
    tokenizer.truncation_side = "right"  # some would keep a text's end, which other runtimes do not
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BackboneError(f"{folder}: the tokenizer has neither a pad nor an eos token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def digest_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """What `tokenizer_digest` makes of it.

    Raises:
        BackboneError: it does not answer.
    """

    def encode(
        text: str, pair: str | None = None, *, special: bool = True
    ) -> tuple[Sequence[int], Sequence[int] | None]:
        # Longer than a model may take; nothing of it reaches one.
        found = tokenizer(text, pair, add_special_tokens=special, verbose=False)
        return found["input_ids"], found.get("token_type_ids")

    try:
        return tokenizer_digest(
            tokenizer.get_vocab(),
            tokenizer.get_added_vocab(),
            tokenizer.pad_token_id,
            tokenizer.eos_token_id,
            encode,
        )
    except Exception as error:  # as many kinds as there are tokenizers
        kind = type(tokenizer).__name__
        raise BackboneError(f"{kind} cannot be asked what it does: {brief(error)}") from error
