"""Per-FedAvg on one LoRA: a common adapter from which one SGD step makes a good own one.

Fallah, Mokhtari, Ozdaglar 2020 (arXiv 2002.07948) minimise `sum_k f_k(x - alpha grad f_k(x))`. A
local step takes `x~ = x - alpha grad f(x; xi)` and then descends along

    first-order:   grad f(x~; xi')
    Hessian-free:  grad f(x~; xi') - alpha H v,  v = grad f(x~; xi'),
                   H v as (grad f(x + e v; xi) - grad f(x - e v; xi)) / 2e

with AdamW in place of the paper's SGD, as for every method here. What a device uses in the end is
the common adapter after `adaptation_steps` SGD steps on its own rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
from edge_client.algorithms.pf2lora import DIFFERENCE_NORM
from protocol.federation import Adapter, Group
from protocol.methods import PerFedAvg


class PerFedAvgStep(Algorithm):
    """The meta step under the federation's settings; two batches each."""

    batches_per_step = 2

    def __init__(self, settings: PerFedAvg) -> None:
        self._settings = settings

    def layout(self, adapter: Adapter) -> Layout:
        return Layout(adapter.rank, 0, Group.COMMON)

    def step(
        self, oracle: GradientOracle, batches: Sequence[Batch], state: AlgorithmState, plan: Plan
    ) -> float:
        inner, outer = batches
        rate = self._settings.inner_learning_rate * plan.factor
        start = oracle.common * 1.0
        before = oracle.gradients(inner)
        oracle.common[:] = start - rate * before.common
        meta = oracle.gradients(outer).common * 1.0
        if self._settings.hessian_free and (length := norm(meta)) > 0.0:
            scale = DIFFERENCE_NORM / length
            oracle.common[:] = start + scale * meta
            forward = oracle.gradients(inner).common * 1.0
            oracle.common[:] = start - scale * meta
            meta -= rate * (forward - oracle.gradients(inner).common) / (2.0 * scale)
        oracle.common[:] = start
        descend(oracle.common, meta, state, "upper", plan.training)
        return before.loss

    def personalise(self, oracle: GradientOracle, batches: Iterator[Batch]) -> None:
        for _ in range(self._settings.adaptation_steps):
            gradient = oracle.gradients(next(batches)).common
            oracle.common[:] = oracle.common - self._settings.inner_learning_rate * gradient
