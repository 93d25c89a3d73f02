"""From the averaged update to the next base version: plainly, or by a server optimizer.

The averaged update `d` is a pseudo-gradient (Reddi et al. 2020, arXiv 2003.00295, algorithm 2):

    average   x + d
    FedAvgM   m = beta m + d                x + eta m
    FedAdam   m = beta1 m + (1 - beta1) d   v = beta2 v + (1 - beta2) d^2
    FedYogi   m as FedAdam's                v = v - (1 - beta2) d^2 sign(v - d^2)
              both: x + eta m / (sqrt(v) + tau)

What an optimizer remembers is written down with the base version, in one transaction.
"""

from __future__ import annotations

import numpy as np

from protocol.aggregation import (
    Average,
    FedAdam,
    FedAvgM,
    FedYogi,
    ServerStep,
)
from protocol.tensors import NamedTensors


def take_step(
    step: ServerStep,
    base: NamedTensors,
    averaged: NamedTensors,
    memory: NamedTensors | None,
) -> tuple[NamedTensors, NamedTensors | None]:
    """The next base version, and what the step remembers for the next round.

    `averaged` is the base plus the averaged update; `memory` is what the last step returned.
    """
    if isinstance(step, Average):
        return averaged, None
    before = base.flat().astype(np.float64)
    update = averaged.flat() - before
    zeros = np.zeros_like(update)
    m, v = (memory.arrays()[n] for n in "mv") if memory else (zeros, zeros + _first(step))
    match step:
        case FedAvgM(rate, momentum):
            m = momentum * m + update
            moved = before + rate * m
        case FedAdam(rate, beta_1, beta_2, tau) | FedYogi(rate, beta_1, beta_2, tau):
            m = beta_1 * m + (1 - beta_1) * update
            square = update * update
            if isinstance(step, FedAdam):
                v = beta_2 * v + (1 - beta_2) * square
            else:
                v = v - (1 - beta_2) * square * np.sign(v - square)
            moved = before + rate * m / (np.sqrt(v) + tau)
    remembered = NamedTensors.from_arrays(
        {name: vector.astype(np.float32) for name, vector in (("m", m), ("v", v))}
    )
    return NamedTensors.from_flat(base.specs, moved.astype(np.float32)), remembered


def _first(step: ServerStep) -> float:
    """What v begins as: tau squared (the paper's)."""
    return step.tau**2 if isinstance(step, FedAdam | FedYogi) else 0.0
