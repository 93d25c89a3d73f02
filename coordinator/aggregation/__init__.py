"""From a round's updates to the next base version: one file a rule, all independent of order."""

from __future__ import annotations

from coordinator.aggregation.base import Aggregation
from coordinator.aggregation.fedavg import FedAvg
from coordinator.aggregation.hetlora import HetLoRA
from coordinator.aggregation.robust import Robust
from protocol import methods
from protocol.aggregation import (
    CoordinateMedian,
    Mean,
    MultiKrum,
    NormBound,
    TrimmedMean,
)
from protocol.federation import FederationSettings, Weighting
from protocol.limits import EXAMPLES_MAX
from protocol.tensors import NamedTensors


def aggregation_for(settings: FederationSettings, base: NamedTensors) -> Aggregation:
    """An empty aggregate of the federation's kind on a base version."""
    reports_max = settings.rounds.reports_max
    bound = reports_max * report_weight(settings, EXAMPLES_MAX)
    if isinstance(settings.algorithm, methods.HetLoRA):
        return HetLoRA(base, bound, reports_max)
    match settings.aggregation:
        case Mean():
            return FedAvg(base, bound)
        case NormBound(norm_max):
            return FedAvg(base, bound, norm_max)
        case CoordinateMedian() | TrimmedMean() | MultiKrum() as rule:
            return Robust(base, rule)


def report_weight(settings: FederationSettings, examples: int) -> int:
    """How much a report of so many examples counts."""
    return examples if settings.rounds.weighting is Weighting.EXAMPLES else 1
