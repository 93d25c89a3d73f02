"""Local-only LoRA: a LoRA of the common rank with its head on each device, never sent."""

from __future__ import annotations

from edge_client.algorithms.base import AlgorithmState, Batch, GradientOracle, Levels
from edge_client.algorithms.optimizers import adamw_step
from protocol.federation import Adapter, Group, Training


class LocalOnlyStep:
    """Plain LoRA fine-tuning of an adapter that stays: everything is personal."""

    def levels(self, adapter: Adapter) -> Levels:
        return Levels(0, adapter.rank, Group.PERSONAL)

    def step(
        self, oracle: GradientOracle, batch: Batch, state: AlgorithmState, training: Training
    ) -> float:
        gradients = oracle.gradients(batch)
        adamw_step(
            oracle.personal,
            gradients.personal,
            state,
            "lower",
            training.learning_rate,
            training.weight_decay,
        )
        return gradients.loss
