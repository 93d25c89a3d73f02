"""HOMLoRA: one LoRA for all devices, trained by AdamW and averaged. No personal level."""

from __future__ import annotations

from edge_client.algorithms.base import Layout, PlainAlgorithm
from protocol.federation import Adapter, Group


class HomLoRAStep(PlainAlgorithm):
    """Plain LoRA fine-tuning of the common adapter."""

    def layout(self, adapter: Adapter) -> Layout:
        return Layout(adapter.rank, 0, Group.COMMON)
