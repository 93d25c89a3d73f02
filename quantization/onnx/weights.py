"""The frozen weights of an artifact: stored once, by a scheme, for both graphs.

A linear layer's weight W [m, n] is stored as codes and scales. Each node that uses it gets nodes of
its own that expand it, just before and for that one use, so a step never holds the float weights of
more than a layer or two. Two things would undo that, and are kept from it: a runtime computes
constants once and for all, and it merges equal nodes. So the scale of each use has zero times the
first number of what W is multiplied with added to it: the expansion then depends on this very use,
and cannot come before it. (Where that number is not finite, neither is the product without this.)

Tables of embeddings are looked up row by row, and their rows are int8 too where the artifact says
so: a device that reads much text comes to hold all of a table in memory. A head that is tied to a
table shares its codes.

    int8   W = codes * absmax / 127, one absmax a row: DequantizeLinear
    int4   whole numbers of -7 to 7, blocks of 32 along n, each its scale: DequantizeLinear
    nf4    a table of both numbers of each byte, looked up by Gather, times the absmax of 64

INT8 and NF4 are the codes of this package's torch layers, bit for bit. Everything else is float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from quantization.bnb import int8_codes, nf4_codes, nf4_table
from quantization.expand_4bit import BLOCK_SIZE
from quantization.manifest import WEIGHTS, ArtifactScheme, EmbeddingScheme
from quantization.onnx.editing import Writer, zero_of
from quantization.onnx.forward import Forward

INT4_BLOCK: Final = 32
_INT4_MAX: Final = 7
_ALIGNMENT: Final = 64


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in `weights.bin`: its ONNX type and shape, and where its bytes lie."""

    dtype: int
    shape: tuple[int, ...]
    offset: int
    length: int

    def proto(self, name: str) -> onnx.TensorProto:
        tensor = onnx.TensorProto(
            name=name,
            data_type=self.dtype,
            dims=self.shape,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (
            ("location", WEIGHTS),
            ("offset", str(self.offset)),
            ("length", str(self.length)),
        ):
            tensor.external_data.add(key=key, value=value)
        return tensor


class WeightFile:
    """`weights.bin` while it is written. Equal contents are stored once."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._known: dict[bytes, tuple[int, int]] = {}
        self.tensors: dict[str, StoredTensor] = {}

    def add(self, name: str, array: NDArray[Any], dtype: int = 0, shape: Any = ()) -> str:
        """Store an array; `dtype` and `shape` are given where NumPy's do not say them."""
        data = np.ascontiguousarray(array).data.cast("B") if array.size else memoryview(b"")
        digest = hashlib.sha256(data).digest()
        if digest not in self._known:
            begin = -(-self._stream.tell() // _ALIGNMENT) * _ALIGNMENT
            self._stream.write(b"\0" * (begin - self._stream.tell()))
            self._stream.write(data)
            self._known[digest] = (begin, len(data))
        kind = dtype or helper.np_dtype_to_tensor_dtype(array.dtype)
        self.tensors[name] = StoredTensor(kind, shape or array.shape, *self._known[digest])
        return name


# Writes the nodes that expand a weight; given the name of zero [1], made of this use.
_Expand = Callable[[Writer, str], str]


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """What the graphs need: tensors in the file, and how to expand those that are codes."""

    tensors: Mapping[str, StoredTensor]
    expand: Mapping[str, _Expand]
    tables: frozenset[str]


def store_weights(
    path: Path, forward: Forward, scheme: ArtifactScheme, embeddings: EmbeddingScheme
) -> StoredWeights:
    """Write `weights.bin` with the frozen tensors of a model."""
    expand: dict[str, _Expand] = {}
    tables = forward.embeddings if embeddings is EmbeddingScheme.INT8 else frozenset()
    with path.open("wb") as stream:
        file = WeightFile(stream)
        for name, array in sorted(forward.frozen.items()):
            if name in tables:
                expand[name] = _store_int8(file, name, torch.from_numpy(array))
            elif name in forward.linear and scheme is not ArtifactScheme.NONE:
                expand[name] = _STORE[scheme](file, name, torch.from_numpy(array))
            else:
                file.add(name, array)
    return StoredWeights(file.tensors, expand, tables)


def give_weights(model: onnx.ModelProto, weights: StoredWeights) -> None:
    """Make a graph's weights, inputs until now, tensors of `weights.bin`."""
    graph = model.graph
    writer = Writer("weights.")
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] in weights.tables:
            _look_up(writer, node)
            continue
        for i, name in enumerate(node.input):
            if name in weights.expand:
                other = next(o for o in node.input if o != name)
                node.input[i] = weights.expand[name](writer, zero_of(writer, other))
        writer.nodes.append(node)
    writer.put(graph)
    used = {name for node in graph.node for name in node.input}
    frozen = weights.tensors.keys() | weights.expand.keys()
    inputs = [value for value in graph.input if value.name not in frozen]
    del graph.input[:]
    graph.input.extend(inputs)
    graph.initializer.extend(
        weights.tensors[n].proto(n) for n in sorted(used & weights.tensors.keys())
    )


def _look_up(writer: Writer, node: onnx.NodeProto) -> None:
    """Rows of a table in int8, as float32."""
    table, rows = node.input
    codes = writer.add("Gather", f"{table}.codes", rows, axis=0)
    scales = writer.add("Gather", f"{table}.scales", rows, axis=0)
    scales = writer.add("Unsqueeze", scales, writer.integers(-1))
    numbers = writer.add("Cast", codes, to=TensorProto.FLOAT)
    writer.add("Mul", numbers, scales, output=node.output[0])


def _store_int8(file: WeightFile, name: str, weight: torch.Tensor) -> _Expand:
    codes, absmax = int8_codes(weight)
    stored = file.add(f"{name}.codes", codes.numpy())
    scales = file.add(f"{name}.scales", (absmax / 127).numpy())

    def expand(writer: Writer, zero: str) -> str:
        late = writer.add("Add", scales, zero)
        return writer.add("DequantizeLinear", stored, late, axis=0)

    return expand


def int4_codes(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes [m, n] of -7 to 7 and scales [m, n / 32, rounded up]: the largest of a block is 7."""
    outputs, inputs = weight.shape
    blocks = -(-inputs // INT4_BLOCK)
    padded = np.zeros((outputs, blocks * INT4_BLOCK), np.float32)
    padded[:, :inputs] = weight
    scales = np.abs(padded.reshape(outputs, blocks, INT4_BLOCK)).max(axis=2) / _INT4_MAX
    scales = np.where(scales == 0, 1, scales).astype(np.float32)
    codes = np.rint(padded / np.repeat(scales, INT4_BLOCK, axis=1))
    return codes[:, :inputs].astype(np.int8), scales


def _store_int4(file: WeightFile, name: str, weight: torch.Tensor) -> _Expand:
    codes, scales = int4_codes(weight.numpy())
    nibbles = (codes.reshape(-1) & 15).astype(np.uint8)
    nibbles = np.append(nibbles, np.zeros(nibbles.size % 2, np.uint8))
    packed = nibbles[0::2] | nibbles[1::2] << 4
    stored = file.add(f"{name}.codes", packed, TensorProto.INT4, codes.shape)
    scale = file.add(f"{name}.scales", scales)

    def expand(writer: Writer, zero: str) -> str:
        late = writer.add("Add", scale, zero)
        return writer.add("DequantizeLinear", stored, late, axis=1, block_size=INT4_BLOCK)

    return expand


def _store_nf4(file: WeightFile, name: str, weight: torch.Tensor) -> _Expand:
    codes, absmax = (t.numpy().reshape(-1) for t in nf4_codes(weight))
    padding = absmax.size * BLOCK_SIZE // 2 - codes.size
    stored = file.add(f"{name}.codes", np.append(codes, np.zeros(padding, np.uint8)))
    scales = file.add(f"{name}.scales", absmax.reshape(-1, 1))
    table = nf4_table().numpy()
    # bitsandbytes puts the first of two numbers into the high half of a byte.
    pairs = np.stack([np.repeat(table, 16), np.tile(table, 16)], axis=1)
    count, shape = weight.numel(), tuple(weight.shape)

    def expand(writer: Writer, zero: str) -> str:
        late = writer.add("Add", writer.constant(pairs), zero)
        index = writer.add("Cast", stored, to=TensorProto.INT32)
        numbers = writer.add("Gather", late, index, axis=0)
        rows = writer.add("Reshape", numbers, writer.integers(-1, BLOCK_SIZE))
        found = writer.add("Mul", rows, scales)
        if count % BLOCK_SIZE:
            found = writer.add("Reshape", found, writer.integers(-1))
            found = writer.add("Slice", found, writer.integers(0), writer.integers(count))
        return writer.add("Reshape", found, writer.integers(*shape))

    return expand


_STORE: Final = {
    ArtifactScheme.INT8: _store_int8,
    ArtifactScheme.INT4: _store_int4,
    ArtifactScheme.NF4: _store_nf4,
}
