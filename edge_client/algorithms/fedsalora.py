"""FedSA-LoRA: A and B are trained, only A is averaged; B is the device's own (arXiv 2410.01463).

A is held to carry what is general, B what is the client's. The head follows `adapter.head`.
"""

from __future__ import annotations

from edge_client.algorithms.base import Layout, PlainAlgorithm
from protocol.federation import Adapter


class FedSALoRAStep(PlainAlgorithm):
    """Plain LoRA fine-tuning with A in the common group and B in the personal one."""

    def layout(self, adapter: Adapter) -> Layout:
        return Layout(adapter.rank, 0, adapter.head, common="A", personal="B")
