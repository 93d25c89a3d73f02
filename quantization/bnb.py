"""Quantise the frozen layers of a model, most of them through bitsandbytes, on CPU and CUDA alike.

BF16 is torch's own. NF4 and FP4 are `bitsandbytes.nn.Linear4bit`, with a product of our own on a
CPU. INT8 has bitsandbytes' codes in a layer of ours, because `bitsandbytes.nn.Linear8bitLt`
computes another function in evaluation than in training on a CPU. bitsandbytes is imported here
alone, and only when a scheme needs it.

A federation mixes CPU and CUDA devices, so a layer must be one function everywhere: the stored
codes are the same on both, and only the product's rounding differs. The rounding is that of the
compute dtype: float32 on a CPU and bfloat16 on CUDA unless one is asked for.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Collection
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantization.errors import MissingExtraError, SchemeError
from quantization.expand_4bit import (
    BLOCK_SIZE,
    NESTED_BLOCK_SIZE,
    expand_4bit,
    pairs_of,
    rows_together,
)
from quantization.layers import FrozenEmbedding8bit, FrozenLinear8bit, FrozenLinear16bit
from quantization.names import is_below
from quantization.product import FrozenWeight, frozen_product
from quantization.schemes import COMPUTE_DTYPES, Scheme

_TRANSPOSED_MARK = "pf2lora_from_conv1d"


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return `(m, n)`, outputs and inputs, of a linear layer of any kind; None for other modules.

    Known are nn.Linear and what derives from it (bitsandbytes' layers do), this package's own, and
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


def parse_compute_dtype(name: str | None, scheme: Scheme) -> torch.dtype | None:
    """The dtype called `name`; None leaves the choice to the layers.

    Raises:
        SchemeError: no such dtype, or the scheme leaves no choice.
    """
    if name is None:
        return None
    if name not in COMPUTE_DTYPES:
        raise SchemeError(f"no compute dtype {name!r}; there are: {', '.join(COMPUTE_DTYPES)}")
    fixed = scheme.fixed_compute_dtype
    if fixed not in (None, name):
        raise SchemeError(
            f"compute dtype {name!r}: scheme {scheme.value} multiplies in {fixed}; nf4, fp4 and "
            "int8 leave the choice"
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def linears(model: nn.Module, scheme: Scheme, keep: Collection[str]) -> list[str]:
    """Names of the linear layers that `scheme` quantises: all but those below `keep`.

    Raises:
        SchemeError: there is none.
    """
    if scheme is Scheme.NONE:
        return []
    found = [
        name
        for name, module in model.named_modules()
        if linear_shape(module) and not is_below(name, keep)
    ]
    if not found:
        raise SchemeError(f"scheme {scheme.value}: the model has no linear layer to quantise")
    return found


def quantize_linears(
    model: nn.Module,
    scheme: Scheme,
    device: torch.device,
    keep: Collection[str],
    compute_dtype: torch.dtype | None = None,
) -> int:
    """Replace the linear layers of `model`, in place, by frozen ones of `scheme` on `device`.

    Left alone are the modules named in `keep` and everything below them. Returns how many layers
    were replaced.

    Raises:
        SchemeError: the model has no linear layer to quantise.
        MissingExtraError: bitsandbytes is not installed.
    """
    names = linears(model, scheme, keep)
    for name in names:
        weight, bias = dense_weight(model.get_submodule(name))
        replace_linear(model, name, _quantized(weight, bias, scheme, device, compute_dtype))
    return len(names)


def replace_linear(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` into the place of the one called `name`."""
    if is_transposed(model.get_submodule(name)):
        setattr(layer, _TRANSPOSED_MARK, True)
    model.set_submodule(name, layer)


def embeddings(model: nn.Module) -> list[str]:
    """Names of the embeddings that can be quantised: plain tables, no kind with rules of its own.

    Raises:
        SchemeError: there is none.
    """
    found = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Embedding and module.max_norm is None
    ]
    if not found:
        raise SchemeError("int8 embeddings: the model has no plain embedding to quantise")
    return found


