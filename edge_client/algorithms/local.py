"""Local-only LoRA: a LoRA of the common rank with its head on each device, never sent."""

from __future__ import annotations

from edge_client.algorithms.base import Layout, PlainAlgorithm
from protocol.federation import Adapter, Group


class LocalOnlyStep(PlainAlgorithm):
    """Plain LoRA fine-tuning of an adapter that stays: everything is personal."""

    def layout(self, adapter: Adapter) -> Layout:
        return Layout(0, adapter.rank, Group.PERSONAL)
