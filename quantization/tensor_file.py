"""The header of a safetensors file: u64 length, JSON, then the tensors' bytes. Standard library.

Read by hand, because no array type that is at hand without torch knows bfloat16 or the 8-bit
floats, and because a backbone is read tensor by tensor into the memory where it stays.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

PIECE_BYTES: Final = 1 << 20
_HEADER_BYTES_MAX: Final = 100_000_000  # the limit of the format's own library


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies in its file, and what it is (dtypes as the format names them)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def pieces(self) -> Iterator[int]:
        """Sizes of a few bytes each that add up to the tensor's."""
        whole, rest = divmod(self.end - self.begin, PIECE_BYTES)
        yield from [PIECE_BYTES] * whole
        yield rest


def read_entries(stream: BinaryIO) -> list[TensorEntry]:
    """The tensors of a file in the order of their bytes; leaves the stream behind the header.

    Raises:
        ValueError: the header is damaged, or a tensor lies outside the file.
    """
    size = stream.seek(0, 2)
    stream.seek(0)
    start = 8 + int.from_bytes(stream.read(8), "little")
    if start > min(size, _HEADER_BYTES_MAX):
        raise ValueError(f"a header of {start} bytes in a file of {size}")
    try:
        header = json.loads(stream.read(start - 8))
        header.pop("__metadata__", None)
        found = [_entry(name, facts, start) for name, facts in header.items()]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a damaged header: {error!r}") from error
    for entry in found:
        if not start <= entry.begin <= entry.end <= size:
            raise ValueError(f"tensor {entry.name!r} lies outside the file")
    return sorted(found, key=lambda entry: (entry.begin, entry.end))


def _entry(name: str, facts: dict[str, Any], start: int) -> TensorEntry:
    begin, end = facts["data_offsets"]
    shape = tuple(int(side) for side in facts["shape"])
    return TensorEntry(name, str(facts["dtype"]), shape, start + int(begin), start + int(end))
