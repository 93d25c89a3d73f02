"""Optimizers on flat vectors, in place: few operations a step, whatever the number of tensors.

What they remember is kept in a dictionary of vectors under `NAME.m` and so on, so that it may live
on across rounds.
"""

from __future__ import annotations

import math
from typing import Any, Final

Vector = Any

BETA_1: Final = 0.9
BETA_2: Final = 0.999
EPSILON: Final = 1e-8
# So many numbers at a time.
CACHED: Final = 1 << 14


def norm(vector: Vector) -> float:
    """Euclidean norm."""
    return math.sqrt(float((vector * vector).sum()))


def clipped(gradient: Vector, norm_max: float) -> Vector:
    """The gradient, scaled down to `norm_max` where it is longer; 0 leaves it alone."""
    if norm_max == 0.0:
        return gradient
    length = norm(gradient)
    return gradient if length <= norm_max else gradient * (norm_max / length)


def through_clip(vector: Vector, gradient: Vector, norm_max: float) -> Vector:
    """`[d clipped / d gradient] vector`, symmetric: along a clipped gradient nothing is left."""
    if norm_max == 0.0 or (length := norm(gradient)) <= norm_max:
        return vector
    along = float((gradient * vector).sum()) / length**2
    return (vector - along * gradient) * (norm_max / length)


def sgd_step(
    parameters: Vector,
    gradient: Vector,
    memory: dict[str, Vector],
    name: str,
    learning_rate: float,
    momentum: float = 0.0,
) -> None:
    """`m = momentum m + g; p -= lr m`; without momentum nothing is remembered."""
    if momentum:
        if f"{name}.m" not in memory:
            memory[f"{name}.m"] = parameters * 0.0
        velocity = memory[f"{name}.m"]
        velocity *= momentum
        velocity += gradient
        gradient = velocity
    parameters -= learning_rate * gradient


def adamw_step(
    parameters: Vector,
    gradient: Vector,
    memory: dict[str, Vector],
    name: str,
    learning_rate: Vector | float,
    weight_decay: float = 0.0,
) -> None:
    """AdamW with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2).

    The learning rate is a number, or one for each parameter.
    """
    if f"{name}.m" not in memory:
        memory[f"{name}.m"] = parameters * 0.0
        memory[f"{name}.v"] = parameters * 0.0
        memory[f"{name}.steps"] = parameters[:1] * 0.0
    steps = memory[f"{name}.steps"]
    steps += 1
    count = float(steps[0])
    for part in _parts(parameters):
        rate = learning_rate if isinstance(learning_rate, float) else learning_rate[part]
        p, g = parameters[part], gradient[part]
        m, v = memory[f"{name}.m"][part], memory[f"{name}.v"][part]
        m *= BETA_1
        m += (1 - BETA_1) * g
        v *= BETA_2
        v += (1 - BETA_2) * g * g
        if weight_decay:
            p *= 1 - rate * weight_decay
        root = (v / (1 - BETA_2**count)) ** 0.5
        p -= (rate / (1 - BETA_1**count)) * m / (root + EPSILON)


def _parts(vector: Vector) -> list[slice]:
    """A vector in parts: what is made on the way then stays in the processor's cache.

    A device's peak memory would be here otherwise. On a GPU it is one part, as each costs launches.
    """
    size = len(vector) if getattr(vector, "is_cuda", False) else CACHED
    return [slice(begin, begin + size) for begin in range(0, len(vector), size)]


def adam_derivative(
    gradient: Vector, memory: dict[str, Vector], name: str, learning_rate: Vector | float
) -> Vector:
    """`d p / d g` of the Adam step just taken with `gradient`: a diagonal, as a vector.

    With m^ = m / c1, v^ = v / c2 and c = 1 - beta ** count,

        d p / d g = -lr [ (1 - beta1) / (c1 (sqrt v^ + eps))
                          - m^ (1 - beta2) g / (c2 sqrt v^ (sqrt v^ + eps)^2) ].
    """
    count = float(memory[f"{name}.steps"][0])
    c1, c2 = 1 - BETA_1**count, 1 - BETA_2**count
    root = (memory[f"{name}.v"] / c2) ** 0.5
    below = root + EPSILON
    through_m = (1 - BETA_1) / (c1 * below)
    through_v = (memory[f"{name}.m"] / c1) * ((1 - BETA_2) / c2) * gradient
    # Where the gradient has always been zero so is its square's share.
    through_v = through_v / ((root + (root == 0.0)) * below * below)
    return -learning_rate * (through_m - through_v)
