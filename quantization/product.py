"""The product of a frozen weight that is expanded for its duration, in forward and in backward.

On a CPU a weight is expanded and multiplied a few rows at a time, in one room of the thread's own:
however large the layer, that is all that expanding takes. Freshly allocated blocks would not be
kept either, but between two of them the C library fills the hole with activations, and takes the
next from the system: a forward and backward of a Llama of 119 M parameters in INT8, 123 MiB, so
left the process 325 MiB larger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any, Final, cast

import torch
from torch import Tensor

from quantization.rooms import room

# 768 x 768 in float32. Half of it makes some layers take 1.1 of the time, twice of it none less.
ROOM_BYTES: Final = 768 * 768 * 4


@dataclass(frozen=True, slots=True)
class FrozenWeight:
    """A weight [m, n] that is stored in fewer bits.

    `expand(into, top)` writes the rows from `top` on into `into` [k, n], in its dtype; `top` is a
    multiple of `rows_together`.
    """

    shape: tuple[int, int]
    device: torch.device
    expand: Callable[[Tensor, int], None]
    rows_together: int = 1

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their numbers, each block for use until the next; on CUDA one block."""
        outputs, inputs = self.shape
        step = self._rows_at_once(dtype) if self.device.type == "cpu" else outputs
        for top in range(0, outputs, step):
            rows = slice(top, min(top + step, outputs))
            block = _room(rows.stop - top, inputs, dtype, self.device)
            self.expand(block, top)
            yield rows, block

    def _rows_at_once(self, dtype: torch.dtype) -> int:
        """Rows of a block: as many as the room takes, evened out over the blocks."""
        (outputs, inputs), together = self.shape, self.rows_together
        most = max(1, ROOM_BYTES // (inputs * dtype.itemsize * together)) * together
        blocks = ceil(outputs / most)
        return ceil(outputs / (blocks * together)) * together


def frozen_product(x: Tensor, bias: Tensor | None, weight: FrozenWeight) -> Tensor:
    """`W x + b`, [..., m], differentiable any number of times in x [..., n]; W is never saved."""
    return cast(Tensor, _product(x, bias, weight))


def _room(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory [rows, inputs]; on a CPU the thread's own, until the next call there.

    Backward on a CPU runs in the thread that asked for it.
    """
    if device.type != "cpu":
        return torch.empty(rows, inputs, dtype=dtype, device=device)
    count = max(rows * inputs, ROOM_BYTES // dtype.itemsize)
    return room("weight", count, dtype)[: rows * inputs].view(rows, inputs)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: FrozenWeight) -> Tensor:
        ctx.weight = weight
        outputs, inputs = weight.shape
        y = x.new_empty(*x.shape[:-1], outputs)
        flat_x, flat_y = x.reshape(-1, inputs), y.view(-1, outputs)
        for rows, block in weight.blocks(x.dtype):
            if bias is None:
                torch.mm(flat_x, block.t(), out=flat_y[:, rows])
            else:
                torch.addmm(bias[rows], flat_x, block.t(), out=flat_y[:, rows])
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _transposed_product(gradients[0], ctx.weight), None, None


class _TransposedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, weight: FrozenWeight) -> Tensor:
        ctx.weight = weight
        outputs, inputs = weight.shape
        flat = gradient.reshape(-1, outputs)
        found = flat.new_empty(len(flat), inputs)
        for rows, block in weight.blocks(gradient.dtype):
            if rows.start == 0:
                torch.mm(flat[:, rows], block, out=found)
            else:
                found.addmm_(flat[:, rows], block)
        return found.view(*gradient.shape[:-1], inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return frozen_product(gradients[0], None, ctx.weight), None


_product: Callable[..., Any] = _Product.apply
_transposed_product: Callable[..., Any] = _TransposedProduct.apply
