"""What a quantised backbone takes in memory: to load, and to train, on a CPU.

    python -m benchmarks.quantized_memory                       # a Llama of 312 M, made here
    python -m benchmarks.quantized_memory --layers 16 --width 768

A Llama with random weights is written, and quantised in each scheme. Every figure is the peak
resident memory of a process of its own, less what that process held before the load with all
libraries imported (a tiny model of the same kind has been loaded and has run), over the bytes of
the tensors on disk. "Step" is the peak of two-level training steps after the load, less the same.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.step_cost import _status
from edge_client.backends.torch_backend import TorchTrainer
from edge_client.data import Example
from protocol.federation import (
    Adapter,
    Backbone,
    FederationSettings,
    Task,
    TaskKind,
    Training,
)
from protocol.methods import PF2LoRA
from quantization.backbone import load_backbone
from quantization.fingerprint import fingerprint
from quantization.quantize import quantize

WORDS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--schemes", nargs="+", default=["int8", "nf4", "nf4-double"])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        folder, tiny, scheme = options.measure
        print(json.dumps(measure(folder, tiny, scheme, options.batch_size, options.length)))
        return
    with tempfile.TemporaryDirectory() as place:
        _run(Path(place), options)


def _run(place: Path, options: argparse.Namespace) -> None:
    source = make_llama(place / "float", options.width, options.layers)
    tiny = make_llama(place / "tiny", 64, 1)
    float_bytes = (source / "model.safetensors").stat().st_size
    print(f"{float_bytes / 4e6:.0f} M parameters, {float_bytes / 2**20:.0f} MiB in float32")
    print("| scheme | MiB | load, of that | step, MiB | below float32's by | weights save |")
    print("|---|---|---|---|---|---|")
    exact: dict[str, float] = {}
    for scheme in ("none", *options.schemes):
        folder, small, size = source, tiny, float_bytes
        if scheme != "none":
            folder, small = place / scheme, place / f"tiny-{scheme}"
            size = quantize(str(source), scheme, folder).total_bytes
            quantize(str(tiny), scheme, small)
        found = measured(folder, small, scheme, options.batch_size, options.length)
        exact = exact or found
        saved = (exact["step_bytes"] - found["step_bytes"]) / 2**20
        print(
            f"| {scheme} | {size / 2**20:.0f} | {found['load_bytes'] / size:.2f} "
            f"| {found['step_bytes'] / 2**20:.0f} | {saved:.0f} "
            f"| {(float_bytes - size) / 2**20:.0f} |",
            flush=True,
        )


def make_llama(folder: Path, width: int, layers: int) -> Path:
    """A Llama with random weights and a tokenizer of WORDS words, written to `folder`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="100GB")
    word_tokenizer().save_pretrained(folder)
    return folder


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: w2, w3, and so on, WORDS of them with the two special ones."""
    words = {"<end>": 0, "<unk>": 1} | {f"w{number}": number for number in range(2, WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>", pad_token="<end>"
    )


def measured(
    folder: Path, tiny: Path, scheme: str, batch_size: int, length: int
) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.quantized_memory"]
    command += ["--batch-size", str(batch_size), "--length", str(length)]
    command += ["--measure", str(folder), str(tiny), scheme]
    found: dict[str, float] = json.loads(subprocess.check_output(command).splitlines()[-1])
    return found


def measure(folder: str, tiny: str, scheme: str, batch_size: int, length: int) -> dict[str, float]:
    """Bytes above what was held before: at the peak of the load, and of two training steps."""
    _train(_trainer(tiny, scheme, 1, 8), 1, 8)
    gc.collect()
    before = _reset_peak()
    trainer = _trainer(folder, scheme, batch_size, length)
    load_bytes = _peak() - before
    _reset_peak()
    _train(trainer, batch_size, length)
    return {"load_bytes": load_bytes, "step_bytes": _peak() - before}


def _reset_peak() -> float:
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS") * 2**20


def _peak() -> float:
    return _status("VmHWM") * 2**20


def _trainer(folder: str, scheme: str, batch_size: int, length: int) -> TorchTrainer:
    settings = FederationSettings(
        "memory",
        Backbone(folder, fingerprint(Path(folder))),
        Task(TaskKind.CAUSAL_LM, (), length),
        Adapter(rank=8, personal_rank=2, alpha=16.0),
        Training(local_steps=1, batch_size=batch_size),
        PF2LoRA(),
    )
    loaded: Any = load_backbone(folder, scheme=scheme, task="causal-lm")
    return TorchTrainer(settings, loaded, personal_seed=0)


def _train(trainer: TorchTrainer, batch_size: int, length: int) -> None:
    texts = [" ".join(f"w{(7 * i + n) % WORDS}" for n in range(length)) for i in range(batch_size)]
    rows = trainer.encode([Example(text, None, None) for text in texts])
    for step in range(2):
        trainer.train(rows, step, 1)


if __name__ == "__main__":
    main()
