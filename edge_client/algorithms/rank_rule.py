"""How a device's personal rank follows its data: grown where it binds, pruned where it is idle.

Every few rounds each layer looks at the singular values of its own `D C`, of rank k so far. By
Eckart and Young the share of the squared norm that the smallest holds is what is lost without it:

    below PRUNE_SHARE   the direction goes: the personal update changes by its root, 10 %, at most
    above GROW_SHARE    all k directions are in use, so one more is tried: a fresh row of C beside a
                        column of zeros in D, which leaves the function as it is
    between             the layer stays

A layer that has pruned what it grew stays at that rank, so every layer comes to rest. What is not
in use is zero in both factors and so gets no gradient: shapes, and what a step costs, are those of
the highest rank. The rule is this project's own; the paper fixes r2.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from edge_client.algorithms.base import AlgorithmState, GradientOracle, Vector
from edge_client.algorithms.vectors import as_numpy, as_vector
from edge_client.factors import cut, singular_values
from edge_client.splits import seeded

PRUNE_SHARE: Final = 0.01
GROW_SHARE: Final = 0.1
ROUNDS_BETWEEN: Final = 3
_RANKS: Final = "ranks"
_PEAKS: Final = "ranks.peaks"  # a layer may grow while its rank is the highest that it has had


def begin(oracle: GradientOracle, state: AlgorithmState, rank: int) -> None:
    """Before a device's first step: all layers at `rank`, what lies beyond zero."""
    if _RANKS in state.vectors:
        return
    layers = oracle.personal_factors(oracle.personal)
    for c, d in layers:
        c[rank:] = 0.0
        d[:, rank:] = 0.0
    ranks = oracle.personal[: len(layers)] * 0.0 + rank
    state.vectors[_RANKS], state.vectors[_PEAKS] = ranks, ranks * 1.0


def follow(
    oracle: GradientOracle, state: AlgorithmState, rank_max: int, round_number: int, seed: int
) -> None:
    """After a round: let every layer grow or prune by one, if its time has come."""
    if round_number % ROUNDS_BETWEEN:
        return
    moments = [state.vectors[name] for name in ("lower.m", "lower.v") if name in state.vectors]
    views = [oracle.personal_factors(vector) for vector in (oracle.personal, *moments)]
    ranks, peaks = state.vectors[_RANKS], state.vectors[_PEAKS]
    for layer, ((c, d), *remembered) in enumerate(zip(*views, strict=True)):
        rank = int(ranks[layer])
        share = _smallest_share(c[:rank], d[:, :rank])
        if share is None:
            continue
        if share < PRUNE_SHARE and rank > 1:
            _prune(c, d, rank)
            for moment_c, moment_d in remembered:  # they were of the old directions
                moment_c[:] = 0.0
                moment_d[:] = 0.0
            ranks[layer] = rank - 1
        elif share > GROW_SHARE and rank < rank_max and rank == int(peaks[layer]):
            fresh = seeded("grown", seed, layer, rank).uniform(-1.0, 1.0, c.shape[1])
            c[rank] = as_vector(fresh / np.sqrt(c.shape[1]), c)
            ranks[layer] = peaks[layer] = rank + 1


def _smallest_share(c: Vector, d: Vector) -> float | None:
    """The share of `||D C||_F ** 2` that its smallest singular value of k holds; None of zero."""
    squares = singular_values(as_numpy(c), as_numpy(d)) ** 2
    total = float(squares.sum())
    return float(squares[-1]) / total if total else None


def _prune(c: Vector, d: Vector, rank: int) -> None:
    """Let the first `rank` directions be those of the singular values, without the smallest."""
    down, up = cut(as_numpy(c[:rank]), as_numpy(d[:, :rank]), rank - 1)
    c[: rank - 1], d[:, : rank - 1] = as_vector(down, c), as_vector(up, d)
    c[rank - 1], d[:, rank - 1] = 0.0, 0.0
