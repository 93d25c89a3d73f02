"""The product of a frozen weight that is expanded for its duration, in forward and in backward.

All weights of a thread are expanded into one room. Freshly allocated ones would not be kept either,
but between two of them the C library fills the hole with activations, and takes the next weight
from the system: a forward and backward of a Llama of 119 M parameters in INT8, 123 MiB, so left the
process 325 MiB larger. In one room it is 32 MiB.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

# A dtype in, the weight [m, n] in that dtype out.
Expand = Callable[[torch.dtype], Tensor]


def frozen_product(x: Tensor, bias: Tensor | None, expand: Expand) -> Tensor:
    """`W x + b`, [..., m], differentiable any number of times in x [..., n]; W is never saved."""
    return cast(Tensor, _product(x, bias, expand))


def room(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory of a shape; on a CPU the thread's own, until the next call there."""
    if device.type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    count = prod(shape)
    if dtype not in _ROOMS.flat or _ROOMS.flat[dtype].numel() < count:
        _ROOMS.flat.pop(dtype, None)  # let go of the smaller one first
        # Of the system and not of malloc: glibc's takes a large block that is given back for a sign
        # to serve activations of that size from its heap, where holes stay when they are freed.
        memory = mmap.mmap(-1, max(1, count * dtype.itemsize))
        _ROOMS.flat[dtype] = torch.frombuffer(memory, dtype=dtype, count=count)
    return _ROOMS.flat[dtype][:count].view(tuple(shape))


class _Rooms(threading.local):
    """One room a thread and dtype. Backward on a CPU runs in the thread that asked for it."""

    def __init__(self) -> None:
        self.flat: dict[torch.dtype, Tensor] = {}


_ROOMS = _Rooms()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, expand: Expand) -> Tensor:
        ctx.expand = expand
        return functional.linear(x, expand(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _transposed_product(gradients[0], ctx.expand), None, None


class _TransposedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, expand: Expand) -> Tensor:
        ctx.expand = expand
        return gradient @ expand(gradient.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return frozen_product(gradients[0], None, ctx.expand), None


_product: Callable[..., Any] = _Product.apply
_transposed_product: Callable[..., Any] = _TransposedProduct.apply
