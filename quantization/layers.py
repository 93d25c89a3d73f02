"""Frozen layers in fewer bits that are not bitsandbytes' own: bfloat16, INT8, INT8 embeddings.

They compute with what is stored and quantise nothing: quantization/bnb.py does. What runs the
product of an expanded weight is quantization/product.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantization.product import FrozenWeight, frozen_product


class FrozenLinear16bit(nn.Module):
    """`y = W x + b` with W [m, n] in bfloat16; the product too, with float32's sums inside.

    What comes in and goes out keeps its own dtype.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Round `weight` [m, n] and `bias` [m] or None."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = _frozen(weight.bfloat16())
        self.register_parameter("bias", None if bias is None else _frozen(bias.bfloat16()))

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., n] to [..., m] in the dtype of `x`."""
        return functional.linear(x.bfloat16(), self.weight, self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class FrozenLinear8bit(nn.Module):
    """`y = W x + b` with W [m, n] stored as INT8 codes and one float32 absmax a row.

    The codes are bitsandbytes' vector-wise ones, `W ~ codes * absmax / 127`. Only the weight is
    quantised: the product runs in the compute dtype with the weight expanded for its duration, in
    forward and again in backward. `Linear8bitLt` on a CPU does the
    same while training, but rounds the activations too in evaluation (twice the error on a layer
    of MiniLM), which would train one function and test another.
    """

    weight: nn.Parameter
    absmax: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        codes: Tensor,
        absmax: Tensor,
        bias: Tensor | None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """Take int8 `codes` [m, n], float32 `absmax` [m], `bias` [m] or None.

        Without `compute_dtype` the product runs in the dtype of its input.
        """
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.compute_dtype = compute_dtype
        self.weight = _frozen(codes)
        self.register_buffer("absmax", absmax)
        self.register_parameter("bias", None if bias is None else _frozen(bias.float()))

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., n] to [..., m] in the dtype of `x`."""
        inner = x.to(self.compute_dtype or x.dtype)
        bias = None if self.bias is None else self.bias.to(inner.dtype)
        weight = FrozenWeight(
            (self.out_features, self.in_features), self.weight.device, self._expand
        )
        return frozen_product(inner, bias, weight).to(x.dtype)

    def _expand(self, into: Tensor, top: int) -> None:
        rows = slice(top, top + len(into))
        # Into place, since mixed dtypes in one operation make a second weight on the way.
        into.copy_(self.weight[rows]).mul_((self.absmax[rows] / 127).to(into.dtype).unsqueeze(1))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class FrozenEmbedding8bit(nn.Module):
    """A table [v, n] stored as INT8 codes and one float32 absmax a row; what it gives is float32.

    Only the rows that are looked up are expanded.
    """

    weight: nn.Parameter
    absmax: Tensor

    def __init__(self, codes: Tensor, absmax: Tensor, padding_idx: int | None) -> None:
        """Take int8 `codes` [v, n], float32 `absmax` [v]."""
        super().__init__()
        self.num_embeddings, self.embedding_dim = codes.shape
        self.padding_idx = padding_idx  # as nn.Embedding has it: some models look it up
        self.weight = _frozen(codes)
        self.register_buffer("absmax", absmax)

    def forward(self, ids: Tensor) -> Tensor:
        """Map `ids` [...] to [..., n]."""
        rows = functional.embedding(ids, self.weight).float()
        return rows * (self.absmax / 127)[ids].unsqueeze(-1)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def _frozen(tensor: Tensor) -> nn.Parameter:
    """The tensor as a parameter; one that is a parameter already stays itself, so ties last."""
    if isinstance(tensor, nn.Parameter):
        tensor.requires_grad_(False)
        return tensor
    return nn.Parameter(tensor, requires_grad=False)
