"""The accuracy matrix: task x method x seed, each cell a whole federation in one process.

    python -m benchmarks.accuracy --search         # learning rates, on rows for choices
    python -m benchmarks.accuracy                  # the matrix, on rows for reporting
    python -m benchmarks.accuracy --report         # tables and plots of what there is
    python -m benchmarks.accuracy --tasks sst2-s0.5 --methods pf2lora --seeds 0 \\
        --split dev --set algorithm.lower_learning_rate=0.003

A finished cell is one line of benchmarks/results/accuracy.jsonl and is never run again. All methods
have the same rounds, local steps and batches, and the same two learning rates to choose from; each
is run with the one that was best on the rows for choices. The rest of its settings are the
federation's defaults, unless `--set` says otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import matrix
from benchmarks.matrix import Cell
from benchmarks.report import write_report
from benchmarks.simulation import Clock, SimulatedDevice, labels_in, run_federation, scores
from benchmarks.tasks import TASKS, DeviceRows, Task, deal, labels_of
from edge_client.backends.torch_backend import load_trainer
from edge_client.splits import seeded
from protocol.federation import FederationSettings
from quantization.backbone import resolve_backbone
from quantization.fingerprint import fingerprint

RESULTS = Path(__file__).parent / "results" / "accuracy.jsonl"
# Centralised training takes the steps of all devices one after the other: as many rates, and lower.
CENTRALISED_SHARE = 1 / 4
# So often a run is evaluated, evenly over its rounds.
EVALUATIONS = 4
# Of a causal task, how many texts every device writes in a report; choices are made by the loss.
GENERATED_ROWS = 10
TIER_1 = ["sst2-s0.5", "sst2-s0.9", "clinc150", "cola-s0.5", "webnlg"]
# Centralised training is HOMLoRA on one device that has everybody's rows, and as many steps.
METHODS: dict[str, dict[str, Any]] = {
    "pf2lora": {"name": "pf2lora"},
    "homlora": {"name": "homlora"},
    "local": {"name": "local"},
    "per-fedavg": {"name": "per-fedavg"},
    "per-fedavg-hf": {"name": "per-fedavg", "hessian_free": True},
    "hetlora": {"name": "hetlora"},
    "ffa-lora": {"name": "ffa-lora"},
    "fedsa-lora": {"name": "fedsa-lora"},
    "feddpa": {"name": "feddpa"},
    "centralised": {"name": "homlora"},
}


def main() -> None:
    options = _parser().parse_args()
    if options.cell:
        matrix.append(RESULTS, run_cell(json.loads(options.cell)))
    elif options.report:
        write_report(matrix.finished(RESULTS), list(METHODS), RESULTS.parent)
    else:
        _run_matrix(_cells(options), options.jobs, again=options.again)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", type=_task, default=TIER_1, metavar="TASK")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rounds", type=int, help="instead of the task's own number")
    parser.add_argument("--split", choices=["dev", "test"], default="test")
    parser.add_argument("--scheme", default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=0, help="training rows a device; 0: all it has")
    parser.add_argument("--devices", type=int, help="instead of the task's own number")
    parser.add_argument("--learning-rate", type=float, help="instead of the one found best")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--search", action="store_true", help="the cells that find learning rates")
    parser.add_argument("--again", action="store_true", help="run finished cells and compare")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser


def _task(name: str) -> str:
    """A task's name; a data set's stands for its first task."""
    for task in TASKS:
        if name in (task, TASKS[task].folder):
            return task
    raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(TASKS)}")


def _cells(options: argparse.Namespace) -> list[Cell]:
    common = {"scheme": options.scheme, "device": options.device, "rows": options.rows}
    if options.devices:
        common["devices"] = options.devices
    cells, records = [], matrix.finished(RESULTS)
    for task in options.tasks:
        for method in options.methods:
            rounds = options.rounds or TASKS[task].rounds
            cell = {"task": task, "method": method, **common, "set": sorted(options.set)}
            if options.search:
                half = {"seed": 0, "split": "dev", "rounds": rounds // 2, "every": rounds // 2}
                cells += [{**cell, **half, "learning_rate": rate} for rate in _rates(task, method)]
                continue
            rate = options.learning_rate or best_learning_rate(records, task, method)
            whole = {
                "split": options.split,
                "rounds": rounds,
                "every": max(1, rounds // EVALUATIONS),
            }
            cells += [{**cell, **whole, "seed": s, "learning_rate": rate} for s in options.seeds]
    return sorted(cells, key=lambda cell: cell["seed"])


def best_learning_rate(records: list[dict[str, Any]], task: str, method: str) -> float:
    """The rate that was best at the personal level on the rows for choices."""
    found = {
        record["cell"]["learning_rate"]: _goodness(TASKS[task], record["curve"][-1])
        for record in records
        if record["cell"]["task"] == task
        and record["cell"]["method"] == method
        and record["cell"]["split"] == "dev"
        and record["cell"]["rounds"] == TASKS[task].rounds // 2
        and not record["cell"]["set"]
    }
    rates = _rates(task, method)
    if set(rates) - set(found):
        raise SystemExit(f"{task} {method}: run --search first, or give --learning-rate")
    return float(max(rates, key=found.__getitem__))


def _rates(task: str, method: str) -> list[float]:
    share = CENTRALISED_SHARE if method == "centralised" else 1
    return [share * rate for rate in TASKS[task].learning_rates]


def _goodness(task: Task, point: dict[str, float]) -> float:
    """What a rate is chosen by: the task's metric; the loss where that is of written text."""
    return -point["loss"] if task.causal else point[task.metric]


