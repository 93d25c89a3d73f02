"""The same ids as transformers gives, from tokenizer.json alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_client.backends.fast_tokenizer import FastTokenizer
from edge_client.backends.ort import tokenizer_of
from edge_client.errors import DataError
from quantization.artifact import load_artifact
from quantization.errors import ArtifactError
from quantization.tokenizer_digest import with_tokenizer
from tests.ort.cases import STORIES, token_rows


@pytest.mark.parametrize("name", ["minilm-none", "stories-none"])
def test_ids_segments_and_text_are_those_of_transformers(artifacts: Path, name: str) -> None:
    if name == "stories-none" and not STORIES.exists():
        pytest.skip("the stories260K weights are not here")
    artifact = load_artifact(artifacts / name)
    tokenizer = tokenizer_of(artifact)
    of_transformers = artifact.manifest.fingerprint
    assert with_tokenizer(of_transformers, tokenizer.digest) == of_transformers
    recorded = json.loads((artifacts / f"{name}.tokens.json").read_text())
    assert len(recorded) > 300
    for row, wanted in zip(token_rows(), recorded, strict=True):
        ids, types = tokenizer.encode(row["text"], row["pair"], length_max=row["length_max"])
        assert list(ids) == wanted["ids"], row
        assert types == wanted["types"], row
        assert list(tokenizer.encode(row["text"], special=False)[0]) == wanted["plain"], row
        assert tokenizer.decode(ids) == wanted["text"], row


def test_a_token_without_an_embedding_is_refused(artifacts: Path) -> None:
    path = artifacts / "minilm-none" / "tokenizer.json"
    small = FastTokenizer(path, pad_id=0, end_id=None, embedding_count=2100, with_types=True)
    said = r"the token 'film', for which the backbone has no embedding: 'a film'"
    with pytest.raises(DataError, match=said):
        small.encode("a film")
    with pytest.raises(DataError, match="has no embedding"):
        small.windows("a", "film", 16, 4)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: the tokenizer cannot be read"):
        FastTokenizer(path, pad_id=0, end_id=None, embedding_count=9, with_types=False)
