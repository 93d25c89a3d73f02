"""pFedLoRA: one small adapter for devices whose models differ (Yi et al. 2023, arXiv 2310.13283).

The paper's clients train their whole models, of different architectures, and share one low-rank
adapter. Each round first trains the local model with the adapter frozen, then the adapter with the
local model frozen; only the adapter is averaged. With theta the adapter and w_k the local model,

    1:  min over w_k     mu f(w_k, theta) + (1 - mu) f(w_k),    mu in (0, 0.5]
    2:  min over theta   f(w_k, theta)

(these formulas are of the first author's pFedES, the same scheme with the shared module elsewhere).

What is this project's: backbones are frozen, so w_k is the device's own part, which is the
projections that fit the adapter to its backbone (shared_adapter.py), a personal LoRA and the head.
Each phase has half the steps, those of phase 1 two gradients each. AdamW trains both.
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
from protocol.federation import Adapter, Group
from protocol.methods import PFedLoRA


class PFedLoRAStep(Algorithm):
    """The device's own part for half of a round, then the common adapter."""

    def __init__(self, settings: PFedLoRA) -> None:
        self._settings = settings

    def layout(self, adapter: Adapter) -> Layout:
        return Layout(
            adapter.rank,
            adapter.personal_rank,
            Group.PERSONAL,
            personal="CDPQ",
            shared_width=self._settings.shared_width,
            slots=self._settings.slots,
        )

    def step(
        self, oracle: GradientOracle, batches: Sequence[Batch], state: AlgorithmState, plan: Plan
    ) -> float:
        gradients = oracle.gradients(batches[0])
        loss = gradients.loss
        if plan.step >= plan.training.local_steps // 2:
            descend(oracle.common, gradients.common, state, "upper", plan.training)
            return loss
        mu = self._settings.mu
        mixed = mu * gradients.personal  # a copy: gradients hold until the next call
        mixed += (1.0 - mu) * oracle.local_gradients(batches[0]).personal
        descend(oracle.personal, mixed, state, "lower", plan.training)
        return loss
