"""A whole federation in one thread: the real service, sessions and messages, one model for all.

Links are in memory and the clock is virtual, so nothing but training and evaluation takes time.
Every device evaluates what it receives before it trains on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from benchmarks.tasks import DeviceRows
from coordinator.enrolment import Gate
from coordinator.fake_server import FakeServer
from coordinator.roster import Roster
from coordinator.service import FederationService
from coordinator.store.memory import MemoryStore
from edge_client.backends.base import Arrays, LabelMix, Level, Prediction
from edge_client.backends.encoding import EncodedRows
from edge_client.backends.torch_backend import TorchTrainer
from edge_client.data import Example
from edge_client.errors import ConfigurationError
from edge_client.identity import Identity
from edge_client.session import FinishedReport, Offer, Session
from protocol.fake_link import FakeLink
from protocol.federation import FederationSettings, TaskKind
from protocol.link import Link
from protocol.messages import Assignment, Metric, Receipt
from protocol.tensors import NamedTensors
from protocol.virtual_time import at_once, simulate

# How long a text of a causal task may get.
GENERATED_TOKENS = 100


@dataclass
class Clock:
    """Processor seconds of training, without evaluation: other cells may run beside this one."""

    training_s: float = 0.0


@dataclass
class SimulatedDevice:
    """A session's Worker that borrows the one model whenever it has something to do.

    `results` has, by rounds done and level, the evaluation of each set of rows; where it can be had
    also that of answers for an even mix of labels.
    """

    name: str
    seed: int
    training: EncodedRows
    training_count: int
    evaluation: list[DeviceRows]
    trainer: TorchTrainer
    settings: FederationSettings
    every: int
    generated_rows: int  # how many texts a device writes at the end of a causal task
    clock: Clock
    personal: Arrays | None = None
    optimizer: Arrays = field(default_factory=dict)
    results: dict[tuple[int, str], list[dict[str, float]]] = field(default_factory=dict)
    report: FinishedReport | None = None
    links: list[FakeLink] = field(default_factory=list)
    sent_bytes: int = 0
    received_bytes: int = 0

    async def prepare(self, settings: FederationSettings) -> None:
        pass

    def offer(self) -> Offer:
        self._take_model()
        return Offer(self.trainer.fingerprint, self.training_count, self.trainer.rank)

    def held(self, digest: bytes) -> NamedTensors | None:
        return None

    def unsent(self) -> FinishedReport | None:
        return self.report

    async def train(self, assignment: Assignment, base: NamedTensors) -> FinishedReport:
        done = assignment.round - 1
        self._take_model()
        self.trainer.set_common(base)
        if done % self.every == 0 and done:
            self._evaluate(done, Level.PERSONAL)
            self.trainer.set_common(base)
        started = time.process_time()
        steps = self.settings.training.local_steps
        result = self.trainer.train(self.training, done * steps, assignment.round)
        update = self.trainer.update_from(base)
        self.clock.training_s += time.process_time() - started
        self.personal = self.trainer.personal()
        self.optimizer = self.trainer.optimizer_state()
        self.report = FinishedReport(
            assignment.assignment,
            assignment.round,
            assignment.base_version,
            self.training_count,
            (Metric("loss", result.mean_loss),),
            update,
        )
        return self.report

    async def settled(self, receipt: Receipt) -> None:
        self.report = None
        self._count_bytes()

    async def finish(self, base: NamedTensors, rounds: int) -> None:
        self._count_bytes()
        self._take_model()
        self.trainer.set_common(base)
        for level in (Level.PERSONAL, Level.COMMON):
            self._evaluate(rounds, level)
            if self.settings.task.labels:
                self._evaluate_for_even_mix(rounds, level)
            if self.settings.task.kind is TaskKind.CAUSAL_LM and self.generated_rows:
                found = self.results[rounds, level.name.lower()]
                for one, rows in zip(found, self.evaluation, strict=True):
                    one |= generated(self.trainer, rows.evaluation[: self.generated_rows], level)

    def _take_model(self) -> None:
        self.trainer.become(self.seed)
        if self.personal is not None:
            self.trainer.set_personal(self.personal)
            self.trainer.set_optimizer_state(self.optimizer)

    def _evaluate(self, done: int, level: Level) -> None:
        if level is Level.PERSONAL:
            self.trainer.personalise(self.training)
        self.results[done, level.name.lower()] = [
            measured(self.trainer, rows, level) for rows in self.evaluation
        ]

    def _evaluate_for_even_mix(self, done: int, level: Level) -> None:
        with contextlib.suppress(ConfigurationError):  # not every model can answer so
            self.results[done, f"{level.name.lower()} even"] = [
                measured(self.trainer, rows, level, LabelMix.EVEN) for rows in self.evaluation
            ]

    def _count_bytes(self) -> None:
        for link in self.links:
            self.sent_bytes += sum(map(len, link.sent))
            self.received_bytes += sum(map(len, link.other.sent))
            link.sent.clear()
            link.other.sent.clear()


def measured(
    trainer: TorchTrainer, rows: DeviceRows, level: Level, mix: LabelMix = LabelMix.OWN
) -> dict[str, float]:
    """A device's scores on its own rows; of a causal task accuracy and loss a token."""
    by_length = sorted(rows.evaluation, key=lambda row: len(row.text))
    if by_length[0].label is None:
        found = trainer.evaluate(trainer.encode(by_length), level)
        found_scores = {**found.scores, "loss": found.loss}
        found_scores.pop("perplexity", None)  # is the loss once more, and its mean is not a mean's
        return found_scores
    said = trainer.predict(by_length, level, mix)
    probabilities = [one.probabilities for one in said if isinstance(one, Prediction)]
    return scores(np.array(probabilities, np.float64), labels_in(by_length))


