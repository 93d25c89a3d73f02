"""What a quantised folder says of itself, and whether its files are whole. Standard library alone.

`pf2lora-client quantize` writes beside the quantised weights `quantized.json`: the scheme, the
fingerprint of the backbone before quantisation, and size and SHA-256 of every other file. It cannot
say who made the folder: get it from someone you trust, as you would the backbone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from quantization.errors import BackboneError, SchemeError
from quantization.schemes import Scheme
from quantization.tasks import TaskKind

MANIFEST: Final = "quantized.json"
_FORMAT: Final = "pf2lora-quantized-2"
_MANIFEST_BYTES_MAX: Final = 16 << 20
# What a loader might read: none of these may lie in a folder unannounced.
_READABLE_SUFFIXES: Final = frozenset(
    {".bin", ".jinja", ".json", ".model", ".py", ".safetensors", ".txt"}
)


@dataclass(frozen=True, slots=True)
class FileFacts:
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class FolderManifest:
    """A quantised folder.

    `shared` maps the names of tensors that are tied to another to that one, which is stored;
    `weights` and `texts` are the files, by name.
    """

    scheme: Scheme
    int8_embeddings: bool
    fingerprint: str
    tasks: tuple[TaskKind, ...]
    shared: Mapping[str, str]
    weights: Mapping[str, FileFacts]
    texts: Mapping[str, FileFacts]


def is_quantized(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def file_facts(path: Path) -> FileFacts:
    with path.open("rb") as stream:
        return FileFacts(path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())


def write_manifest(folder: Path, manifest: FolderManifest) -> None:
    content = asdict(manifest) | {
        "format": _FORMAT,
        "scheme": manifest.scheme.value,
        "tasks": [task.value for task in manifest.tasks],
    }
    content["digest"] = _digest(content)
    (folder / MANIFEST).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def read_manifest(folder: Path) -> FolderManifest:
    """The manifest of a quantised folder; the other files are not looked at.

    Raises:
        BackboneError: it is damaged, or of a format that this version does not know.
    """
    path = folder / MANIFEST
    try:
        with path.open("rb") as stream:
            content = json.loads(stream.read(_MANIFEST_BYTES_MAX))
        found = content.pop("format")
        if found != _FORMAT:
            problem = f"{path}: format {found!r}; this version reads {_FORMAT!r}"
            raise BackboneError(f"{problem}: make the folder again with pf2lora-client quantize")
        if content.pop("digest") != _digest(content | {"format": found}):
            raise BackboneError(f"{path}: damaged or edited: its digest does not fit it")
        return FolderManifest(
            Scheme.parse(content.pop("scheme")),
            tasks=tuple(TaskKind(task) for task in content.pop("tasks")),
            weights=_files(content.pop("weights")),
            texts=_files(content.pop("texts")),
            **content,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SchemeError) as error:
        raise BackboneError(f"{path}: no manifest of a quantised folder: {error}") from error


def check_texts(folder: Path, manifest: FolderManifest) -> None:
    """Refuse a folder whose configuration or tokenizer is not what was written.

    Raises:
        BackboneError: naming the file that is absent, foreign, truncated or damaged.
    """
    for name, facts in manifest.texts.items():
        check_size(folder / name, facts)
        if file_facts(folder / name) != facts:
            raise BackboneError(f"{folder / name}: damaged or replaced: not the digest it was")
    known = {MANIFEST, *manifest.weights, *manifest.texts}
    for path in sorted(folder.iterdir()):
        if path.suffix in _READABLE_SUFFIXES and path.name not in known:
            raise BackboneError(f"{path}: is not of this quantised folder; take it out")


def check_size(path: Path, facts: FileFacts) -> None:
    if not path.is_file():
        raise BackboneError(f"{path}: is absent; {MANIFEST} lists it")
    if (size_bytes := path.stat().st_size) != facts.size_bytes:
        raise BackboneError(
            f"{path}: truncated or replaced: {size_bytes} bytes, not {facts.size_bytes}"
        )


def _files(content: Mapping[str, Mapping[str, Any]]) -> dict[str, FileFacts]:
    files = {name: FileFacts(**facts) for name, facts in content.items()}
    for name in files:
        if Path(name).name != name:
            raise ValueError(f"names a file outside the folder: {name!r}")
    return files


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in content.items() if k != "digest"}, sort_keys=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
