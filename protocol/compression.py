"""Few-bit forms of an update's numbers, tensor by tensor.

    int8, int4   blocks of 256 numbers: a float32 absmax each, then codes; x ~ code * absmax / 127
                 (or 7). int4 packs two codes a byte, each plus 8, the lower half first
    topk         the 1/16 of the numbers that are largest in size: uint32 places, ascending, then
                 float16 values; the others are zero

Sizes follow from the count of numbers alone. What cannot be a value (a place outside the tensor)
decodes to NaN, which no aggregate takes. What an encoding loses is the device's to remember and to
add to its next update (error feedback, Seide et al. 2014, Karimireddy et al. arXiv 1901.09847).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

BLOCK: Final = 256
TOPK_ONE_IN: Final = 16
_LEVELS: Final = {8: 127, 4: 7}

Array = NDArray[np.float32]
Buffer = bytes | bytearray | memoryview


def blocks_of(count: int) -> int:
    """How many blocks so many numbers take."""
    return -(-count // BLOCK)


def quantized_size(count: int, bits: int) -> int:
    """Bytes of so many numbers at 8 or 4 bits."""
    return 4 * blocks_of(count) + -(-count * bits // 8)


def quantize(values: Array, bits: int) -> bytes:
    """Encode a vector at 8 or 4 bits."""
    levels = _LEVELS[bits]
    padded = np.zeros((blocks_of(len(values)), BLOCK), np.float32)
    padded.reshape(-1)[: len(values)] = values
    absmax = np.abs(padded).max(1, initial=0.0).astype(np.float32)
    unit = absmax[:, None] / levels
    with np.errstate(divide="ignore", invalid="ignore"):
        # Where a block is all zeros or not finite the codes do not matter: its absmax tells.
        codes = np.nan_to_num(np.rint(padded / unit)).astype(np.int8).reshape(-1)[: len(values)]
    if bits == 4:
        shifted = np.zeros(len(codes) + len(codes) % 2, np.uint8)
        shifted[: len(codes)] = codes + 8
        codes = (shifted[::2] | (shifted[1::2] << 4)).view(np.int8)
    return b"".join((absmax.tobytes(), codes.tobytes()))


def dequantize(
    data: Buffer, count: int, bits: int, begin: int = 0, end: int | None = None
) -> Array:
    """Of the vector of `count` numbers that `quantize` wrote, nearly, those in `[begin, end)`."""
    end = count if end is None else end
    absmax = np.frombuffer(data, np.float32, blocks_of(count))
    codes_at = 4 * len(absmax)
    if bits == 8:
        codes = np.frombuffer(data, np.int8, end - begin, codes_at + begin).astype(np.float32)
    else:
        first = begin // 2
        packed = np.frombuffer(data, np.uint8, (end + 1) // 2 - first, codes_at + first)
        pairs = np.stack([packed & 15, packed >> 4], 1).reshape(-1)[begin - 2 * first :]
        codes = pairs[: end - begin].astype(np.float32) - 8
    block = begin // BLOCK
    units = np.repeat(absmax[block : blocks_of(end)] / np.float32(_LEVELS[bits]), BLOCK)
    with np.errstate(invalid="ignore"):
        values: Array = codes * units[begin - block * BLOCK :][: end - begin]
    return values


def topk_count(count: int) -> int:
    """How many of so many numbers travel."""
    return -(-count // TOPK_ONE_IN)


def topk_size(count: int) -> int:
    """Bytes of the largest of so many numbers."""
    return 6 * topk_count(count)


def topk(values: Array) -> bytes:
    """Encode the numbers of a vector that are largest in size."""
    kept = topk_count(len(values))
    # Stable, so that the same numbers are chosen everywhere; what is no number first, to be seen.
    sizes = np.nan_to_num(np.abs(values), nan=np.inf)
    places = np.sort(np.argsort(-sizes, kind="stable")[:kept]).astype(np.uint32)
    with np.errstate(over="ignore"):
        return places.tobytes() + values[places].astype(np.float16).tobytes()


def from_topk(data: Buffer, count: int, begin: int = 0, end: int | None = None) -> Array:
    """Of the vector of `count` numbers, zero but for those that travelled, those in `[begin, end)`.

    NaN where a place is outside of the tensor or they are out of order.
    """
    end = count if end is None else end
    kept = topk_count(count)
    places = np.frombuffer(data, np.uint32, kept)
    values = np.frombuffer(data, np.float16, kept, 4 * kept).astype(np.float32)
    if kept and (places.max() >= count or np.any(places[1:] <= places[:-1])):
        return np.full(end - begin, np.nan, np.float32)
    low, high = np.searchsorted(places, (begin, end))
    numbers = np.zeros(end - begin, np.float32)
    numbers[places[low:high] - begin] = values[low:high]
    return numbers
