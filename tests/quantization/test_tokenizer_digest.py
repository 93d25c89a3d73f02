"""A tokenizer's digest follows from what it does: from neither its files nor who reads them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import ByT5Tokenizer

from quantization.fingerprint import resolve_backbone
from quantization.tokenizer import digest_of, read_tokenizer
from quantization.tokenizer_digest import digest_of_tokenizers
from tests.quantization.forms import MINILM, OTHER, SAME
from tests.quantization.tiny import write_gpt2

STORIES = Path(__file__).parents[3] / "shared" / "weights" / "stories260K"
Write = Callable[[Path], Path]


def _digest(folder: Path) -> str:
    return digest_of(read_tokenizer(folder))


@pytest.mark.parametrize("write", SAME.values(), ids=SAME)
def test_the_same_tokenizer_in_another_form_has_the_same_digest(
    tmp_path: Path, write: Write
) -> None:
    assert _digest(write(tmp_path / "a")) == _digest(resolve_backbone(MINILM))


@pytest.mark.parametrize("write", OTHER.values(), ids=OTHER)
def test_what_gives_other_ids_has_another_digest(tmp_path: Path, write: Write) -> None:
    assert _digest(write(tmp_path / "a")) != _digest(resolve_backbone(MINILM))


@pytest.mark.parametrize("name", ["minilm", "stories", "gpt2", *OTHER])
def test_the_tokenizers_library_alone_agrees(tmp_path: Path, name: str) -> None:
    """On the file that a compiled artifact has."""
    match name:
        case "minilm":
            folder = resolve_backbone(MINILM)
        case "stories":
            folder = STORIES
        case "gpt2":
            folder = write_gpt2(tmp_path / "a")
        case _:
            folder = OTHER[name](tmp_path / "a")
    if not folder.exists():
        pytest.skip("the stories260K weights are not here")
    tokenizer = read_tokenizer(folder)
    path = str(tmp_path / "tokenizer.json")
    tokenizer("a", truncation=True, max_length=8)  # a file may bring lengths of its own
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.save(path)
    again = digest_of_tokenizers(
        Tokenizer.from_file(path),
        pad_id=tokenizer.pad_token_id,
        end_id=tokenizer.eos_token_id,
        with_types="token_type_ids" in tokenizer.model_input_names,
    )
    assert again == digest_of(tokenizer)


def test_the_order_of_a_byte_pair_vocabularys_merges_counts(tmp_path: Path) -> None:
    """The same tokens; a text is put together from them in another order."""
    path = tmp_path / "tokenizer.json"
    words = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz ")}
    words |= {"th": 27, "he": 28, "<end>": 29}
    found = set()
    for merges in ([["t", "h"], ["h", "e"]], [["h", "e"], ["t", "h"]]):
        model = {"type": "BPE", "vocab": words, "merges": merges}
        path.write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
        tokenizer = Tokenizer.from_file(str(path))
        found.add(digest_of_tokenizers(tokenizer, pad_id=29, end_id=29, with_types=False))
    assert len(found) == 2


def test_a_tokenizer_in_python_has_a_digest_and_asking_says_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its own limit of length is not that of what is asked."""
    with caplog.at_level(logging.WARNING):
        first = digest_of(ByT5Tokenizer(model_max_length=8))
        second = digest_of(ByT5Tokenizer(model_max_length=8, extra_ids=100))
    assert (len(first), first != second, caplog.records) == (64, True, [])
