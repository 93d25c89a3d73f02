"""HETLoRA, the device's side: LoRA of the device's own rank, pruned as it trains.

Cho et al. 2024 (arXiv 2401.06432).

A device of rank k receives the first k rows of A and columns of B, trains them under the penalty
`lambda ||B[:, t:]|| ||A[t:, :]||`, t = floor(gamma k), and lowers its rank to `max(rank_min, t)`
once that product has shrunk over a round. What is cut off is zero from then on: a zero row of A and
column of B get no gradient, so the model keeps its full shape. The other side is
coordinator/aggregation/hetlora.py. Layers are pruned together, by the sum of their products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from edge_client.algorithms.base import (
    Algorithm,
    AlgorithmState,
    Batch,
    GradientOracle,
    Layout,
    Plan,
    descend,
)
from edge_client.algorithms.optimizers import norm
from protocol.federation import Adapter, Group
from protocol.methods import HetLoRA


class HetLoRAStep(Algorithm):
    """Plain LoRA fine-tuning of a rank that only falls; `rank` is where this device begins."""

    def __init__(self, settings: HetLoRA, rank: int) -> None:
        self._settings = settings
        self._first_rank = rank

    def layout(self, adapter: Adapter) -> Layout:
        return Layout(adapter.rank, 0, Group.COMMON)

    def rank(self, state: AlgorithmState) -> int:
        remembered = state.vectors.get("hetlora")
        return self._first_rank if remembered is None else int(remembered[0])

    def step(
        self, oracle: GradientOracle, batches: Sequence[Batch], state: AlgorithmState, plan: Plan
    ) -> float:
        if plan.step == 0:
            self._remember(oracle, state, self.rank(state), self._tail_product(oracle, state))
        gradients = oracle.gradients(batches[0])
        gradient = gradients.common * 1.0
        self._add_penalty(oracle, state, gradient)
        descend(oracle.common, gradient, state, "upper", plan.training)
        return gradients.loss

    def end_round(self, oracle: GradientOracle, state: AlgorithmState, plan: Plan) -> None:  # noqa: ARG002
        before, tail = float(state.vectors["hetlora"][1]), self._tail(state)
        rank = self.rank(state)
        if self._tail_product(oracle, state) < before:
            rank = max(self._settings.rank_min, tail)
        for vector in (oracle.common, state.vectors["upper.m"], state.vectors["upper.v"]):
            for a, b in oracle.factors(vector):
                a[rank:] = 0.0
                b[:, rank:] = 0.0
        self._remember(oracle, state, rank, before)

    def _tail(self, state: AlgorithmState) -> int:
        return math.floor(self._settings.rank_share * self.rank(state))

    def _tail_product(self, oracle: GradientOracle, state: AlgorithmState) -> float:
        tail, rank = self._tail(state), self.rank(state)
        return sum(
            norm(a[tail:rank]) * norm(b[:, tail:rank]) for a, b in oracle.factors(oracle.common)
        )

    def _add_penalty(self, oracle: GradientOracle, state: AlgorithmState, gradient: object) -> None:
        """The gradient of `lambda ||B_tail|| ||A_tail||`, where neither norm is zero."""
        tail, rank = self._tail(state), self.rank(state)
        pairs = zip(oracle.factors(oracle.common), oracle.factors(gradient), strict=True)
        for (a, b), (into_a, into_b) in pairs:
            norm_a, norm_b = norm(a[tail:rank]), norm(b[:, tail:rank])
            if norm_a > 0.0 and norm_b > 0.0:
                into_a[tail:rank] += (self._settings.penalty * norm_b / norm_a) * a[tail:rank]
                into_b[:, tail:rank] += (self._settings.penalty * norm_a / norm_b) * b[:, tail:rank]

    def _remember(
        self, oracle: GradientOracle, state: AlgorithmState, rank: int, product: float
    ) -> None:
        facts = oracle.common[:2] * 0.0
        facts[0], facts[1] = rank, product
        state.vectors["hetlora"] = facts
