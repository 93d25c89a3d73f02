"""What the devices of pFedLoRA have in common, whatever their backbones. No torch here.

The common adapter is a few pairs A [r, s] and B [s, r], of one fixed width s. A layer [m, n] of any
model runs on the pair of its slot through projections of its own, P [s, n] and Q [m, s]:

    y = W0 x + scaling (Q B A P / sqrt(s n) + D C) x

The roots let P and Q have entries of size 1, which the steps of AdamW move slowly. Slots are
stretches of a model's depth, so that models of 6 and of 12 blocks share the same pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.federation import FederationSettings
from protocol.methods import PFedLoRA
from quantization.seeded import factor_start


def shared_shapes(rank: int, width: int, slots: int) -> dict[str, tuple[int, int]]:
    """The common adapter's tensors, in the order that they travel in."""
    shapes = {}
    for slot in range(slots):
        shapes[f"shared.{slot}.A"] = (rank, width)
        shapes[f"shared.{slot}.B"] = (width, rank)
    return dict(sorted(shapes.items()))


def shared_start(settings: FederationSettings) -> dict[str, NDArray[Any]]:
    """The first common adapter of a pfedlora federation: A drawn from its seed, B zero."""
    algorithm = settings.algorithm
    assert isinstance(algorithm, PFedLoRA)  # noqa: S101 - of whom else is it asked
    shapes = shared_shapes(settings.adapter.rank, algorithm.shared_width, algorithm.slots)
    return {name: shared_factor_start(name, shape, settings.seed) for name, shape in shapes.items()}


def shared_factor_start(name: str, shape: tuple[int, int], seed: int) -> NDArray[np.float32]:
    """One of its tensors."""
    slot, _, letter = name.rpartition(".")
    return factor_start(shape, seed, slot, letter) if letter == "A" else np.zeros(shape, np.float32)


def slot_of(place: int, count: int, slots: int) -> int:
    """The slot of one of a model's `count` adapted layers, `place` counting from the input."""
    return place * slots // count