def labels_in(rows: Sequence[Example]) -> np.ndarray:
    """The labels of rows that all have one, [n]."""
    return np.array([row.label for row in rows], np.int64)


def generated(trainer: TorchTrainer, rows: list[Example], level: Level) -> dict[str, float]:
    """BLEU (sacrebleu) and ROUGE-L, 0 to 100, of what is written for some rows."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    wanted = [(row.text_pair or "").strip() for row in rows]
    said = [trainer.generate(row.text, GENERATED_TOKENS, level).strip() for row in rows]
    rouge = RougeScorer(["rougeL"])
    fits = [rouge.score(a, b)["rougeL"].fmeasure for a, b in zip(wanted, said, strict=True)]
    bleu = sacrebleu.corpus_bleu(said, [wanted]).score
    return {"bleu": bleu, "rouge_l": 100 * float(np.mean(fits))}


def scores(probabilities: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Scores of class probabilities [n, classes] against labels [n].

    Matthews correlation is Gorodkin's for any number of classes; 0 where it is undefined.
    """
    chosen = probabilities.argmax(1)
    right = chosen == wanted
    recalls = [right[wanted == label].mean() for label in np.unique(wanted)]
    likelihood = np.maximum(probabilities[np.arange(len(wanted)), wanted], 1e-12)
    classes = probabilities.shape[1]
    said, true = np.bincount(chosen, minlength=classes), np.bincount(wanted, minlength=classes)
    count = len(wanted)
    spread = (count**2 - (said @ said)) * (count**2 - (true @ true))
    matthews = (right.sum() * count - said @ true) / np.sqrt(spread) if spread else 0.0
    return {
        "accuracy": float(right.mean()),
        "balanced_accuracy": float(np.mean(recalls)),
        "loss": float(-np.log(likelihood).mean()),
        "matthews": float(matthews),
    }


def run_federation(
    settings: FederationSettings, trainer: TorchTrainer, devices: Sequence[SimulatedDevice]
) -> None:
    """All rounds, to the end."""

    async def scenario() -> None:
        clock, store = asyncio.get_running_loop().time, MemoryStore()
        service = FederationService(
            settings,
            trainer.common(),
            store,
            rng=random.Random(settings.seed),
            run_blocking=at_once,
            read_aside=lambda read: at_once(partial(read, store)),
            clock=clock,
        )
        await service.open()
        gate = Gate(store.devices, is_open=True, run_blocking=at_once, clock=clock)
        server = FakeServer(service, Roster(), gate)

        def session(device: SimulatedDevice) -> Session:
            rng = random.Random(device.seed)

            async def dial() -> Link:
                device.links.append(server.dial(rng))
                return device.links[-1]

            identity = Identity.named(device.name)
            return Session(dial, device, federation=settings.name, identity=identity, rng=rng)

        await asyncio.gather(*(session(device).run() for device in devices))
        service.close()

    simulate(scenario)