def quantize_embeddings(model: nn.Module, compute_dtype: torch.dtype | None = None) -> int:
    """Replace the embeddings of `model`, in place, by INT8 ones; returns how many.

    Output embeddings that are tied to one share its codes, as a frozen INT8 linear layer: else the
    float table would have to stay.

    Raises:
        SchemeError: the model has no plain embedding.
        MissingExtraError: bitsandbytes is not installed.
    """
    names = embeddings(model)
    for name in names:
        table = cast(nn.Embedding, model.get_submodule(name))
        codes, absmax = int8_codes(table.weight.detach())
        replace_embedding(model, name, codes, absmax, compute_dtype)
    return len(names)


def replace_embedding(
    model: nn.Module, name: str, codes: Tensor, absmax: Tensor, compute_dtype: torch.dtype | None
) -> None:
    """Put INT8 codes [v, n] and absmax [v] in the place of an embedding and what is tied to it."""
    table = cast(nn.Embedding, model.get_submodule(name))
    layer = FrozenEmbedding8bit(codes, absmax, table.padding_idx)
    output = cast(Any, model).get_output_embeddings()
    tied = [
        other
        for other, module in model.named_modules()
        if module is output and module.weight is table.weight
    ]
    model.set_submodule(name, layer)
    for other in tied:
        head = FrozenLinear8bit(layer.weight, layer.absmax, output.bias, compute_dtype)
        model.set_submodule(other, head)


def _quantized(
    weight: Tensor,
    bias: Tensor | None,
    scheme: Scheme,
    device: torch.device,
    compute_dtype: torch.dtype | None,
) -> nn.Module:
    if scheme is Scheme.BF16:
        return FrozenLinear16bit(weight, bias).to(device)
    if scheme is Scheme.INT8:
        codes, absmax = int8_codes(weight.to(device))
        return FrozenLinear8bit(codes, absmax, bias, compute_dtype).to(device)
    codes, state = _bitsandbytes().functional.quantize_4bit(
        weight.to(device),
        blocksize=BLOCK_SIZE,
        compress_statistics=scheme.is_double,
        quant_type=scheme.value[:3],
    )
    return linear_4bit(codes, state, bias, compute_dtype)


def nf4_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """NF4 codes, two in a byte, and the absmax of each BLOCK_SIZE numbers, in the order of rows."""
    codes, state = _bitsandbytes().functional.quantize_4bit(
        weight, blocksize=BLOCK_SIZE, compress_statistics=False, quant_type="nf4"
    )
    return codes, state.absmax


def nf4_table() -> Tensor:
    """The numbers that the sixteen codes of NF4 stand for."""
    return _table("nf4", torch.device("cpu"))


