"""What an artifact's manifest says, and its strict reading. The standard library alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, Final, TypeVar

from quantization.tasks import TaskKind

FORMAT: Final = 4
MANIFEST: Final = "manifest.json"
GRADIENT_GRAPH: Final = "gradient.onnx"
EVALUATION_GRAPH: Final = "evaluation.onnx"
WEIGHTS: Final = "weights.bin"
TOKENIZER: Final = "tokenizer.json"
FILES: Final = (GRADIENT_GRAPH, EVALUATION_GRAPH, WEIGHTS, TOKENIZER)

_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_Choice = TypeVar("_Choice", bound=Enum)


class ArtifactScheme(Enum):
    """How the frozen linear layers are stored in an artifact. The value is what commands say.

    INT8 has one scale a row; INT4 whole numbers of -7 to 7 in blocks of 32, each with a scale; NF4
    bitsandbytes' own codes, in blocks of 64.
    """

    NONE = "none"
    INT8 = "int8"
    INT4 = "int4"
    NF4 = "nf4"


class EmbeddingScheme(Enum):
    """How embeddings and a head tied to them are stored; INT8 has one scale a row."""

    FLOAT32 = "float32"
    INT8 = "int8"


@dataclass(frozen=True, slots=True)
class AdaptedLayer:
    """A linear layer with both levels of LoRA: its module's name, m and n.

    `transposed` says that the checkpoint stores the weight as [n, m] (PEFT: `fan_in_fan_out`).
    """

    name: str
    outputs: int
    inputs: int
    transposed: bool = False

    def shapes(self, rank: int, personal_rank: int) -> dict[str, tuple[int, int]]:
        """Names and shapes of its four trainable arrays, A to D."""
        return {
            f"{self.name}.A": (rank, self.inputs),
            f"{self.name}.B": (self.outputs, rank),
            f"{self.name}.C": (personal_rank, self.inputs),
            f"{self.name}.D": (self.outputs, personal_rank),
        }


@dataclass(frozen=True, slots=True)
class HeadTensor:
    """A trained tensor of the task's head, by its name in the model."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ArtifactFile:
    """One file beside the manifest."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artifact holds.

    `fingerprint` is the backbone's as every device computes it, whatever its scheme. The layers are
    those that `target_modules` (PEFT's, as settings say it) chose, in the order of their names.
    `head_modules` and `head` are empty for a causal LM. `pad_id` fills batches up, `end_id` ends a
    causal LM's texts; None where the tokenizer has no such token. The graphs have embeddings for
    `embedding_count` token ids and, where positions are in a table, inputs of up to `length_max`
    tokens.
    """

    fingerprint: str
    scheme: ArtifactScheme
    embeddings: EmbeddingScheme
    task: TaskKind
    label_count: int
    target_modules: str | tuple[str, ...]
    layers: tuple[AdaptedLayer, ...]
    head_modules: tuple[str, ...]
    head: tuple[HeadTensor, ...]
    batch_inputs: tuple[str, ...]
    pad_id: int
    end_id: int | None
    embedding_count: int
    length_max: int | None
    files: tuple[ArtifactFile, ...] = ()

    def trainable(self, rank: int = 1, personal_rank: int = 1) -> dict[str, tuple[int, ...]]:
        """Names and shapes of every trainable array, as graph inputs."""
        found: dict[str, tuple[int, ...]] = {}
        for layer in self.layers:
            found |= layer.shapes(rank, personal_rank)
        return found | {tensor.name: tensor.shape for tensor in self.head}


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as it lies in its file."""
    table = asdict(manifest)
    for key in ("scheme", "embeddings", "task"):
        table[key] = table[key].value
    text = json.dumps({"format": FORMAT} | table, indent=1, ensure_ascii=True) + "\n"
    return text.encode("ascii")


def read_manifest(raw: bytes) -> Manifest:
    """The manifest in the bytes of its file.

    Raises:
        ValueError: naming the key and what is wrong with it.
    """
    try:
        plain = json.loads(raw)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    table = _Table(plain, "the manifest")
    if (version := table.take("format", int)) != FORMAT:
        problem = f"format {version} is not known here: this version reads {FORMAT}"
        raise ValueError(f"{problem}; compile it again with pf2lora-client export")
    targets = table.take("target_modules", str | list)
    manifest = Manifest(
        fingerprint=table.digest("fingerprint"),
        scheme=table.choice("scheme", ArtifactScheme),
        embeddings=table.choice("embeddings", EmbeddingScheme),
        task=table.choice("task", TaskKind),
        label_count=table.count("label_count"),
        target_modules=targets if isinstance(targets, str) else _texts(targets, "target_modules"),
        layers=tuple(_layer(one) for one in table.tables("layers")),
        head_modules=_texts(table.take("head_modules", list), "head_modules"),
        head=tuple(_head_tensor(one) for one in table.tables("head")),
        batch_inputs=_texts(table.take("batch_inputs", list), "batch_inputs"),
        pad_id=table.count("pad_id"),
        end_id=table.take("end_id", int | None),
        embedding_count=table.count("embedding_count"),
        length_max=table.take("length_max", int | None),
        files=tuple(_file(one) for one in table.tables("files")),
    )
    table.end()
    if sorted(file.name for file in manifest.files) != sorted(FILES):
        raise ValueError(f"files: must be {', '.join(FILES)}, each once")
    if not manifest.layers:
        raise ValueError("layers: there are none")
    return manifest


def _layer(table: _Table) -> AdaptedLayer:
    layer = AdaptedLayer(
        table.take("name", str),
        table.count("outputs"),
        table.count("inputs"),
        table.take("transposed", bool),
    )
    table.end()
    return layer


def _head_tensor(table: _Table) -> HeadTensor:
    shape = table.take("shape", list)
    if not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"{table.path}.shape: {shape} are not sizes")
    tensor = HeadTensor(table.take("name", str), tuple(shape))
    table.end()
    return tensor


def _file(table: _Table) -> ArtifactFile:
    file = ArtifactFile(table.take("name", str), table.count("size_bytes"), table.digest("sha256"))
    table.end()
    return file


def _texts(items: list[Any], path: str) -> tuple[str, ...]:
    if not all(isinstance(item, str) for item in items) or len(set(items)) != len(items):
        raise ValueError(f"{path}: expected texts, each once")
    return tuple(items)


class _Table:
    """One JSON object: every key taken once and of its type, and none left over."""

    def __init__(self, plain: Any, path: str) -> None:
        if not isinstance(plain, Mapping):
            raise ValueError(f"{path}: expected an object")
        self._rest = dict(plain)
        self.path = path

    def take(self, key: str, kind: Any) -> Any:
        if key not in self._rest:
            raise ValueError(f"{self.path}: {key} is missing")
        value = self._rest.pop(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{self.path}.{key}: {str(value)[:60]!r} is of the wrong type")
        return value

    def count(self, key: str) -> int:
        value: int = self.take(key, int)
        if value < 0:
            raise ValueError(f"{self.path}.{key}: {value} is negative")
        return value

    def digest(self, key: str) -> str:
        value: str = self.take(key, str)
        if not _DIGEST.fullmatch(value):
            raise ValueError(f"{self.path}.{key}: want sha256: and 64 hex digits")
        return value

    def choice(self, key: str, kind: type[_Choice]) -> _Choice:
        value = self.take(key, str)
        try:
            return kind(value)
        except ValueError:
            known = ", ".join(str(member.value) for member in kind)
            raise ValueError(f"{self.path}.{key}: {value!r} is none of {known}") from None

    def tables(self, key: str) -> list[_Table]:
        items: list[Any] = self.take(key, list)
        return [_Table(item, f"{self.path}.{key}[{i}]") for i, item in enumerate(items)]

    def end(self) -> None:
        if self._rest:
            raise ValueError(f"{self.path}: {min(self._rest)!r} is not known here")
