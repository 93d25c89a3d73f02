"""Named tensors in one flat little-endian buffer.

A bundle of tensors is a list of specs and one buffer in which the tensors follow one another in the
order of the specs, C-contiguous, little-endian, without padding. bfloat16 is not a NumPy type: here
it is the upper half of a float32, rounded to nearest even, and travels unharmed.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from protocol import compression, limits
from protocol.federation import WireDtype
from protocol.scalars import Blob, Integer, SchemaError, Text
from protocol.schema import Items

Array = NDArray[np.float32]
Buffer = bytes | bytearray | memoryview
Digest = Annotated[bytes, Blob(32, 32)]

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("pf2lora runs on little-endian machines only")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, element type and shape of one tensor."""

    name: Annotated[str, Text(limits.TENSOR_NAME_BYTES_MAX, 1)]
    dtype: WireDtype
    shape: Annotated[
        tuple[Annotated[int, Integer(1, limits.TENSOR_SIDE_MAX)], ...],
        Items(limits.TENSOR_DIMENSIONS_MAX),
    ]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.dtype.bytes_of(self.count)


@dataclass(frozen=True, slots=True)
class Payload:
    """What is known of a bundle before its bytes have come: specs, size and digest."""

    digest: Digest
    size_bytes: Annotated[int, Integer(0, limits.PAYLOAD_BYTES_MAX)]
    tensors: Annotated[tuple[TensorSpec, ...], Items(limits.TENSORS_MAX)]

    def __post_init__(self) -> None:
        size = sum(spec.size_bytes for spec in self.tensors)
        if size != self.size_bytes:
            raise SchemaError("size_bytes", f"the tensors take {size} bytes, not {self.size_bytes}")
        if len({spec.name for spec in self.tensors}) != len(self.tensors):
            raise SchemaError("tensors", "two tensors have the same name")


@dataclass(frozen=True, slots=True)
class NamedTensors:
    """Specs and their buffer; immutable, and identified by `digest`."""

    specs: tuple[TensorSpec, ...]
    buffer: Buffer
    # Hashed once, however often it is asked for: a payload of a megabyte takes half a millisecond.
    _digest: bytes | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        size = sum(spec.size_bytes for spec in self.specs)
        if size != len(self.buffer):
            raise ValueError(f"the specs take {size} bytes, the buffer has {len(self.buffer)}")

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, Array], dtype: WireDtype = WireDtype.FLOAT32
    ) -> NamedTensors:
        """Bundle float32 arrays of any shape, in the mapping's order, as `dtype`."""
        specs = tuple(TensorSpec(name, dtype, array.shape) for name, array in arrays.items())
        return cls(specs, b"".join(_encode(array, dtype) for array in arrays.values()))

    @classmethod
    def from_flat(
        cls, like: Iterable[TensorSpec], flat: Array, dtype: WireDtype = WireDtype.FLOAT32
    ) -> NamedTensors:
        """Bundle one float32 vector `[P]` under the names and shapes of `like`."""
        specs = tuple(TensorSpec(spec.name, dtype, spec.shape) for spec in like)
        if dtype.is_plain:
            return cls(specs, _encode(flat, dtype))
        ends = np.cumsum([spec.count for spec in specs])[:-1]
        return cls(specs, b"".join(_encode(part, dtype) for part in np.split(flat, ends)))

    def cast(self, dtype: WireDtype) -> NamedTensors:
        """The same tensors as another type; themselves where they are of it."""
        if all(spec.dtype is dtype for spec in self.specs):
            return self
        return NamedTensors.from_arrays(self.arrays(), dtype)

    def flat(self) -> Array:
        """All elements as one float32 vector `[P]`, in order; a view where nothing changes."""
        dtypes = {spec.dtype for spec in self.specs}
        if len(dtypes) == 1 and (dtype := dtypes.pop()).is_plain:
            return decoded(self.buffer, dtype, sum(spec.count for spec in self.specs))
        parts = [array.reshape(-1) for array in self.arrays().values()]
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    def arrays(self) -> dict[str, Array]:
        """The tensors by name as float32 arrays of their shapes."""
        view, offset, found = memoryview(self.buffer), 0, {}
        for spec in self.specs:
            data = view[offset : offset + spec.size_bytes]
            found[spec.name] = decoded(data, spec.dtype, spec.count).reshape(spec.shape)
            offset += spec.size_bytes
        return found

    def digest(self) -> bytes:
        """SHA-256 over the specs and the buffer, 32 bytes."""
        if self._digest is None:
            hasher = specs_hasher(self.specs)
            hasher.update(self.buffer)
            object.__setattr__(self, "_digest", hasher.digest())
        return self._digest  # type: ignore[return-value]  # set above

    def payload(self) -> Payload:
        """The description that goes ahead of the bytes."""
        return Payload(self.digest(), len(self.buffer), self.specs)


