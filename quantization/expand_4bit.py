"""Weights of four bits as numbers again, on a CPU, in memory that is there already.

bitsandbytes writes into new memory each time, and between two such pieces the C library's heap
keeps holes. Here a byte of two codes is looked up as one pair of numbers, in a table of 256 pairs.
Its kernel also takes the absmax of other blocks where rows are a multiple of 16 weights long and
not of 64 (0.50, with AVX-512).
"""

from __future__ import annotations

from math import ceil, gcd
from typing import Any, Final, cast

import torch
from torch import Tensor

from quantization.rooms import room

BLOCK_SIZE: Final = 64  # weights that share an absmax in NF4 and FP4
NESTED_BLOCK_SIZE: Final = 256  # absmaxes that share one, where they are quantised again
_PIECE: Final = 1 << 18  # weights at a time; a quarter of it takes 1.3 of the time


def rows_together(inputs: int) -> int:
    """How many rows it takes until one begins with a block of its own."""
    return BLOCK_SIZE // gcd(inputs, BLOCK_SIZE)


def pairs_of(table: Tensor) -> Tensor:
    """What each byte stands for, [256]: two float32 of a table of sixteen, as one int64."""
    byte = torch.arange(256)
    return torch.stack([table[byte // 16], table[byte % 16]], dim=1).view(torch.int64).view(-1)


def expand_4bit(codes: Tensor, state: Any, pairs: Tensor, into: Tensor, top: int) -> None:
    """Write the rows from `top` on into `into` [k, n], of a float dtype.

    `codes` is flat, two in a byte, the first in its upper half; `state` is bitsandbytes' QuantState
    of the whole weight; `top` is a multiple of `rows_together(n)`. The product of number and absmax
    is rounded once to float32 and then to the dtype, as bitsandbytes does.
    """
    first, flat = top * into.shape[1], into.view(-1)
    all_places = room("places", _PIECE // 2, torch.int32)
    all_numbers = room("numbers", _PIECE, torch.float32)
    for at in range(0, len(flat), _PIECE):
        piece = flat[at : at + _PIECE]
        begin, end = first + at, first + at + len(piece)
        absmax = _absmax(state, begin // BLOCK_SIZE, ceil(end / BLOCK_SIZE))
        packed = codes[begin // 2 : ceil(end / 2)]
        in_place = into.dtype is torch.float32 and len(piece) % BLOCK_SIZE == 0
        numbers = piece if in_place else all_numbers[: len(absmax) * BLOCK_SIZE]
        places = all_places[: len(packed)].copy_(packed)
        torch.index_select(pairs, 0, places, out=numbers.view(torch.int64)[: len(packed)])
        numbers.view(-1, BLOCK_SIZE).mul_(absmax[:, None])
        if not in_place:
            piece.copy_(numbers[: len(piece)])


def _absmax(state: Any, begin: int, end: int) -> Tensor:
    """The absmaxes of the blocks from `begin` to before `end`."""
    if not state.nested:
        return cast(Tensor, state.absmax[begin:end])
    nested, aligned = state.state2, begin - begin % NESTED_BLOCK_SIZE
    found = torch.ops.bitsandbytes.dequantize_blockwise(
        state.absmax[aligned:end],
        nested.absmax[aligned // NESTED_BLOCK_SIZE : ceil(end / NESTED_BLOCK_SIZE)],
        nested.code,
        NESTED_BLOCK_SIZE,
        nested.dtype,
    )
    return cast(Tensor, found[begin - aligned :] + state.offset)
