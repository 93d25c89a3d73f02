"""Four-bit weights are expanded to the numbers that bitsandbytes' codes stand for, bit by bit."""

from typing import Any

import pytest
import torch
from bitsandbytes import functional
from torch import Tensor

from quantization.expand_4bit import expand_4bit, pairs_of, rows_together

# Whole blocks of 64; rows that share blocks; an odd count; several pieces at a time.
SHAPES = [(256, 64), (410, 172), (64, 96), (7, 5), (33, 5000)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_numbers_are_those_that_the_codes_stand_for(shape, quant_type, is_double, dtype):
    torch.manual_seed(0)
    weight = 0.03 * torch.randn(shape)
    weight[0] = 0
    codes, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=is_double, quant_type=quant_type
    )
    wanted = _expanded(codes, state).to(dtype)
    assert (wanted - weight).norm() < 0.15 * weight.norm()
    pairs = pairs_of(functional.get_4bit_type(quant_type, device="cpu"))
    for top in range(0, shape[0], 2 * rows_together(shape[1])):
        found = torch.empty(shape[0] - top, shape[1], dtype=dtype)
        expand_4bit(codes.view(-1), state, pairs, found, top)
        assert torch.equal(found, wanted[top:])


def _expanded(codes: Tensor, state: Any) -> Tensor:
    """By the format: two codes a byte, the first in its upper half, and an absmax for 64.

    bitsandbytes' own CPU kernel takes others where a row is so many sixteens and no sixty-fours.
    """
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    halves = torch.stack([codes.view(-1) >> 4, codes.view(-1) & 15], dim=1).view(-1)
    count = state.shape.numel()
    numbers = state.code[halves[:count].long()] * absmax.repeat_interleave(64)[:count]
    return numbers.view(state.shape)
