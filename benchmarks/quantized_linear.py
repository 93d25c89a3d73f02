"""Where quantised layers spend their time on a CPU, and what each way to hold them costs.

    python -m benchmarks.quantized_linear                # layers: forward and input gradient
    python -m benchmarks.quantized_linear --tokens 48
    python -m benchmarks.quantized_linear --profile      # shares of that time
    python -m benchmarks.quantized_linear --model        # PF2LoRA steps of MiniLM, batch 16 of 48
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python -m benchmarks.quantized_linear

The peers are bitsandbytes' own layers as they come: `Linear4bit`, which multiplies in the dtype of
its input, and `Linear8bitLt` in training. "Kept" ones hold the dequantised weight, float32 or
bfloat16: no cache of dequantised weights can be faster. Times are taken in alternation, one call of
each contender after the other, and compared within each turn.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import step_cost
from edge_client.backends.torch_backend import load_trainer
from protocol.methods import PF2LoRA
from quantization.bnb import quantize_linears
from quantization.layers import FrozenLinear16bit
from quantization.schemes import Scheme

MINILM = {"384 x 384": 4, "1536 x 384": 1, "384 x 1536": 1}  # shape: layers of a block
WIDE = {"768 x 768": 4, "3072 x 768": 1, "768 x 3072": 1}
PEERS = {"nf4": "bitsandbytes NF4", "fp4": "bitsandbytes FP4", "int8": "bitsandbytes INT8"}
CPU = torch.device("cpu")
Call = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=16 * 48, help="rows times length")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--model", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch computes with {torch.backends.cpu.get_cpu_capability()}, {options.tokens} tokens")
    if options.model:
        _print_ratios("MiniLM, PF2LoRA step", _model_steps(), options.turns, "nf4")
        return
    for model, shapes in (("MiniLM", MINILM), ("768 wide", WIDE)):
        for scheme, peer in PEERS.items():
            block = {
                name: _block(shapes, options.tokens, way)
                for name, way in _ways(scheme, peer).items()
            }
            if options.profile:
                _print_shares(f"{model}: {peer}", block[peer])
                bfloat = f"{scheme}, bfloat16 product"
                _print_shares(f"{model}: {bfloat}", block[bfloat])
            else:
                _print_ratios(f"{model}, linear layers of a block", block, options.turns, peer)


def _ways(scheme: str, peer: str) -> dict[str, Callable[[Tensor], nn.Module]]:
    """What makes a layer of a weight [m, n], by name; the peer first."""
    return {
        peer: _peer_int8 if scheme == "int8" else lambda weight: _peer_4bit(weight, scheme),
        f"{scheme}, float32 product": lambda weight: _ours(weight, scheme, torch.float32),
        f"{scheme}, bfloat16 product": lambda weight: _ours(weight, scheme, torch.bfloat16),
        "kept in float32": _dense,
        "kept in bfloat16": lambda weight: FrozenLinear16bit(weight, None),
    }


def _dense(weight: Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def _ours(weight: Tensor, scheme: str, compute_dtype: torch.dtype) -> nn.Module:
    model = nn.Sequential(_dense(weight))
    quantize_linears(model, Scheme(scheme), CPU, (), compute_dtype)
    return model[0]


def _peer_4bit(weight: Tensor, scheme: str) -> nn.Module:
    import bitsandbytes

    outputs, inputs = weight.shape
    layer = bitsandbytes.nn.Linear4bit(
        inputs, outputs, bias=False, quant_type=scheme, compress_statistics=False
    )
    layer.weight.data = weight.clone()
    return _quantised(layer)


def _peer_int8(weight: Tensor) -> nn.Module:
    import bitsandbytes

    outputs, inputs = weight.shape
    layer = bitsandbytes.nn.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False)
    layer.weight.data = weight.clone()
    return _quantised(layer)


def _quantised(layer: nn.Module) -> nn.Module:
    """bitsandbytes' layers quantise their weight when they are put on a device."""
    return layer.to(CPU).train()


def _block(shapes: Mapping[str, int], tokens: int, way: Callable[[Tensor], nn.Module]) -> Call:
    """Forward and input gradient of the linear layers of one block, each on its own input."""
    torch.manual_seed(0)
    work: list[tuple[nn.Module, Tensor, Tensor]] = []
    for shape, count in shapes.items():
        outputs, inputs = map(int, shape.split(" x "))
        for _ in range(count):
            layer = way(0.02 * torch.randn(outputs, inputs))
            x = torch.randn(tokens, inputs, requires_grad=True)
            work.append((layer, x, torch.randn(tokens, outputs)))

    def call() -> None:
        for layer, x, upstream in work:
            torch.autograd.grad(layer(x), x, upstream)

    return call


def _model_steps() -> dict[str, Call]:
    """PF2LoRA's local step (secant) on MiniLM, held in ways that need no more than the weights."""
    options = argparse.Namespace(batch_size=16, length=48, scheme="none", device="cpu")
    settings = step_cost._settings(options, PF2LoRA())
    steps: dict[str, Call] = {}
    for scheme, dtype in (
        ("nf4", None),
        ("nf4", "bfloat16"),
        ("nf4-double", None),
        ("fp4", "bfloat16"),
        ("int8", None),
        ("int8", "bfloat16"),
        ("none", None),
        ("bf16", None),
    ):
        trainer = load_trainer(
            settings,
            backbone=None,
            scheme=scheme,
            device="cpu",
            personal_seed=0,
            compute_dtype=dtype,
        )
        rows = trainer.encode(step_cost._rows(options))
        name = f"{scheme}, {dtype} product" if dtype else scheme
        steps[name] = partial(trainer.train, rows, 0, 1)
    return steps


def _print_ratios(title: str, calls: Mapping[str, Call], turns: int, peer: str) -> None:
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    names = list(calls)
    for turn in range(turns):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            started = time.perf_counter()
            calls[name]()
            found[name].append(time.perf_counter() - started)
    base = np.array(found[peer])
    print(f"\n| {title} | time, of {peer} | quartiles |\n|---|---|---|")
    for name, times in found.items():
        low, middle, high = np.percentile(np.array(times) / base, [25, 50, 75])
        print(f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    print(f"\n{peer}: {1000 * np.median(base):.1f} ms")


def _print_shares(title: str, call: Call) -> None:
    """Shares of the time by what it was spent on, from torch's profiler."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(5):
            call()
    shares = {"product": 0.0, "expanding the weight": 0.0, "dtype conversions": 0.0, "rest": 0.0}
    for event in recorded.key_averages():
        shares[_part(event.key)] += event.self_cpu_time_total
    whole = sum(shares.values())
    print(f"{title}: " + ", ".join(f"{name} {100 * t / whole:.1f} %" for name, t in shares.items()))


def _part(key: str) -> str:
    if key in ("aten::mm", "aten::addmm", "aten::bmm"):
        return "product"
    if key in ("aten::copy_", "aten::_to_copy"):
        return "dtype conversions"  # of activations, and of INT8 codes
    expands = ("bitsandbytes::", "aten::mul", "aten::div")
    return "expanding the weight" if key.startswith(expands) else "rest"


if __name__ == "__main__":
    main()
