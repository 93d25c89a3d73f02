"""A device's personal rank goes where its data is, and comes to rest there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import repeat
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from edge_client.algorithms import algorithm_for, rank_rule
from edge_client.algorithms.base import AlgorithmState, Gradients, train
from edge_client.algorithms.schedule import plans
from protocol.federation import Adapter, Rounds, Training
from protocol.methods import PF2LoRA
from protocol.scalars import SchemaError
from tests.protocol.samples import SETTINGS

OUTPUTS, INPUTS, HIGHEST = 10, 8, 5


class Approximation:
    """`1/2 ||D C - target||^2`, one layer, float64; the common level has one idle number."""

    def __init__(self, rank: int, kind: str) -> None:
        rng = np.random.default_rng(rank)
        left, right = (np.linalg.qr(rng.standard_normal((s, s)))[0] for s in (OUTPUTS, INPUTS))
        target = (left[:, :rank] * np.linspace(2.0, 1.0, rank)) @ right[:rank]
        size = HIGHEST * (OUTPUTS + INPUTS)
        start = np.zeros(size)
        start[: HIGHEST * INPUTS] = rng.standard_normal(HIGHEST * INPUTS) / np.sqrt(INPUTS)
        vector: Callable[[Any], Any] = torch.from_numpy if kind == "torch" else np.asarray
        self.personal_head = 0.0
        self.target, self.personal, self.common = map(vector, (target, start, np.zeros(1)))

    def factors(self, vector: Any) -> list[tuple[Any, Any]]:
        return []

    def personal_factors(self, vector: Any) -> list[tuple[Any, Any]]:
        cut = HIGHEST * INPUTS
        return [(vector[:cut].reshape(HIGHEST, INPUTS), vector[cut:].reshape(OUTPUTS, HIGHEST))]

    def gradients(self, batch: object) -> Gradients:
        ((c, d),) = self.personal_factors(self.personal)
        error = d @ c - self.target
        gradient = self.personal * 0.0
        ((into_c, into_d),) = self.personal_factors(gradient)
        into_c[:], into_d[:] = d.T @ error, error @ c.T
        return Gradients(float((error**2).sum() / 2), self.common * 0.0, gradient)

    def local_gradients(self, batch: object) -> Gradients:
        raise NotImplementedError

    def mixed_product(self, batch: object, vector: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("rank", [1, 2, 4, 5])
def test_the_rank_of_the_data_is_found_from_above_and_below(rank: int, kind: str) -> None:
    settings = replace(
        SETTINGS,
        adapter=Adapter(rank=4, personal_rank=2),
        training=Training(local_steps=30),
        algorithm=PF2LoRA(lower_learning_rate=0.02, personal_rank_max=HIGHEST),
        rounds=Rounds(count=40),
    )
    algorithm = algorithm_for(settings, device_seed=3)
    assert algorithm.layout(settings.adapter).personal_rank == HIGHEST
    oracle, state = Approximation(rank, kind), AlgorithmState()
    ranks = []
    for number in range(1, 41):
        train(algorithm, oracle, repeat(SimpleNamespace()), state, plans(settings, number))
        ranks.append(int(state.vectors["ranks"][0]))
        ((c, d),) = oracle.personal_factors(oracle.personal)
        assert not bool((c[ranks[-1] :] != 0).any())  # what is not in use is zero
        assert not bool((d[:, ranks[-1] :] != 0).any())
    print(ranks)
    assert set(ranks[-15:]) == {rank}
    assert oracle.gradients(None).loss < 1e-2


def test_a_level_that_has_learned_nothing_is_left_as_it_is() -> None:
    oracle, state = Approximation(2, "numpy"), AlgorithmState()
    rank_rule.begin(oracle, state, 2)
    before = oracle.personal.copy()
    rank_rule.follow(oracle, state, HIGHEST, rank_rule.ROUNDS_BETWEEN, 0)
    assert np.array_equal(oracle.personal, before)
    assert state.vectors["ranks"].tolist() == [2.0]


def test_a_highest_rank_below_the_first_is_refused() -> None:
    with pytest.raises(SchemaError, match="personal_rank_max: is under the personal rank of 2"):
        replace(SETTINGS, algorithm=PF2LoRA(personal_rank_max=1))
