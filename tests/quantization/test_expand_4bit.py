"""Four-bit weights are expanded to bitsandbytes' numbers, bit by bit."""

import pytest
import torch
from bitsandbytes import functional

from quantization.expand_4bit import expand_4bit, pairs_of, rows_together

# Whole blocks of 64; rows that share blocks; an odd count; several pieces at a time.
SHAPES = [(256, 64), (410, 172), (7, 5), (33, 5000)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_numbers_are_those_of_bitsandbytes(shape, quant_type, is_double, dtype):
    torch.manual_seed(0)
    weight = 0.03 * torch.randn(shape)
    weight[0] = 0
    codes, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=is_double, quant_type=quant_type
    )
    state.dtype = dtype
    wanted = functional.dequantize_4bit(codes, state)
    pairs = pairs_of(functional.get_4bit_type(quant_type, device="cpu"))
    for top in range(0, shape[0], 2 * rows_together(shape[1])):
        found = torch.empty(shape[0] - top, shape[1], dtype=dtype)
        expand_4bit(codes.view(-1), state, pairs, found, top)
        assert torch.equal(found, wanted[top:])