# --- the runner -----------------------------------------------------------------------------------


def _run_matrix(cells: list[Cell], jobs: int, *, again: bool) -> None:
    recorded = {matrix.key_of(record["cell"]): record for record in matrix.finished(RESULTS)}
    waiting = [cell for cell in cells if again or matrix.key_of(cell) not in recorded]
    print(f"{len(cells)} cells, {len(waiting)} to run, {jobs} at a time", flush=True)
    failed = matrix.run("benchmarks.accuracy", waiting, jobs)
    if again:
        _compare(cells, recorded)
    if failed:
        raise SystemExit(f"{failed} cells failed")


def _compare(cells: list[Cell], recorded: dict[str, dict[str, Any]]) -> None:
    """Say whether what was run again came out as it was."""
    fresh = {matrix.key_of(record["cell"]): record for record in matrix.finished(RESULTS)}
    for cell in cells:
        before, now = recorded.get(matrix.key_of(cell)), fresh[matrix.key_of(cell)]
        name = f"{cell['task']} {cell['method']} seed {cell['seed']}"
        if before is None:
            print(f"{name}: first run")
        else:
            same = _scores(before) == _scores(now)
            print(f"{name}: {'the same to the digit' if same else 'DIFFERENT'}")
        print(json.dumps(now["curve"][-1]))


def _scores(record: dict[str, Any]) -> list[dict[str, float]]:
    """The curve without times, which no two runs share, and bytes, which follow the protocol."""
    left_out = ("training_s", "sent_bytes", "received_bytes")
    return [{k: v for k, v in at.items() if k not in left_out} for at in record["curve"]]


# --- a cell ---------------------------------------------------------------------------------------


def settings_of(cell: Cell, devices: int, labels: tuple[str, ...]) -> FederationSettings:
    """The federation that a cell is."""
    central = cell["method"] == "centralised"
    task = TASKS[cell["task"]]
    table: dict[str, Any] = {
        "name": "benchmark",
        "backbone": {
            "name": task.backbone,
            "fingerprint": fingerprint(resolve_backbone(task.backbone)),
        },
        "task": {
            "kind": task.kind.value,
            "labels": list(labels),
            "max_length": task.max_length,
        },
        "training": {
            "learning_rate": cell["learning_rate"],
            "local_steps": 10 * devices if central else 10,
        },
        "algorithm": dict(METHODS[cell["method"]]),
        "rounds": {
            "count": cell["rounds"],
            "cohort": 1 if central else devices,
            "minimum_reports": 1 if central else devices,
            "deadline_s": 1e6,
        },
        "seed": cell["seed"],
    }
    return matrix.settings_from(table, cell["set"])