def dense_weight(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [m, n] and bias [m] of a dense layer, detached."""
    weight, bias = cast(Tensor, layer.weight).detach(), layer.bias
    weight = weight.t() if isinstance(layer, Conv1D) else weight
    return weight.contiguous(), bias.detach() if isinstance(bias, Tensor) else None


def int8_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 codes [m, n] and float32 absmax [m] of a float `weight` [m, n]."""
    # float16 is what bitsandbytes' kernels take, on CUDA as on CPU.
    codes, absmax, _ = _bitsandbytes().functional.int8_vectorwise_quant(weight.half())
    codes[absmax == 0] = 0  # a row of zeros, such as a padding token's, is divided by zero there
    return codes, absmax.float()


def linear_4bit(
    codes: Tensor, state: Any, bias: Tensor | None, compute_dtype: torch.dtype | None
) -> nn.Module:
    """A `Linear4bit` of packed codes [m n / 2, 1] and their QuantState, on the device of both."""
    library, (outputs, inputs) = _bitsandbytes(), state.shape
    # Before Ampere too: slower there, but float16 would want its gradients scaled.
    default = torch.bfloat16 if codes.device.type == "cuda" else torch.float32
    compute_dtype = compute_dtype or default
    layer: nn.Module = _linear_4bit_class()(
        inputs,
        outputs,
        bias=bias is not None,
        compute_dtype=compute_dtype,
        quant_type=state.quant_type,
        device="meta",  # no throw-away weights, and nothing drawn from the global generator
    )
    state.dtype = compute_dtype  # what the backward pass expands to
    layer.weight = library.nn.Params4bit(
        codes,
        requires_grad=False,
        quant_state=state,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        bnb_quantized=True,
        module=layer,
    )
    layer.quant_state = state
    if bias is not None:
        layer.bias = nn.Parameter(bias.float().to(codes.device), requires_grad=False)
    return layer


@cache
def _linear_4bit_class() -> Any:
    class FrozenLinear4bit(_bitsandbytes().nn.Linear4bit):  # type: ignore[misc]
        """bitsandbytes' layer; on a CPU its weight is expanded a few rows at a time.

        There bitsandbytes takes new memory for every expanded weight, and on a CPU with AVX512-BF16
        the first evaluation without gradient would repack the codes in place for a bfloat16 kernel,
        after which its layer has no input gradient (0.50).
        """

        def forward(self, x: Tensor) -> Tensor:
            """Map `x` [..., n] to [..., m] in the dtype of `x`."""
            if x.device.type != "cpu":
                return cast(Tensor, super().forward(x))
            inner = x.to(self.compute_dtype)
            bias = None if self.bias is None else self.bias.to(inner.dtype)
            codes, state = self.weight.detach().view(-1), self.quant_state
            expand = partial(expand_4bit, codes, state, _pairs(state.quant_type))
            together = rows_together(self.in_features)
            weight = FrozenWeight(state.shape, x.device, expand, together)
            return frozen_product(inner, bias, weight).to(x.dtype)

    return FrozenLinear4bit


def pieces_4bit(layer: nn.Module) -> dict[str, Tensor]:
    """What a `Linear4bit` keeps beside its codes, by bitsandbytes' names; none for other layers."""
    state = getattr(layer, "quant_state", None)
    if state is None:
        return {}
    if not state.nested:
        return {"absmax": state.absmax}
    return {
        "absmax": state.absmax,
        "nested_absmax": state.state2.absmax,
        "nested_offset": state.offset,
    }


def state_4bit(scheme: Scheme, shape: tuple[int, int], pieces: dict[str, Tensor]) -> Any:
    """The QuantState of a weight [m, n] from what `pieces_4bit` gave, on the pieces' device."""
    functional, device = _bitsandbytes().functional, pieces["absmax"].device
    nested = None
    if scheme.is_double:
        nested = functional.QuantState(
            absmax=pieces["nested_absmax"],
            blocksize=NESTED_BLOCK_SIZE,
            code=_dynamic_map(device),
            dtype=torch.float32,
        )
    quant_type = scheme.value[:3]
    return functional.QuantState(
        absmax=pieces["absmax"],
        shape=torch.Size(shape),
        code=_table(quant_type, device),
        blocksize=BLOCK_SIZE,
        quant_type=quant_type,
        dtype=torch.float32,
        offset=pieces.get("nested_offset"),
        state2=nested,
    )


@cache
def _table(quant_type: str, device: torch.device) -> Tensor:
    """The numbers that the sixteen codes stand for, once for all layers."""
    return cast(Tensor, _bitsandbytes().functional.get_4bit_type(quant_type, device=device))


@cache
def _pairs(quant_type: str) -> Tensor:
    """What a byte of two codes stands for, on a CPU."""
    return pairs_of(_table(quant_type, torch.device("cpu")))


@cache
def _dynamic_map(device: torch.device) -> Tensor:
    """bitsandbytes' 256 values of an 8-bit absmax, once for all layers: 1 KiB."""
    return cast(Tensor, _bitsandbytes().functional.create_dynamic_map().to(device))


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
