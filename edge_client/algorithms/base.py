"""Local training as small functions over a gradient oracle.

An algorithm says what it trains, what it sends, and how it takes a step. It sees the model only as
two live vectors, the common parameters [P_c] and the personal parameters [P_p], and their gradients
on a batch; vectors are NumPy's or torch's, so one algorithm serves every backend.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from edge_client.algorithms.optimizers import adamw_step, clipped
from protocol.federation import Adapter, Group, Training

# A flat float vector that supports + - * / ** and their in-place forms: NumPy's or torch's.
Vector = Any
Batch = Any


@dataclass(frozen=True, slots=True)
class Gradients:
    """Mean loss of a batch and its gradients; the vectors are the caller's until the next call."""

    loss: float
    common: Vector
    personal: Vector


class GradientOracle(Protocol):
    """A backend, as algorithms see it."""

    @property
    def common(self) -> Vector:
        """Live view of the common parameters, [P_c]."""

    @property
    def personal(self) -> Vector:
        """Live view of the personal parameters, [P_p]."""

    @property
    def personal_head(self) -> Vector:
        """1 where a personal parameter is of the task's head, 0 elsewhere, [P_p]."""

    def gradients(self, batch: Batch) -> Gradients:
        """Loss and gradients at the present parameters."""

    def local_gradients(self, batch: Batch) -> Gradients:
        """The same with the common level switched off; the common gradient is zero.

        Raises:
            ConfigurationError: this backend cannot.
        """

    def mixed_product(self, batch: Batch, vector: Vector) -> Vector:
        """`[d2 loss / d common d personal] vector`, [P_c], at the present parameters.

        Raises:
            ConfigurationError: this backend has first-order gradients only.
        """

    def factors(self, vector: Vector) -> list[tuple[Vector, Vector]]:
        """Views (A [r, n], B [m, r]) of every adapted layer into a vector like `common`."""

    def personal_factors(self, vector: Vector) -> list[tuple[Vector, Vector]]:
        """Views (C [r2, n], D [m, r2]) of every adapted layer into a vector like `personal`."""


@dataclass(slots=True)
class AlgorithmState:
    """What an algorithm remembers from round to round, on the device: named vectors."""

    vectors: dict[str, Vector] = field(default_factory=dict)

    def forget_moments(self) -> None:
        """Let the optimizers begin anew; what else is remembered stays."""
        for name in [n for n in self.vectors if n.startswith(("upper.", "lower."))]:
            del self.vectors[name]


@dataclass(frozen=True, slots=True)
class Layout:
    """The ranks of both levels, the head's group, and which factors are trained in which group.

    Of the factors A, B (common rank) and C, D (personal rank) those named in neither `common` nor
    `personal` stay as they were drawn. With a `shared_width` layers have A and B together, one pair
    a slot, and projections P, Q of their own.
    """

    common_rank: int
    personal_rank: int
    head: Group
    common: str = "AB"
    personal: str = "CD"
    shared_width: int = 0
    slots: int = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """What a step is told: settings with the round's learning rate, and where in the run it is.

    `factor` is what the round's schedule multiplies every learning rate by; `training` has it in
    already. `round` counts from 1, `step` from 0 within the round.
    """

    training: Training
    factor: float = 1.0
    round: int = 1
    step: int = 0


@dataclass(frozen=True, slots=True)
class LocalResult:
    """One round's local training. Losses are means over a batch, before its step."""

    mean_loss: float
    last_loss: float
    steps: int


class Algorithm(abc.ABC):
    """What is trained, sent, and how."""

    batches_per_step: ClassVar[int] = 1

    @abc.abstractmethod
    def layout(self, adapter: Adapter) -> Layout:
        """The shape of both levels under this algorithm."""

    @abc.abstractmethod
    def step(
        self, oracle: GradientOracle, batches: Sequence[Batch], state: AlgorithmState, plan: Plan
    ) -> float:
        """One local step on `batches_per_step` batches; the loss before it."""

    def rank(self, state: AlgorithmState) -> int:  # noqa: ARG002
        """How much of the common rank this device works with; 0 is all."""
        return 0

    def end_round(  # noqa: B027 - most methods have nothing to do
        self, oracle: GradientOracle, state: AlgorithmState, plan: Plan
    ) -> None:
        """After a round's last step, whose plan is given, before the update is taken."""

    def personalise(  # noqa: B027 - most methods have nothing to do
        self, oracle: GradientOracle, batches: Iterator[Batch]
    ) -> None:
        """Make the common parameters this device's own, in place, where the method does so."""


class PlainAlgorithm(Algorithm):
    """One gradient a step, and AdamW on whatever is trained in either group."""

    def step(
        self, oracle: GradientOracle, batches: Sequence[Batch], state: AlgorithmState, plan: Plan
    ) -> float:
        gradients = oracle.gradients(batches[0])
        for name, parameters, gradient in (
            ("upper", oracle.common, gradients.common),
            ("lower", oracle.personal, gradients.personal),
        ):
            if len(parameters):
                descend(parameters, gradient, state, name, plan.training)
        return gradients.loss


def descend(
    parameters: Vector, gradient: Vector, state: AlgorithmState, name: str, training: Training
) -> None:
    """The federation's AdamW step on one level, clipped as it says."""
    adamw_step(
        parameters,
        clipped(gradient, training.clip_norm),
        state.vectors,
        name,
        training.learning_rate,
        training.weight_decay,
    )


def nothing() -> None:
    """Nobody wants to do anything before a step."""


def train(
    algorithm: Algorithm,
    oracle: GradientOracle,
    batches: Iterable[Batch],
    state: AlgorithmState,
    plans: Iterable[Plan],
    before_step: Callable[[], None] = nothing,
) -> LocalResult:
    """The shared local loop: one step a plan, each after `before_step`."""
    losses, stream = [], iter(batches)
    for plan in plans:
        before_step()
        taken = [next(stream) for _ in range(algorithm.batches_per_step)]
        losses.append(algorithm.step(oracle, taken, state, plan))
    algorithm.end_round(oracle, state, plan)
    return LocalResult(sum(losses) / len(losses), losses[-1], len(losses))
