"""The NF4 two-level step beside PEFT's QLoRA step on CUDA: time and memory, as ratios.

    python -m benchmarks.qlora_step --sizes 100m 350m 1b 3b 7b
    python -m benchmarks.qlora_step --sizes tiny --device cpu     # does it run?

Llama-type backbones with random bfloat16 weights, made here. Same card, rank, target layers, rows
and length. The peer loads through transformers' BitsAndBytesConfig (NF4, bfloat16 product), is
prepared by PEFT and takes AdamW steps; ours reads a quantised folder and takes PF2LoRA's steps, by
the secant (two gradients) and in one pass. Times are taken in alternation and compared within each
turn; memory is the allocator's peak in a process of its own, backbone included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quantized_memory import WORDS, word_tokenizer
from edge_client.backends.torch_backend import load_trainer
from edge_client.data import Example
from protocol.federation import (
    Adapter,
    Backbone,
    FederationSettings,
    Task,
    TaskKind,
    Training,
)
from protocol.methods import Hypergradient, PF2LoRA
from quantization.fingerprint import fingerprint
from quantization.quantize import quantize

PEER = "PEFT QLoRA"
OURS = {
    "PF2LoRA secant": PF2LoRA(Hypergradient.SECANT),
    "PF2LoRA joint": PF2LoRA(Hypergradient.JOINT),
}
# width, layers, width of the feed-forward part
SIZES = {
    "tiny": (64, 2, 176),
    "100m": (768, 14, 2048),
    "350m": (1024, 28, 2816),
    "1b": (2048, 20, 5632),
    "3b": (3072, 28, 8192),
    "7b": (4096, 32, 11008),
}
Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["100m", "1b", "7b"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--folders", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(_memory(options)))
        return
    print("| backbone | step | time, of QLoRA's | quartiles | peak MiB | of QLoRA's |")
    print("|---|---|---|---|---|---|")
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as place:
            source, held = Path(place, "float"), Path(place, "nf4")
            make_llama(source, size)
            quantize(str(source), "nf4", held)
            options.folders = [str(source), str(held)]
            _print_rows(size, options)


def make_llama(folder: Path, size: str) -> None:
    """A Llama with random bfloat16 weights; 32,000 words, of which the tokenizer knows some."""
    width, layers, inner = SIZES[size]
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def _print_rows(size: str, options: argparse.Namespace) -> None:
    steps = {name: _step(name, options) for name in (PEER, *OURS)}
    found: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(-2, options.turns):
        for name in names[turn % 3 :] + names[: turn % 3]:
            _settle(options)
            started = time.perf_counter()
            steps[name]()
            _settle(options)
            if turn >= 0:
                found[name].append(time.perf_counter() - started)
    steps.clear()  # the card is the memory processes' now
    if options.device == "cuda":
        torch.cuda.empty_cache()
    peaks = {name: _memory_of_process(name, options) for name in names}
    for name in names:
        low, middle, high = np.percentile(np.divide(found[name], found[PEER]), [25, 50, 75])
        print(
            f"| {size} | {name} | {middle:.2f} | {low:.2f} to {high:.2f} "
            f"| {peaks[name]:.0f} | {peaks[name] / max(peaks[PEER], 1):.2f} |",
            flush=True,
        )


def _settle(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def _step(name: str, options: argparse.Namespace) -> Step:
    return _peer_step(options) if name == PEER else _our_step(name, options)


def _our_step(name: str, options: argparse.Namespace) -> Step:
    held = options.folders[1]
    settings = FederationSettings(
        "qlora",
        Backbone(held, fingerprint(Path(held))),
        Task(TaskKind.CAUSAL_LM, (), options.length),
        Adapter(rank=8, personal_rank=2, alpha=16.0),
        Training(local_steps=1, batch_size=options.batch_size),
        OURS[name],
    )
    trainer = load_trainer(
        settings, backbone=None, scheme="nf4", device=options.device, personal_seed=0
    )
    rows = trainer.encode([Example(text, None, None) for text in _texts(options)])
    return lambda: trainer.train(rows, 0, 1)


def _texts(options: argparse.Namespace) -> list[str]:
    """Rows that fill the length."""
    return [
        " ".join(f"w{(7 * row + word) % WORDS}" for word in range(options.length))
        for row in range(options.batch_size)
    ]


def _peer_step(options: argparse.Namespace) -> Step:
    from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    held = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(
        options.folders[0],
        quantization_config=held,
        device_map={"": options.device},
        dtype=torch.bfloat16,
    )
    # As ours: without recomputing activations.
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]
    )
    adapted = get_peft_model(model, config)
    adapted.train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    batch = word_tokenizer()(_texts(options), return_tensors="pt").to(options.device)
    batch["labels"] = batch["input_ids"].clone()

    def step() -> None:
        optimizer.zero_grad()
        adapted(**batch).loss.backward()
        optimizer.step()

    return step


def _memory(options: argparse.Namespace) -> float:
    """MiB at the peak of the load and three steps; on a CPU nothing is known of an allocator."""
    step = _step(options.memory_of, options)
    for _ in range(3):
        step()
    return torch.cuda.max_memory_allocated() / 2**20 if options.device == "cuda" else 0.0


def _memory_of_process(name: str, options: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "benchmarks.qlora_step", *sys.argv[1:]]
    command += ["--folders", *options.folders, "--memory-of", name]
    return float(json.loads(subprocess.check_output(command).splitlines()[-1]))


if __name__ == "__main__":
    main()
