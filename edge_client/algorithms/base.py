"""Local training as small functions over a gradient oracle.

An algorithm says what it trains, what it sends, and how it takes a step. It sees the model only as
two live vectors, the common parameters [P_c] and the personal parameters [P_p], and their gradients
on a batch; vectors are NumPy's or torch's, so one algorithm serves every backend.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from protocol.federation import Adapter, Group, Training

# A flat float vector that supports + - * / ** and their in-place forms: NumPy's or torch's.
Vector = Any
Batch = Any


@dataclass(frozen=True, slots=True)
class Gradients:
    """Mean loss of a batch and its gradients; the vectors hold until the next call."""

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

    def gradients(self, batch: Batch) -> Gradients:
        """Loss and gradients at the present parameters."""


@dataclass(slots=True)
class AlgorithmState:
    """What an algorithm remembers from round to round, on the device: named vectors."""

    vectors: dict[str, Vector] = field(default_factory=dict)
    steps: int = 0


@dataclass(frozen=True, slots=True)
class Levels:
    """The ranks of both levels, and the group that the task head is in."""

    common_rank: int
    personal_rank: int
    head: Group


@dataclass(frozen=True, slots=True)
class LocalResult:
    """One round's local training. Losses are means over a batch, before its step."""

    mean_loss: float
    last_loss: float
    steps: int


class Algorithm(Protocol):
    """What is trained, sent, and how."""

    def levels(self, adapter: Adapter) -> Levels:
        """The shape of both levels under this algorithm."""

    def step(
        self, oracle: GradientOracle, batch: Batch, state: AlgorithmState, training: Training
    ) -> float:
        """One local step; the loss before it."""


def train(
    algorithm: Algorithm,
    oracle: GradientOracle,
    batches: Iterable[Batch],
    state: AlgorithmState,
    training: Training,
) -> LocalResult:
    """The shared local loop: one step a batch."""
    losses = []
    for batch in batches:
        losses.append(algorithm.step(oracle, batch, state, training))
        state.steps += 1
    return LocalResult(sum(losses) / len(losses), losses[-1], len(losses))
