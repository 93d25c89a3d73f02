"""The Trainer contract: a model with two levels of LoRA on some runtime. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edge_client.algorithms.base import LocalResult, nothing
from edge_client.backends.encoding import EncodedRows
from edge_client.data import Example
from edge_client.factors import RankReport
from protocol.tensors import NamedTensors

Arrays = dict[str, np.ndarray[Any, Any]]


class Level(Enum):
    """How much of the adapter is at work. The value counts the levels on top of the backbone."""

    BACKBONE = 0
    COMMON = 1
    PERSONAL = 2


class LabelMix(Enum):
    """For rows of which mix of labels a classifier answers: this device's own, or all alike."""

    OWN = "own"
    EVEN = "even"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """On some rows: the mean loss, the share answered right, and what its kind of task adds.

    Classification adds `balanced_accuracy`, the mean of the accuracy over the labels present. For
    causal LM the loss is per token, accuracy the share of next tokens foretold, and `perplexity`
    exp(loss). For question answering accuracy is SQuAD's exact match, and `f1` the mean overlap in
    words. What another kind adds is None.
    """

    count: int
    loss: float
    accuracy: float
    balanced_accuracy: float | None = None
    perplexity: float | None = None
    f1: float | None = None

    @property
    def scores(self) -> dict[str, float]:
        """All but the loss, each under its usual name; the accuracy first."""
        added = {
            "balanced_accuracy": self.balanced_accuracy,
            "perplexity": self.perplexity,
            "f1": self.f1,
        }
        name = "accuracy" if self.f1 is None else "exact_match"
        return {name: self.accuracy} | {k: v for k, v in added.items() if v is not None}


@dataclass(frozen=True, slots=True)
class Prediction:
    """A label and the probabilities of all labels, in the task's order."""

    label: str
    probabilities: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class FoundAnswer:
    """The likeliest answer in a context: its text, which is `context[start:end]`.

    `probability` is its share among all spans of the context that could be answers.
    """

    text: str
    start: int
    end: int
    probability: float


@dataclass(frozen=True, slots=True)
class Export:
    """What was written: the rank of each layer, and evaluations on the rows given, if any.

    `full` is with all of r + r2, `written` with what the files hold.
    """

    ranks: dict[str, int]
    full: Evaluation | None
    written: Evaluation | None


class Trainer(Protocol):
    """One device's model. Arrays are float32."""

    fingerprint: str

    def encode(self, rows: Sequence[Example]) -> EncodedRows:
        """Tokenised rows, to be used again and again."""

    def common(self) -> NamedTensors:
        """The common adapter, float32."""

    def set_common(self, base: NamedTensors) -> None:
        """Take over a base version; refuses other names or shapes.

        Where devices have ranks of their own, one of a lower rank is filled up with zeros.
        """

    def update_from(self, base: NamedTensors) -> NamedTensors:
        """The common adapter minus a base version: in the federation's dtype, of our rank.

        To be asked once a round: what a lossy dtype loses is remembered for the next update.
        """

    def personal(self) -> Arrays:
        """A copy of the personal adapter."""

    def set_personal(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Take over a personal adapter; refuses other names or shapes."""

    def optimizer_state(self) -> Arrays:
        """A copy of what the algorithm remembers."""

    def set_optimizer_state(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Take over what the algorithm remembered."""

    @property
    def rank(self) -> int:
        """How much of the common adapter's rank this device works with; 0 is all."""

    def train(
        self,
        rows: EncodedRows,
        first_step: int,
        round_number: int,
        before_step: Callable[[], None] = nothing,
    ) -> LocalResult:
        """One round's local steps, `first_step` being how many this device has taken before.

        `before_step` may look at the model, and end the round by raising; what it changes of the
        adapters it must put back.
        """

    def personalise(self, rows: EncodedRows) -> None:
        """Make what is the device's own from the present common adapter and its training rows.

        For methods that adapt it by training steps, and where the loss asks for the label shares;
        the common adapter itself stays.
        """

    def evaluate(self, rows: EncodedRows, level: Level, mix: LabelMix = LabelMix.OWN) -> Evaluation:
        """Loss and accuracy at a level."""

    def predict(
        self, rows: Sequence[Example], level: Level, mix: LabelMix = LabelMix.OWN
    ) -> list[Prediction] | list[FoundAnswer]:
        """The likeliest label of each row, or the likeliest answer in its context."""

    def generate(self, prompt: str, new_tokens_max: int, level: Level) -> str:
        """The likeliest continuation of a prompt, for a causal LM."""

    def rank_report(self) -> dict[str, RankReport]:
        """The learned rank of each adapted layer."""

    def save_pretrained(
        self, folder: Path, base_model: str, ranks: Mapping[str, int], rows: EncodedRows
    ) -> Export:
        """Write both levels as one LoRA in PEFT's layout, cut to a rank for each layer named.

        Evaluates what was cut off on `rows`; empty rows are not evaluated.
        """
