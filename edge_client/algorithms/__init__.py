"""Local training, one file an algorithm: what is trained, what is sent, how a step goes."""

from __future__ import annotations

from edge_client.algorithms.base import Algorithm
from edge_client.algorithms.homlora import HomLoRAStep
from edge_client.algorithms.local import LocalOnlyStep
from edge_client.algorithms.pf2lora import PF2LoRAStep
from protocol.federation import FederationSettings, HomLoRA, LocalOnly, PF2LoRA


def algorithm_for(settings: FederationSettings) -> Algorithm:
    """The algorithm that the federation's settings name."""
    match settings.algorithm:
        case PF2LoRA() as pf2lora:
            return PF2LoRAStep(pf2lora)
        case HomLoRA():
            return HomLoRAStep()
        case LocalOnly():
            return LocalOnlyStep()
