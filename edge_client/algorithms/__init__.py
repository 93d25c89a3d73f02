"""Local training, one file an algorithm: what is trained, what is sent, how a step goes."""

from __future__ import annotations

from edge_client.algorithms.base import Algorithm
from edge_client.algorithms.feddpa import FedDPAStep
from edge_client.algorithms.fedsalora import FedSALoRAStep
from edge_client.algorithms.ffalora import FFALoRAStep
from edge_client.algorithms.hetlora import HetLoRAStep
from edge_client.algorithms.homlora import HomLoRAStep
from edge_client.algorithms.local import LocalOnlyStep
from edge_client.algorithms.perfedavg import PerFedAvgStep
from edge_client.algorithms.pf2lora import PF2LoRAStep
from edge_client.algorithms.pfedlora import PFedLoRAStep
from edge_client.splits import seeded
from protocol.federation import FederationSettings
from protocol.methods import (
    FedDPA,
    FedSALoRA,
    FFALoRA,
    HetLoRA,
    HomLoRA,
    LocalOnly,
    PerFedAvg,
    PF2LoRA,
    PFedLoRA,
)


def algorithm_for(settings: FederationSettings, device_seed: int) -> Algorithm:
    """The algorithm that the federation's settings name, for the device of this seed."""
    match settings.algorithm:
        case PF2LoRA() as pf2lora:
            return PF2LoRAStep(pf2lora, settings.adapter.personal_rank, device_seed)
        case HomLoRA():
            return HomLoRAStep()
        case LocalOnly():
            return LocalOnlyStep()
        case PerFedAvg() as per_fedavg:
            return PerFedAvgStep(per_fedavg)
        case HetLoRA() as hetlora:
            # The paper gives ranks by what devices can do; here they are drawn.
            ranks = seeded("hetlora rank", device_seed)
            return HetLoRAStep(
                hetlora, int(ranks.integers(hetlora.rank_min, settings.adapter.rank + 1))
            )
        case FFALoRA():
            return FFALoRAStep()
        case FedSALoRA():
            return FedSALoRAStep()
        case FedDPA():
            return FedDPAStep()
        case PFedLoRA() as pfedlora:
            return PFedLoRAStep(pfedlora)
