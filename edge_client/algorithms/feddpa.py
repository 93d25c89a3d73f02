"""FedDPA: a global and a personal LoRA trained in turn (arXiv 2403.19211, FedDPA-T).

In each round the personal adapter is trained first with the global one fixed, then the global one
with the personal one fixed; each has half the steps, so that a round costs what it costs others.
The paper's weighting of both adapters by instance at inference is left out: both count in full.
"""

from __future__ import annotations

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
from protocol.federation import Adapter


class FedDPAStep(Algorithm):
    """AdamW on one level at a time."""

    def layout(self, adapter: Adapter) -> Layout:
        return Layout(adapter.rank, adapter.personal_rank, adapter.head)

    def step(
        self, oracle: GradientOracle, batches: Sequence[Batch], state: AlgorithmState, plan: Plan
    ) -> float:
        gradients = oracle.gradients(batches[0])
        if plan.step < plan.training.local_steps // 2:
            descend(oracle.personal, gradients.personal, state, "lower", plan.training)
        else:
            descend(oracle.common, gradients.common, state, "upper", plan.training)
        return gradients.loss
