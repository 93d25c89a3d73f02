"""What a device does with an assignment: the methods, and the settings of each.

PF2LoRA (arXiv 2503.03920) is the method: the lower step trains the personal adapter, the upper step
the common adapter. The others are what it is compared with, on the same devices and the same wire.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, ClassVar

from protocol import limits
from protocol.scalars import Integer, Real, SchemaError

LearningRate = Annotated[float, Real(1e-9, 100.0)]


class Hypergradient(Enum):
    """How the upper step's gradient is had; edge_client/algorithms/pf2lora.py has the formulas.

    `exact` and `finite_difference` differentiate through the lower step; `secant` approximates that
    for nothing, `first_order` leaves it out. `optimistic` takes both levels' steps from one
    gradient, extrapolated from the last; `joint` does without the bilevel step at all.
    """

    EXACT = "exact"
    FINITE_DIFFERENCE = "finite_difference"
    SECANT = "secant"
    FIRST_ORDER = "first_order"
    OPTIMISTIC = "optimistic"
    JOINT = "joint"


class LowerOptimizer(Enum):
    """What takes the lower step: plain SGD (the paper's) or Adam with state kept on the device."""

    SGD = "sgd"
    ADAM = "adam"


@dataclass(frozen=True, slots=True)
class PF2LoRA:
    """Bilevel: `lower_steps` on the personal adapter, then one upper step on the common one.

    A `lower_learning_rate` of 0 is a fifth of the upper one, so that what all devices share is
    learned in common first; SGD below asks for a rate of its own.
    With `separate_batches` the upper step sees rows that the lower step did not. Until
    `common_warmup_rounds` are over only the common adapter learns. With a `personal_rank_max` each
    device's r2 begins at the adapter's and follows its data, up to that, layer by layer.
    """

    NAME: ClassVar[str] = "pf2lora"
    hypergradient: Hypergradient = Hypergradient.SECANT
    lower_optimizer: LowerOptimizer = LowerOptimizer.ADAM
    lower_learning_rate: Annotated[float, Real(0.0, 100.0)] = 0.0
    lower_momentum: Annotated[float, Real(0.0, 0.999)] = 0.0
    lower_steps: Annotated[int, Integer(1, 100)] = 1
    separate_batches: bool = False
    common_warmup_rounds: Annotated[int, Integer(0, limits.ROUNDS_MAX)] = 0
    personal_rank_max: Annotated[int, Integer(0, limits.RANK_MAX)] = 0

    def __post_init__(self) -> None:
        if self.lower_momentum and self.lower_optimizer is not LowerOptimizer.SGD:
            raise SchemaError("lower_momentum", "is SGD's; Adam has its own")
        if not self.lower_learning_rate and self.lower_optimizer is LowerOptimizer.SGD:
            raise SchemaError("lower_learning_rate", "must be given for SGD, such as 0.1")


@dataclass(frozen=True, slots=True)
class HomLoRA:
    """HOMLoRA: one LoRA for all, FedAvg; the personal level is absent."""

    NAME: ClassVar[str] = "homlora"


@dataclass(frozen=True, slots=True)
class LocalOnly:
    """One LoRA a device, never sent: what federation has to beat."""

    NAME: ClassVar[str] = "local"


@dataclass(frozen=True, slots=True)
class PerFedAvg:
    """Per-FedAvg on LoRA: learns a common adapter from which few SGD steps make a good own one."""

    NAME: ClassVar[str] = "per-fedavg"
    hessian_free: bool = False
    inner_learning_rate: LearningRate = 0.1
    adaptation_steps: Annotated[int, Integer(1, 1000)] = 1


@dataclass(frozen=True, slots=True)
class HetLoRA:
    """HETLoRA: devices of ranks from `rank_min` to the adapter's, each pruning its own.

    Ranks above `rank_share` of the present one are penalised by `penalty` and cut off once they
    have shrunk.
    """

    NAME: ClassVar[str] = "hetlora"
    rank_min: Annotated[int, Integer(1, limits.RANK_MAX)] = 2
    rank_share: Annotated[float, Real(0.01, 1.0)] = 0.99
    penalty: Annotated[float, Real(0.0, 1e3)] = 1e-3


@dataclass(frozen=True, slots=True)
class FFALoRA:
    """FFA-LoRA: A stays as it was drawn, B is trained and sent."""

    NAME: ClassVar[str] = "ffa-lora"


@dataclass(frozen=True, slots=True)
class FedSALoRA:
    """FedSA-LoRA: A and B are trained, A is sent, B stays on its device."""

    NAME: ClassVar[str] = "fedsa-lora"


@dataclass(frozen=True, slots=True)
class FedDPA:
    """FedDPA: a global and a personal LoRA, trained in turn within a round."""

    NAME: ClassVar[str] = "feddpa"


@dataclass(frozen=True, slots=True)
class PFedLoRA:
    """pFedLoRA: devices whose backbones differ share one adapter, each through projections.

    The common adapter is A [rank, shared_width] and B [shared_width, rank], whatever the backbones'
    widths; `slots` is how many such pairs there are, over the relative depth of a model. While a
    device trains its own part, the loss with the common adapter counts `mu`, and without it the
    rest.
    """

    NAME: ClassVar[str] = "pfedlora"
    mu: Annotated[float, Real(0.001, 0.5)] = 0.5
    shared_width: Annotated[int, Integer(1, limits.SHARED_WIDTH_MAX)] = 64
    slots: Annotated[int, Integer(1, limits.SLOTS_MAX)] = 4


Algorithm = (
    PF2LoRA | HomLoRA | LocalOnly | PerFedAvg | HetLoRA | FFALoRA | FedSALoRA | FedDPA | PFedLoRA
)
