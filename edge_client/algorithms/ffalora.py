"""FFA-LoRA: A is frozen as drawn, B is trained and averaged (arXiv 2403.12313).

With A the same everywhere the average of the B_k A is the product of the averages, and half as much
is sent. A starts from the federation's seed, so all devices have the same.
"""

from __future__ import annotations

from edge_client.algorithms.base import Layout, PlainAlgorithm
from protocol.federation import Adapter, Group


class FFALoRAStep(PlainAlgorithm):
    """Plain LoRA fine-tuning of B and the head."""

    def layout(self, adapter: Adapter) -> Layout:
        return Layout(adapter.rank, 0, Group.COMMON, common="B")
