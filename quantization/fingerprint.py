"""Where a backbone lies, and the digest that says which one it is. Needs neither torch nor NumPy.

The digest covers the configuration and every weight as they lay in the folder before any
quantisation: devices that hold the same backbone agree on it whatever their scheme or device.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from quantization.errors import BackboneError, MissingExtraError
from quantization.folder_manifest import is_quantized, read_manifest
from quantization.tensor_file import read_entries

_PACKAGE_PREFIX: Final = "package:"
_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_TEXT_FILES: Final = ("*.json", "*.txt", "*.model", "*.jinja")
_HUB_WEIGHT_FILES: Final = "model*.safetensors"
_SAFETENSORS: Final = "model.safetensors"

_VOLATILE_CONFIG_KEYS: Final = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "dtype",
        "finetuning_task",
        "gradient_checkpointing",
        "id2label",
        "label2id",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def resolve_backbone(name: str) -> Path:
    """Return the folder that `name` stands for.

    `name` is a folder; or `package:NAME/sub/folder`, a folder inside an installed Python package
    (found without importing it); or a name on the Hugging Face hub, downloaded if not cached.

    Raises:
        BackboneError: nothing usable is there; the text names what was tried.
        MissingExtraError: a hub name, and huggingface_hub is not installed.
    """
    if name.startswith(_PACKAGE_PREFIX):
        return _with_config(_package_folder(name), name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _with_config(folder, name)
    if not _HUB_NAME.fullmatch(name):
        raise BackboneError(
            f"backbone {name!r}: no such folder, and not a hub name (OWNER/NAME) "
            f"nor a package folder ({_PACKAGE_PREFIX}NAME/sub/folder)"
        )
    return _with_config(_hub_folder(name), name)


def _with_config(folder: Path, name: str) -> Path:
    if not (folder / "config.json").is_file():
        raise BackboneError(f"backbone {name!r}: {folder} has no config.json")
    return folder


def _package_folder(name: str) -> Path:
    package, _, inner = name.removeprefix(_PACKAGE_PREFIX).partition("/")
    # A dotted name would make find_spec import the parent package: only top-level names are taken.
    if not package.isidentifier() or ".." in Path(inner).parts:
        raise BackboneError(f"backbone {name!r}: want {_PACKAGE_PREFIX}NAME/sub/folder")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise BackboneError(f"backbone {name!r}: no Python package {package!r} is installed")
    folders = [Path(place) / inner for place in spec.submodule_search_locations]
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None:
        raise BackboneError(f"backbone {name!r}: package {package!r} has no folder {inner!r}")
    return found


def _hub_folder(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "torch") from error
    try:
        folder = Path(
            snapshot_download(name, allow_patterns=[*_HUB_TEXT_FILES, "model*.safetensors"])
        )
        if not any(folder.glob("model*.safetensors")):
            snapshot_download(name, allow_patterns=["pytorch_model*.bin*"])
    except Exception as error:  # the hub client lets through errors of three libraries
        raise BackboneError(
            f"backbone {name!r}: no folder of that name here, and the Hugging Face hub gave none "
            f"({type(error).__name__}: {error}); give an existing folder, "
            f"{_PACKAGE_PREFIX}NAME/sub/folder, or a hub name that is cached or can be reached"
        ) from error
    return folder


def fingerprint(folder: Path) -> str:
    """Return `sha256:` and 64 hex digits: the digest of the backbone in `folder`.

    Digested are the configuration less what does not change the backbone (labels, library version,
    cache and output switches), and of each tensor, in the order of names, its name, dtype, shape
    and bytes. How the tensors are spread over safetensors files does not matter. A folder with
    `.bin` weights only is digested file by file, since reading those needs torch. A folder written
    by `pf2lora-client quantize` says what it was made from: its fingerprint is that backbone's.

    Raises:
        BackboneError: configuration or weights are absent or damaged.
    """
    if is_quantized(folder):
        return read_manifest(folder).fingerprint
    record = {"format": 1, "config": _canonical_config(folder), "weights": sorted(_weights(folder))}
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _canonical_config(folder: Path) -> dict[str, Any]:
    config = _read_json(folder / "config.json")
    return {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG_KEYS}


def _weights(folder: Path) -> Iterator[tuple[Any, ...]]:
    """Yield a tuple, name first, for every tensor; or for every file of `.bin` weights."""
    shards = _safetensors_files(folder)
    for shard in shards:
        yield from _tensors(shard)
    if not shards:
        files = sorted(folder.glob("pytorch_model*.bin"))
        if not files:
            raise BackboneError(f"{folder}: neither {_SAFETENSORS} nor pytorch_model.bin")
        for file in files:
            with file.open("rb") as stream:
                yield file.name, hashlib.file_digest(stream, "sha256").hexdigest()


def _safetensors_files(folder: Path) -> list[Path]:
    """The files that transformers would read: others may lie beside them (adapters, exports)."""
    index = folder / f"{_SAFETENSORS}.index.json"
    if (folder / _SAFETENSORS).is_file():
        return [folder / _SAFETENSORS]
    if not index.is_file():
        return []
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BackboneError(f"{index}: has no weight_map")
    shards = sorted({folder / str(shard) for shard in weight_map.values()})
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise BackboneError(f"{folder}: {index.name} names files that are absent: {missing}")
    return shards


def _tensors(shard: Path) -> Iterator[tuple[str, str, tuple[int, ...], str]]:
    """Yield name, dtype, shape and digest of each tensor."""
    try:
        with shard.open("rb") as stream:
            for entry in read_entries(stream):
                digest = hashlib.sha256()
                stream.seek(entry.begin)
                for size in entry.pieces():
                    digest.update(stream.read(size))
                yield entry.name, entry.dtype, entry.shape, digest.hexdigest()
    except (OSError, ValueError) as error:
        raise BackboneError(f"{shard}: not a whole safetensors file: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BackboneError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise BackboneError(f"{path}: holds no JSON object")
    return content
