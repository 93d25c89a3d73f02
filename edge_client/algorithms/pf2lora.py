"""PF2LoRA: two-level LoRA as a bilevel problem (arXiv 2503.03920).

    upper: min_x (1/M) sum_k f_k(x, y_k*(x))        x = {A, B}, common
    lower: y_k*(x) = argmin_y f_k(x, y)             y_k = {C_k, D_k}, personal

Each local step takes a lower step `y+ = y - alpha grad_y f(x, y)`, then an upper AdamW step along
the hypergradient of the one-step unrolled objective,

    h = grad_x f(x, y+) - alpha [d2 f / dx dy](x, y) . grad_y f(x, y+).

Order, optimizers and interval are the paper's; everything below is this project's reading of h.
Write J = d y+ / d grad_y f, so that h = grad_x f(x, y+) + [d2 f / dx dy](x, y) . v with
v = J^T grad_y f(x, y+): a diagonal (-alpha for SGD; optimizers.adam_derivative for Adam), times
what clipping does to the gradient, if anything.

    exact              the product with v by double backward                        2 + ~2 gradients
    finite_difference  the product as (grad_x f(x, y + e v) - grad_x f(x, y - e v)) / 2e     4
    secant             2 grad_x f(x, y+) - grad_x f(x, y): the second term is H_xy (y+ - y), which
                       for SGD is `-alpha H_xy grad_y f` to first order in alpha             2
    first_order        grad_x f(x, y+)                                                       2
    optimistic         2 g_t - g_(t-1), g_t = grad_x f(x_t, y_t), and y's step from the same
                       backward: the secant's extrapolation from the last step               1
    joint              grad_x f(x, y): no bilevel step                                       1

With Adam below, a personal head has the upper level's learning rate, and y+ - y also holds past
gradients, which the secant then takes for this one's. Of several lower steps, `exact` and
`finite_difference` differentiate through the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from edge_client.algorithms import rank_rule
from edge_client.algorithms.base import (
    Algorithm,
    AlgorithmState,
    Batch,
    GradientOracle,
    Layout,
    Plan,
    Vector,
    descend,
)
from edge_client.algorithms.optimizers import (
    adam_derivative,
    adamw_step,
    clipped,
    norm,
    sgd_step,
    through_clip,
)
from protocol.federation import Adapter
from protocol.methods import Hypergradient, LowerOptimizer, PF2LoRA

# Length of the finite difference's step: that of DARTS (arXiv 1806.09055, section 2.3).
DIFFERENCE_NORM: Final = 0.01
# Of the upper rate, where the lower one is not set. At equal rates the personal level takes
# up what devices share before the common level has it (docs/evidence.md).
LOWER_SHARE: Final = 0.2
# These differentiate through the lower step.
THROUGH: Final = (Hypergradient.EXACT, Hypergradient.FINITE_DIFFERENCE)


@dataclass(frozen=True, slots=True)
class _Lower:
    """The last lower step: where it began, and the product of J^T with a vector."""

    start: Vector
    back: Callable[[Vector], Vector]


class PF2LoRAStep(Algorithm):
    """The bilevel step under the federation's settings, on the device of this seed."""

    def __init__(self, settings: PF2LoRA, personal_rank: int = 0, device_seed: int = 0) -> None:
        self._settings = settings
        self._personal_rank = personal_rank
        self._device_seed = device_seed
        self.batches_per_step = 2 if settings.separate_batches else 1  # type: ignore[misc]

    def layout(self, adapter: Adapter) -> Layout:
        highest = max(adapter.personal_rank, self._settings.personal_rank_max)
        return Layout(adapter.rank, highest, adapter.head)

    def step(
        self, oracle: GradientOracle, batches: Sequence[Batch], state: AlgorithmState, plan: Plan
    ) -> float:
        below, above = batches[0], batches[-1]
        if self._settings.personal_rank_max:
            rank_rule.begin(oracle, state, self._personal_rank)
        if plan.round <= self._settings.common_warmup_rounds:
            gradients = oracle.gradients(above)
            descend(oracle.common, gradients.common, state, "upper", plan.training)
            return gradients.loss
        if self._settings.hypergradient in (Hypergradient.OPTIMISTIC, Hypergradient.JOINT):
            return self._one_pass(oracle, below, state, plan)
        before = oracle.gradients(below)
        loss, common_before = before.loss, before.common * 1.0  # gradients hold until the next call
        lower = self._lower_step(oracle, before.personal, state, plan)
        for _ in range(self._settings.lower_steps - 1):
            lower = self._lower_step(oracle, oracle.gradients(below).personal, state, plan)
        hypergradient = self._hypergradient(oracle, below, above, common_before, lower)
        del common_before, lower  # or they would be part of the peak in the lines that follow
        descend(oracle.common, hypergradient, state, "upper", plan.training)
        return loss

    def end_round(self, oracle: GradientOracle, state: AlgorithmState, plan: Plan) -> None:
        highest = self._settings.personal_rank_max
        if highest and plan.round > self._settings.common_warmup_rounds:
            rank_rule.follow(oracle, state, highest, plan.round, self._device_seed)

    def _one_pass(
        self, oracle: GradientOracle, batch: Batch, state: AlgorithmState, plan: Plan
    ) -> float:
        gradients = oracle.gradients(batch)
        upward = gradients.common
        if self._settings.hypergradient is Hypergradient.OPTIMISTIC:
            last = state.vectors.get("upper.last") if plan.step else None
            state.vectors["upper.last"] = gradients.common * 1.0
            if last is not None:
                upward = 2.0 * gradients.common - last
        self._lower_step(oracle, gradients.personal, state, plan)
        descend(oracle.common, upward, state, "upper", plan.training)
        return gradients.loss

    def _lower_step(
        self, oracle: GradientOracle, gradient: Vector, state: AlgorithmState, plan: Plan
    ) -> _Lower | None:
        """One step down; what to differentiate through, where that is done."""
        settings, memory, clip_norm = self._settings, state.vectors, plan.training.clip_norm
        own_rate = settings.lower_learning_rate * plan.factor
        rate: Vector | float = own_rate or LOWER_SHARE * plan.training.learning_rate
        through = settings.hypergradient in THROUGH
        start, whole = (oracle.personal * 1.0, gradient * 1.0) if through else (None, None)
        gradient = clipped(gradient, clip_norm)
        if settings.lower_optimizer is LowerOptimizer.SGD:
            sgd_step(oracle.personal, gradient, memory, "lower", rate, settings.lower_momentum)
            diagonal = -rate
        else:
            # A head starts from nothing and is trained as every method trains it.
            rate = rate + oracle.personal_head * (plan.training.learning_rate - rate)
            adamw_step(oracle.personal, gradient, memory, "lower", rate)
            diagonal = adam_derivative(gradient, memory, "lower", rate) if through else 0.0
        if not through:
            return None
        return _Lower(start, lambda vector: through_clip(diagonal * vector, whole, clip_norm))

    def _hypergradient(
        self,
        oracle: GradientOracle,
        below: Batch,
        above: Batch,
        common_before: Vector,
        lower: _Lower | None,
    ) -> Vector:
        after = oracle.gradients(above)
        if self._settings.hypergradient is Hypergradient.FIRST_ORDER:
            return after.common
        if self._settings.hypergradient is Hypergradient.SECANT and above is below:
            upward = after.common  # ours until the next call: a copy would be part of the peak
            upward *= 2.0
            upward -= common_before
            return upward
        direct = after.common * 1.0
        if lower is None:  # the secant over two batches
            direct += oracle.gradients(below).common
            direct -= common_before
            return direct
        vector = lower.back(after.personal)
        landed = oracle.personal * 1.0
        if self._settings.hypergradient is Hypergradient.EXACT:
            _move(oracle, lower.start)
            through = oracle.mixed_product(below, vector)
        else:
            through = _difference(oracle, below, lower.start, vector)
        _move(oracle, landed)
        return direct + through


def _difference(oracle: GradientOracle, batch: Batch, start: Vector, vector: Vector) -> Vector:
    """`[d2 f / dx dy](x, start) vector` from two gradients."""
    length = norm(vector)
    if length == 0.0:
        return oracle.common * 0.0
    scale = DIFFERENCE_NORM / length
    _move(oracle, start + scale * vector)
    forward = oracle.gradients(batch).common * 1.0
    _move(oracle, start - scale * vector)
    return (forward - oracle.gradients(batch).common) / (2.0 * scale)


def _move(oracle: GradientOracle, personal: Vector) -> None:
    oracle.personal[:] = personal
