"""A weight that is expanded a few rows at a time is the same function as the whole one."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quantization import product
from quantization.bnb import quantize_linears
from quantization.product import FrozenWeight
from quantization.rooms import give_rooms_back
from quantization.schemes import Scheme

SCHEMES = [scheme for scheme in Scheme if scheme not in (Scheme.NONE, Scheme.BF16)]
CPU = torch.device("cpu")


def layer_of(scheme: Scheme) -> nn.Module:
    """Rows of 172 weights: only every sixteenth begins with a block of 64 of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(172, 410))
    quantize_linears(model, scheme, CPU, keep=())
    return model[0]


@torch.no_grad()
def weight_of(layer: nn.Module) -> Tensor:
    """The matrix [m, n] that a layer stands for, read off its products."""
    return (layer(torch.eye(172)) - layer.bias).T


def derivatives(
    layer: Callable[[Tensor], Tensor], inputs: int, outputs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What a layer gives for some rows, and derivatives of first and second order there."""
    generator = torch.Generator().manual_seed(1)
    x, direction = torch.randn(2, 3, 2, inputs, generator=generator)
    upstream = torch.randn(3, 2, outputs, generator=generator)
    x.requires_grad_()
    y = layer(x)
    (gradient,) = torch.autograd.grad((y * upstream).tanh().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((gradient * direction).sum(), x)
    return y, gradient, second


@pytest.mark.parametrize("scheme", SCHEMES)
def test_blocks_of_rows_make_the_whole_weights_product(scheme, monkeypatch):
    layer = layer_of(scheme)
    weight, whole = weight_of(layer), derivatives(layer, 172, 410)
    monkeypatch.setattr(product, "ROOM_BYTES", 20_000)
    assert torch.equal(weight_of(layer), weight)
    torch.testing.assert_close(derivatives(layer, 172, 410), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme is not Scheme.INT8])
def test_bitsandbytes_own_product_has_the_same_derivatives(scheme, dtype):
    """It is what runs on CUDA; its gradient, too, must be one that can be differentiated."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(128, 192))
    quantize_linears(model, scheme, CPU, keep=(), compute_dtype=dtype)
    ours = derivatives(model[0], 128, 192)
    theirs = derivatives(partial(Linear4bit.forward, model[0]), 128, 192)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 400), st.sampled_from([1, 2, 16, 64]))
def test_blocks_have_each_row_once_and_fit_into_the_room(outputs, inputs, together):
    written = []

    def expand(into: Tensor, top: int) -> None:
        written.append((top, top + len(into)))

    blocks = list(FrozenWeight((outputs, inputs), CPU, expand, together).blocks(torch.float32))
    assert written == [(rows.start, rows.stop) for rows, _ in blocks]
    assert [row for top, end in written for row in range(top, end)] == list(range(outputs))
    assert all(top % together == 0 for top, _ in written)
    size = max(product.ROOM_BYTES, together * inputs * 4)
    assert all(block.nbytes <= size for _, block in blocks)


def test_a_room_that_was_given_back_is_there_again_when_needed():
    layer = layer_of(Scheme.NF4)
    before = weight_of(layer)
    give_rooms_back()
    assert torch.equal(weight_of(layer), before)


def test_a_forked_process_has_a_room_of_its_own():
    def expand(into: Tensor, top: int) -> None:
        into.fill_(1 + os.getpid())

    weight, here = FrozenWeight((8, 172), CPU, expand), 1 + os.getpid()
    _, block = next(weight.blocks(torch.float64))
    if (child := os.fork()) == 0:
        next(weight.blocks(torch.float64))
        os._exit(0)
    os.waitpid(child, 0)
    assert bool((block == here).all())
