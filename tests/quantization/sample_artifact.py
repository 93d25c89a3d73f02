"""A tiny artifact made without any ONNX library: a layer of 4 to 3, graphs that say enough.

The graphs have the right outline and compute nothing, so that checks can be tested anywhere.
"""

from __future__ import annotations

from pathlib import Path

from quantization.artifact import LOGITS, LOSS, SCALE, gradient_name, loss_inputs, write_manifest
from quantization.manifest import (
    EVALUATION_GRAPH,
    GRADIENT_GRAPH,
    TOKENIZER,
    WEIGHTS,
    AdaptedLayer,
    ArtifactScheme,
    EmbeddingScheme,
    HeadTensor,
    Manifest,
)
from quantization.tasks import TaskKind

SAMPLE = Manifest(
    fingerprint="sha256:" + "0" * 64,
    scheme=ArtifactScheme.INT8,
    embeddings=EmbeddingScheme.FLOAT32,
    task=TaskKind.SEQUENCE_CLASSIFICATION,
    label_count=2,
    target_modules=("query", "value"),
    layers=(AdaptedLayer("bert.query", 3, 4),),
    head_modules=("classifier",),
    head=(HeadTensor("classifier.bias", (2,)), HeadTensor("classifier.weight", (2, 3))),
    batch_inputs=("input_ids", "attention_mask"),
    pad_id=0,
    end_id=None,
    embedding_count=100,
    length_max=32,
)
WEIGHT_BYTES = 64


def number(field: int, value: int) -> bytes:
    """A protobuf field that holds a number."""
    return varint(field << 3) + varint(value)


def message(field: int, *content: bytes | str) -> bytes:
    """A protobuf field that holds bytes, text or a message."""
    data = b"".join(c.encode() if isinstance(c, str) else c for c in content)
    return varint(field << 3 | 2) + varint(len(data)) + data


def varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


def tensor(location: str = WEIGHTS, offset: int = 0, length: int = WEIGHT_BYTES) -> bytes:
    """The content of a TensorProto with external data."""
    pairs = {"location": location, "offset": str(offset), "length": str(length)}
    entries = [message(13, message(1, key), message(2, value)) for key, value in pairs.items()]
    return b"".join([message(8, "weight"), number(14, 1), *entries])


def value(name: str, shape: tuple[int, ...]) -> bytes:
    """The content of a ValueInfoProto; a size of zero is open."""
    sizes = [message(1, number(1, size) if size else message(2, "open")) for size in shape]
    return message(1, name) + message(2, message(1, number(1, 1), message(2, *sizes)))


def graph(inputs: dict[str, tuple[int, ...]], outputs: list[str], *fields: bytes) -> bytes:
    """A ModelProto; `fields` are more fields of its graph."""
    node = message(1, message(4, "Gemm"))
    named = [message(11, value(*item)) for item in inputs.items()] + [
        message(12, message(1, n)) for n in outputs
    ]
    return (
        number(1, 10)
        + message(8, message(1, ""), number(2, 21))
        + message(7, node, *named, *fields)
    )


def sample_inputs() -> dict[str, tuple[int, ...]]:
    """Those of the sample's evaluation graph."""
    batch = dict.fromkeys(SAMPLE.batch_inputs, (0, 0))
    return {**batch, SCALE: (), **SAMPLE.trainable(0, 0)}


def gradient_graph(*fields: bytes) -> bytes:
    """That of the sample."""
    outputs = [LOSS, *map(gradient_name, SAMPLE.trainable())]
    return graph(sample_inputs() | loss_inputs(SAMPLE), outputs, *fields)


def write_sample(folder: Path, gradient: bytes | None = None) -> str:
    """Write the sample, with another gradient graph if one is given; returns its digest."""
    folder.mkdir(exist_ok=True)
    weight = message(5, tensor())
    (folder / GRADIENT_GRAPH).write_bytes(gradient or gradient_graph(weight))
    (folder / EVALUATION_GRAPH).write_bytes(graph(sample_inputs(), [LOGITS], weight))
    (folder / WEIGHTS).write_bytes(bytes(range(WEIGHT_BYTES)))
    (folder / TOKENIZER).write_text("{}")
    return write_manifest(folder, SAMPLE)