def truncated(tensors: NamedTensors, rank: int) -> NamedTensors:
    """The first `rank` rows of every A and columns of every B; other tensors whole."""
    return NamedTensors.from_arrays(
        {name: array[rank_corner(name, rank)] for name, array in tensors.arrays().items()},
        tensors.specs[0].dtype if tensors.specs else WireDtype.FLOAT32,
    )


def rank_corner(name: str, rank: int) -> tuple[slice, ...]:
    """The part of the tensor `name` that an adapter of rank `rank` has."""
    if name.endswith(".A"):
        return (slice(rank),)
    return (slice(None), slice(rank)) if name.endswith(".B") else ()


def specs_hasher(specs: Iterable[TensorSpec]) -> hashlib._Hash:
    """A SHA-256 that has taken in the specs and waits for the buffer's bytes."""
    hasher = hashlib.sha256()
    for spec in specs:
        shape = ",".join(map(str, spec.shape))
        # Names may hold any character, so their length goes first: no two lists hash alike.
        line = f"{len(spec.name.encode())}:{spec.name}:{spec.dtype.value}:{shape}\n"
        hasher.update(line.encode())
    hasher.update(b"\n")
    return hasher


def _encode(array: Array, dtype: WireDtype) -> bytes:
    values = np.ascontiguousarray(array, dtype=np.float32)
    match dtype:
        case WireDtype.FLOAT32:
            return values.tobytes()
        case WireDtype.FLOAT16:
            with np.errstate(over="ignore"):
                return values.astype(np.float16).tobytes()
        case WireDtype.BFLOAT16:
            return _bfloat16_from_float32(values).tobytes()
        case WireDtype.INT8:
            return compression.quantize(values.reshape(-1), 8)
        case WireDtype.INT4:
            return compression.quantize(values.reshape(-1), 4)
        case WireDtype.TOPK:
            return compression.topk(values.reshape(-1))


@dataclass(frozen=True, slots=True)
class Stretch:
    """Numbers `[begin, end)` of one tensor, whose bytes are at `offset` of the bundle's buffer."""

    spec: TensorSpec
    offset: int
    begin: int
    end: int

    def decoded(self, data: Buffer) -> Array:
        """These numbers as float32, from the bytes of the whole tensor."""
        return decoded(data, self.spec.dtype, self.spec.count, self.begin, self.end)


def stretches(specs: Iterable[TensorSpec], begin: int, end: int) -> list[Stretch]:
    """Where the numbers `[begin, end)` of a bundle's flat vector are."""
    found, first, offset = [], 0, 0
    for spec in specs:
        low, high = max(begin - first, 0), min(end - first, spec.count)
        if low < high:
            found.append(Stretch(spec, offset, low, high))
        first, offset = first + spec.count, offset + spec.size_bytes
    return found


def decoded(
    data: Buffer, dtype: WireDtype, count: int, begin: int = 0, end: int | None = None
) -> Array:
    """Of the `count` numbers in these bytes those in `[begin, end)`, as a float32 vector."""
    match dtype:
        case WireDtype.FLOAT32:
            return np.frombuffer(data, np.float32)[begin:end]
        case WireDtype.FLOAT16:
            return np.frombuffer(data, np.float16)[begin:end].astype(np.float32)
        case WireDtype.BFLOAT16:
            halves = np.frombuffer(data, np.uint16)[begin:end]
            return (halves.astype(np.uint32) << 16).view(np.float32)
        case WireDtype.INT8:
            return compression.dequantize(data, count, 8, begin, end)
        case WireDtype.INT4:
            return compression.dequantize(data, count, 4, begin, end)
        case WireDtype.TOPK:
            return compression.from_topk(data, count, begin, end)


def _bfloat16_from_float32(values: Array) -> NDArray[np.uint16]:
    bits = values.reshape(-1).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    # Rounding a NaN's payload up could carry it into infinity: keep it a quiet NaN instead.
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)
