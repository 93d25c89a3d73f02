"""Optimizers on flat vectors, in place: few operations a step, whatever the number of tensors."""

from __future__ import annotations

from typing import Final

from edge_client.algorithms.base import AlgorithmState, Vector

BETA_1: Final = 0.9
BETA_2: Final = 0.999
EPSILON: Final = 1e-8


def sgd_step(parameters: Vector, gradient: Vector, learning_rate: float) -> None:
    """`p -= lr g`."""
    parameters -= learning_rate * gradient


def adamw_step(
    parameters: Vector,
    gradient: Vector,
    state: AlgorithmState,
    name: str,
    learning_rate: float,
    weight_decay: float = 0.0,
) -> None:
    """AdamW with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2).

    Its two moments are kept in `state` as `NAME.m` and `NAME.v`, its own step count beside them, so
    that the state may live on across rounds.
    """
    vectors = state.vectors
    if f"{name}.m" not in vectors:
        vectors[f"{name}.m"] = parameters * 0.0
        vectors[f"{name}.v"] = parameters * 0.0
        vectors[f"{name}.steps"] = parameters[:1] * 0.0
    m, v, steps = vectors[f"{name}.m"], vectors[f"{name}.v"], vectors[f"{name}.steps"]
    steps += 1
    count = float(steps[0])
    m *= BETA_1
    m += (1 - BETA_1) * gradient
    v *= BETA_2
    v += (1 - BETA_2) * gradient * gradient
    if weight_decay:
        parameters *= 1 - learning_rate * weight_decay
    root = (v / (1 - BETA_2**count)) ** 0.5
    root += EPSILON
    parameters -= (learning_rate / (1 - BETA_1**count)) * m / root
