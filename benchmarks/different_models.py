"""Devices whose models differ: pFedLoRA against training alone, each cell a whole federation.

    python -m benchmarks.different_models --search            # learning rates, on rows for choices
    python -m benchmarks.different_models                     # on rows for reporting
    python -m benchmarks.different_models --report

Eight devices share sst2 at heterogeneity 0.5, as in benchmarks.accuracy, and take two backbones in
turn. A mix `depths` is MiniLM and the same cut to every second block, `families` MiniLM and
stories260K, a Llama of width 64 with a tokenizer of its own. A finished cell is one line of
benchmarks/results/different_models.jsonl and is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks import matrix
from benchmarks.matrix import Cell
from benchmarks.simulation import Clock, SimulatedDevice, run_federation
from benchmarks.tasks import STORIES, TASKS, deal, labels_of
from edge_client.backends.torch_backend import load_trainer
from protocol.federation import FederationSettings
from quantization.fingerprint import fingerprint, resolve_backbone

RESULTS = Path(__file__).parent / "results" / "different_models.jsonl"
TASK = TASKS["sst2-s0.5"]
MINILM = TASK.backbone
METHODS = ("pfedlora", "local")
MIXES = ("depths", "families")


def main() -> None:
    options = _parser().parse_args()
    if options.cell:
        matrix.append(RESULTS, run_cell(json.loads(options.cell)))
        return
    if options.report:
        _report()
        return
    done = [matrix.key_of(record["cell"]) for record in matrix.finished(RESULTS)]
    waiting = [cell for cell in _cells(options) if matrix.key_of(cell) not in done]
    print(f"{len(waiting)} cells to run, {options.jobs} at a time", flush=True)
    if failed := matrix.run("benchmarks.different_models", waiting, options.jobs):
        raise SystemExit(f"{failed} cells failed")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=MIXES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--split", choices=["dev", "test"], default="test")
    parser.add_argument("--rounds", type=int, default=TASK.rounds)
    parser.add_argument("--learning-rate", type=float, help="instead of the one found best")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--search", action="store_true", help="the cells that find learning rates")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser


def _cells(options: argparse.Namespace) -> list[Cell]:
    cells = []
    for mix in options.mixes:
        for method in options.methods:
            cell = {"mix": mix, "method": method, "set": sorted(options.set)}
            if options.search:
                half = {"seed": 0, "split": "dev", "rounds": TASK.rounds // 2}
                cells += [{**cell, **half, "learning_rate": r} for r in TASK.learning_rates]
                continue
            rate = options.learning_rate or _best_rate(cell)
            whole = {"split": options.split, "rounds": options.rounds, "learning_rate": rate}
            cells += [{**cell, **whole, "seed": seed} for seed in options.seeds]
    return cells


def _best_rate(cell: Cell) -> float:
    """The rate of the best mean accuracy on the rows for choices."""
    found = {
        record["cell"]["learning_rate"]: np.mean([d["accuracy"] for d in record["personal"]])
        for record in matrix.finished(RESULTS)
        if all(record["cell"][name] == cell[name] for name in ("mix", "method", "set"))
        and record["cell"]["split"] == "dev"
    }
    if set(TASK.learning_rates) - set(found):
        raise SystemExit(f"{cell}: run --search first, or give --learning-rate")
    return max(TASK.learning_rates, key=lambda rate: found[rate])


def run_cell(cell: Cell) -> dict[str, Any]:
    """Run one federation; its record, with each device's scores at either level."""
    started, clock = time.perf_counter(), Clock()
    shares, labels = deal(TASK, cell["split"], cell["seed"]), labels_of(TASK)
    settings = settings_of(cell, len(shares), labels)
    with tempfile.TemporaryDirectory() as folder:
        other = STORIES if cell["mix"] == "families" else str(cut(Path(folder)))
        trainers = [
            load_trainer(settings, backbone=name, scheme="bf16", device="cpu", personal_seed=0)
            for name in (MINILM, other)
        ]
    if settings.backbone is not None:
        # Nothing is sent in `local`, so nothing has to fit.
        trainers[1].fingerprint = settings.fingerprint
    devices = [
        SimulatedDevice(
            f"device-{number}",
            1000 * cell["seed"] + number,
            trainers[number % 2].encode(share.training),
            len(share.training),
            [share],
            trainers[number % 2],
            settings,
            cell["rounds"],
            0,
            clock,
        )
        for number, share in enumerate(shares)
    ]
    run_federation(settings, trainers[0], devices)
    scores = {
        level: [device.results[cell["rounds"], level][0] for device in devices]
        for level in ("personal", "common")
    }
    sent_bytes = sum(device.sent_bytes for device in devices) // len(devices)
    facts = {"training_s": round(clock.training_s, 1), "sent_bytes": sent_bytes}
    return {"cell": cell, **scores, **facts, "took_s": round(time.perf_counter() - started, 1)}


def settings_of(cell: Cell, devices: int, labels: tuple[str, ...]) -> FederationSettings:
    """The federation that a cell is."""
    table: dict[str, Any] = {
        "name": "benchmark",
        "task": {"kind": TASK.kind.value, "labels": list(labels), "max_length": TASK.max_length},
        "training": {"learning_rate": cell["learning_rate"]},
        "algorithm": {"name": cell["method"]},
        "rounds": {
            "count": cell["rounds"],
            "cohort": devices,
            "minimum_reports": devices,
            "deadline_s": 1e6,
        },
        "seed": cell["seed"],
    }
    if cell["method"] == "local":
        table["backbone"] = {"name": MINILM, "fingerprint": fingerprint(resolve_backbone(MINILM))}
    return matrix.settings_from(table, cell["set"])


def cut(folder: Path) -> Path:
    """MiniLM's first, third and fifth block as a model of three."""
    source = resolve_backbone(MINILM)
    for file in source.iterdir():
        if file.suffix in (".json", ".txt"):
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    tensors = {}
    for name, array in load_file(source / "model.safetensors").items():
        parts = name.split(".")
        if "layer" in parts:
            place = parts.index("layer") + 1
            if int(parts[place]) % 2:
                continue
            parts[place] = str(int(parts[place]) // 2)
        tensors[".".join(parts)] = array
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _report() -> None:
    """Means over devices and seeds, for each half of the devices and for all."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in matrix.finished(RESULTS):
        cell = {name: value for name, value in record["cell"].items() if name != "seed"}
        groups.setdefault(matrix.key_of(cell), []).append(record)
    for key, records in sorted(groups.items()):
        cell = json.loads(key)
        print(*(cell[n] for n in ("mix", "method", "split", "rounds", "learning_rate", "set")))
        for level in ("personal", "common"):
            for metric in ("accuracy", "balanced_accuracy", "loss"):
                by_seed = np.array([[d[metric] for d in record[level]] for record in records])
                halves = f"{by_seed[:, ::2].mean():.3f} {by_seed[:, 1::2].mean():.3f}"
                seeds = " ".join(f"{mean:.3f}" for mean in by_seed.mean(1))
                text = f"halves {halves}  all {by_seed.mean():.3f} ({seeds})"
                print(f"  {level:8} {metric:17} {text}")
        costs = ((record["training_s"], record["sent_bytes"]) for record in records)
        print("  processor s of training, bytes sent a device:", *costs)


if __name__ == "__main__":
    main()
