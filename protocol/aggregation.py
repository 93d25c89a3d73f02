"""What the coordinator makes of a round's updates: rules and server's steps, their settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from protocol import limits
from protocol.methods import LearningRate
from protocol.scalars import Integer, Real


@dataclass(frozen=True, slots=True)
class Mean:
    """Weighted mean of the updates (FedAvg)."""

    NAME: ClassVar[str] = "mean"


@dataclass(frozen=True, slots=True)
class NormBound:
    """Weighted mean of updates that are scaled down to `norm_max` where they are longer."""

    NAME: ClassVar[str] = "norm-bound"
    norm_max: Annotated[float, Real(1e-9, 1e9)] = 1.0


@dataclass(frozen=True, slots=True)
class CoordinateMedian:
    """The median of every coordinate."""

    NAME: ClassVar[str] = "median"


@dataclass(frozen=True, slots=True)
class TrimmedMean:
    """The mean of every coordinate without the share of highest and of lowest values."""

    NAME: ClassVar[str] = "trimmed-mean"
    share: Annotated[float, Real(0.0, 0.49)] = 0.1


@dataclass(frozen=True, slots=True)
class MultiKrum:
    """The mean of the updates that lie closest together, all but `hostile` of them."""

    NAME: ClassVar[str] = "multi-krum"
    hostile: Annotated[int, Integer(1, limits.COHORT_MAX)] = 1


Aggregation = Mean | NormBound | CoordinateMedian | TrimmedMean | MultiKrum


@dataclass(frozen=True, slots=True)
class Average:
    """The averaged update is the step."""

    NAME: ClassVar[str] = "average"


@dataclass(frozen=True, slots=True)
class FedAvgM:
    """Server momentum."""

    NAME: ClassVar[str] = "fedavgm"
    learning_rate: LearningRate = 1.0
    momentum: Annotated[float, Real(0.0, 0.999)] = 0.9


@dataclass(frozen=True, slots=True)
class FedAdam:
    """Adam on the server; `tau` bounds how much it adapts."""

    NAME: ClassVar[str] = "fedadam"
    learning_rate: LearningRate = 0.01
    beta_1: Annotated[float, Real(0.0, 0.999)] = 0.9
    beta_2: Annotated[float, Real(0.0, 0.99999)] = 0.99
    tau: Annotated[float, Real(1e-9, 1.0)] = 1e-3


@dataclass(frozen=True, slots=True)
class FedYogi:
    """Yogi on the server: Adam whose second moment falls no faster than it rises."""

    NAME: ClassVar[str] = "fedyogi"
    learning_rate: LearningRate = 0.01
    beta_1: Annotated[float, Real(0.0, 0.999)] = 0.9
    beta_2: Annotated[float, Real(0.0, 0.99999)] = 0.99
    tau: Annotated[float, Real(1e-9, 1.0)] = 1e-3


ServerStep = Average | FedAvgM | FedAdam | FedYogi
