"""Frozen linear layers in fewer bits, most of them through bitsandbytes, on CPU and CUDA alike.

BF16 is torch's own: a CPU with bfloat16 instructions multiplies so in half of float32's time. NF4
and FP4 are `bitsandbytes.nn.Linear4bit`. INT8 is this module's own `FrozenLinear8bit`, because
`bitsandbytes.nn.Linear8bitLt` computes another function in evaluation than in training on a CPU.
bitsandbytes is imported here alone, and only when a scheme needs it.

A federation mixes CPU and CUDA devices, so a layer must be one function everywhere: the stored
codes are the same on both, and only the product's rounding differs.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Collection
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from quantization.errors import MissingExtraError, SchemeError
from quantization.names import is_below
from quantization.schemes import Scheme

_TRANSPOSED_MARK = "pf2lora_from_conv1d"
NF4_BLOCK: Final = 64


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return `(m, n)`, outputs and inputs, of a linear layer of any kind; None for other modules.

    Known are nn.Linear and what derives from it (bitsandbytes' layers do), this module's own, and
    the transposed `Conv1D` of GPT-2.
    """
    match module:
        case nn.Linear() | FrozenLinear8bit() | FrozenLinear16bit():
            return module.out_features, module.in_features
        case Conv1D():
            inputs, outputs = module.weight.shape
            return outputs, inputs
        case _:
            return None


def is_transposed(module: nn.Module) -> bool:
    """Whether the checkpoint stores this layer's weight as [n, m] (PEFT: `fan_in_fan_out`)."""
    return isinstance(module, Conv1D) or hasattr(module, _TRANSPOSED_MARK)


def quantize_linears(
    model: nn.Module, scheme: Scheme, device: torch.device, keep: Collection[str]
) -> int:
    """Replace the linear layers of `model`, in place, by frozen ones of `scheme` on `device`.

    Left alone are the modules named in `keep` and everything below them. Returns how many layers
    were replaced.

    Raises:
        SchemeError: the model has no linear layer to quantise.
        MissingExtraError: bitsandbytes is not installed.
    """
    if scheme is Scheme.NONE:
        return 0
    found = [
        name
        for name, module in model.named_modules()
        if linear_shape(module) and not is_below(name, keep)
    ]
    if not found:
        raise SchemeError(f"scheme {scheme.value}: the model has no linear layer to quantise")
    for name in found:
        layer = model.get_submodule(name)
        quantized = _quantized(layer, scheme, device)
        if is_transposed(layer):
            setattr(quantized, _TRANSPOSED_MARK, True)
        model.set_submodule(name, quantized)
    return len(found)


def output_embeddings(model: Any) -> list[str]:
    """Name the language model's head: often tied to the input embeddings, so it stays as it is."""
    output = model.get_output_embeddings()
    return [] if output is None else [n for n, module in model.named_modules() if module is output]


def _quantized(layer: nn.Module, scheme: Scheme, device: torch.device) -> nn.Module:
    weight, bias = dense_weight(layer)
    if scheme is Scheme.BF16:
        return FrozenLinear16bit(weight, bias).to(device)
    if scheme is Scheme.INT8:
        return FrozenLinear8bit(weight.to(device), None if bias is None else bias.to(device))
    return _linear_4bit(weight, bias, scheme, device)


def dense_weight(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [m, n] and bias [m] of a dense layer, detached."""
    weight, bias = cast(Tensor, layer.weight).detach(), layer.bias
    weight = weight.t() if isinstance(layer, Conv1D) else weight
    return weight.contiguous(), bias.detach() if isinstance(bias, Tensor) else None


def _linear_4bit(
    weight: Tensor, bias: Tensor | None, scheme: Scheme, device: torch.device
) -> nn.Module:
    library = _bitsandbytes()
    outputs, inputs = weight.shape
    layer: nn.Module = library.nn.Linear4bit(
        inputs,
        outputs,
        bias=bias is not None,
        compute_dtype=_compute_dtype(device),
        quant_type=scheme.value,
        device="meta",  # no throw-away weights, and nothing drawn from the global generator
    )
    layer.weight = library.nn.Params4bit(
        weight,
        requires_grad=False,
        compress_statistics=False,
        quant_type=scheme.value,
        module=layer,
    )
    if bias is not None:
        layer.bias = nn.Parameter(bias.float(), requires_grad=False)
    # On a CPU with AVX512-BF16 the first evaluation without gradient would repack the weight in
    # place for a bfloat16 kernel; from then on the layer has no input gradient (bitsandbytes 0.50).
    layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return layer.to(device)


def _compute_dtype(device: torch.device) -> torch.dtype:
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _bitsandbytes() -> Any:
    # Importing it on a CPU with AVX512-BF16 warns of a kernel package that this module never uses.
    backend = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before = backend.level
    backend.setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise MissingExtraError("bitsandbytes", "torch") from error
    finally:
        backend.setLevel(before)


def int8_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 codes [m, n] and absmax [m] of a weight: `W ~ codes * absmax / 127`."""
    # float16 is what bitsandbytes' kernels take, on CUDA as on CPU.
    codes, absmax, _ = _bitsandbytes().functional.int8_vectorwise_quant(weight.half())
    return codes, absmax.float()


def nf4_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """NF4 codes, two in a byte, and the absmax of each NF4_BLOCK numbers, in the order of rows."""
    codes, state = _bitsandbytes().functional.quantize_4bit(
        weight, blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=False
    )
    return codes, state.absmax


def nf4_table() -> Tensor:
    """The numbers that the sixteen codes stand for."""
    return cast(Tensor, _bitsandbytes().functional.get_4bit_type("nf4", device="cpu"))


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
        self.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
        frozen_bias = None if bias is None else nn.Parameter(bias.bfloat16(), requires_grad=False)
        self.register_parameter("bias", frozen_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., n] to [..., m] in the dtype of `x`."""
        return functional.linear(x.bfloat16(), self.weight, self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class FrozenLinear8bit(nn.Module):
    """`y = W x + b` with W [m, n] stored as INT8 codes and one float32 absmax a row.

    The codes are bitsandbytes' vector-wise ones, `W ~ codes * absmax / 127`. Only the weight is
    quantised: the product runs in the input's dtype with the weight expanded for its duration, in
    forward and again in backward, so no expanded weight is kept. `Linear8bitLt` on a CPU does the
    same while training, but rounds the activations too in evaluation (twice the error on a layer
    of MiniLM), which would train one function and test another.
    """

    weight: nn.Parameter
    absmax: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Quantise `weight` [m, n]; `bias` is [m] or None."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        codes, absmax = int8_codes(weight)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("absmax", absmax)
        frozen_bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)
        self.register_parameter("bias", frozen_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., n] to [..., m] in the dtype of `x`."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return cast(Tensor, _int8_linear(x, self.weight, self.absmax, bias))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class _Int8Linear(torch.autograd.Function):
    """`W x + b`, differentiable any number of times in x; the expanded W is never saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, absmax)
        return functional.linear(x, _expand(codes, absmax, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        codes, absmax = ctx.saved_tensors
        return gradients[0] @ _expand(codes, absmax, gradients[0].dtype), None, None, None


_int8_linear: Callable[..., Any] = _Int8Linear.apply


def _expand(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype) * (absmax / 127).to(dtype).unsqueeze(1)