def run_cell(cell: Cell) -> dict[str, Any]:
    """Run one federation; its record."""
    task, seed = TASKS[cell["task"]], cell["seed"]
    task = replace(task, devices=cell.get("devices", task.devices))
    shares = deal(task, cell["split"], seed)
    if cell["rows"]:
        shares = [_cut(share, cell["rows"], seed) for share in shares]
    labels = labels_of(task)
    settings = settings_of(cell, len(shares), labels)
    trainer = load_trainer(
        settings, backbone=None, scheme=cell["scheme"], device=cell["device"], personal_seed=0
    )
    owners = [[share] for share in shares]
    if cell["method"] == "centralised":
        owners = [shares]
    clock, started = Clock(), time.perf_counter()
    devices = [
        SimulatedDevice(
            f"device-{number}",
            1000 * seed + number,
            trainer.encode([row for share in owned for row in share.training]),
            sum(len(share.training) for share in owned),
            owned,
            trainer,
            settings,
            cell["every"],
            GENERATED_ROWS if cell["split"] == "test" else 0,
            clock,
        )
        for number, owned in enumerate(owners)
    ]
    run_federation(settings, trainer, devices)
    rounds = sorted({done for done, _ in devices[0].results})
    sizes = [len(device.training) for device in shares]
    record = {
        "cell": cell,
        "curve": [_point(devices, done, clock, cell["rounds"]) for done in rounds],
        "devices": _of_all(devices, cell["rounds"], "personal"),
        "devices_common": _of_all(devices, cell["rounds"], "common"),
        "majority": _majority(shares, len(labels)) if labels else None,
        "training_rows": sizes,
        "took_s": round(time.perf_counter() - started, 1),
    }
    if (cell["rounds"], "personal even") in devices[0].results:
        record["even_mix"] = {
            "devices": _of_all(devices, cell["rounds"], "personal even"),
            "devices_common": _of_all(devices, cell["rounds"], "common even"),
        }
    return record


def _cut(share: DeviceRows, rows: int, seed: int) -> DeviceRows:
    """So many of a device's training rows at most; files have their labels one after another."""
    order = seeded("rows", seed).permutation(len(share.training))[:rows]
    return DeviceRows([share.training[at] for at in sorted(order)], share.evaluation)


def _of_all(devices: list[SimulatedDevice], done: int, level: str) -> list[dict[str, float]]:
    found = [one for device in devices for one in device.results[done, level]]
    return [{name: round(value, 5) for name, value in one.items()} for one in found]


def _point(
    devices: list[SimulatedDevice], done: int, clock: Clock, rounds: int
) -> dict[str, float]:
    """Means over devices after some rounds. Bytes and times grow evenly with the rounds."""
    share = done / rounds / len(devices)
    return {
        "round": done,
        **_means(_of_all(devices, done, "personal")),
        "sent_bytes": round(share * sum(device.sent_bytes for device in devices)),
        "received_bytes": round(share * sum(device.received_bytes for device in devices)),
        "training_s": round(share * clock.training_s, 2),
    }


def _means(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(float(np.mean([one[name] for one in found])), 5) for name in found[0]}


def _majority(shares: list[DeviceRows], classes: int) -> dict[str, float]:
    """What is had by answering with the label counts of a device's training rows."""
    found = []
    for share in shares:
        counts = np.bincount(labels_in(share.training), minlength=classes) + 1e-6
        wanted = labels_in(share.evaluation)
        found.append(scores(np.tile(counts / counts.sum(), (len(wanted), 1)), wanted))
    return _means(found)


if __name__ == "__main__":
    main()
