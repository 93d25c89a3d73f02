"""The digest of a backbone's configuration and weights, as they lie before any quantisation.

Needs neither torch nor NumPy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from quantization.errors import BackboneError
from quantization.tensor_file import read_entries

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


def weights_digest(folder: Path) -> str:
    """64 hex digits: the SHA-256 of what makes the backbone in `folder` compute what it does.

    Digested are the configuration less what does not change the backbone (labels, library version,
    cache and output switches), and of each tensor, in the order of names, its name, dtype, shape
    and bytes. How the tensors are spread over safetensors files does not matter. A folder with
    `.bin` weights only is digested file by file, since reading those needs torch.

    Raises:
        BackboneError: configuration or weights are absent or damaged.
    """
    record = {"format": 1, "config": _canonical_config(folder), "weights": sorted(_weights(folder))}
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


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
