"""HOMLoRA: one LoRA for all devices, trained by AdamW and averaged. No personal level."""

from __future__ import annotations

from edge_client.algorithms.base import AlgorithmState, Batch, GradientOracle, Levels
from edge_client.algorithms.optimizers import adamw_step
from protocol.federation import Adapter, Group, Training


class HomLoRAStep:
    """Plain LoRA fine-tuning of the common adapter."""

    def levels(self, adapter: Adapter) -> Levels:
        return Levels(adapter.rank, 0, Group.COMMON)

    def step(
        self, oracle: GradientOracle, batch: Batch, state: AlgorithmState, training: Training
    ) -> float:
        gradients = oracle.gradients(batch)
        adamw_step(
            oracle.common,
            gradients.common,
            state,
            "upper",
            training.learning_rate,
            training.weight_decay,
        )
        return gradients.loss
