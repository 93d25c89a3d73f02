"""PF2LoRA: two-level LoRA as a bilevel problem (arXiv 2503.03920).

    upper: min_x (1/M) sum_k f_k(x, y_k*(x))        x = {A, B}, common
    lower: y_k*(x) = argmin_y f_k(x, y)             y_k = {C_k, D_k}, personal

Each local step takes a lower step `y+ = y - alpha grad_y f(x, y)`, then an upper AdamW step along
the hypergradient of the one-step unrolled objective,

    h = grad_x f(x, y+) - alpha [d2 f / dx dy](x, y) . grad_y f(x, y+).

Order, optimizers and interval are the paper's; the formula of h is this project's reading. `secant`
is this project's approximation, `h ~ 2 grad_x f(x, y+) - grad_x f(x, y)` on one batch: the second
term is `-alpha H_xy grad_y f(x, y)` to first order in alpha, which is what is wanted, and costs
nothing, as the first pass gives grad_x and grad_y together. `first_order` drops the second term.
With the lower step taken by Adam, y+ - y takes the place of -alpha grad_y f in both.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_client.algorithms.base import AlgorithmState, Batch, GradientOracle, Levels
from edge_client.algorithms.optimizers import adamw_step, sgd_step
from protocol.federation import Adapter, Hypergradient, LowerOptimizer, PF2LoRA, Training


@dataclass(frozen=True, slots=True)
class PF2LoRAStep:
    """The bilevel step under the federation's settings."""

    settings: PF2LoRA

    def levels(self, adapter: Adapter) -> Levels:
        return Levels(adapter.rank, adapter.personal_rank, adapter.head)

    def step(
        self, oracle: GradientOracle, batch: Batch, state: AlgorithmState, training: Training
    ) -> float:
        before = oracle.gradients(batch)
        secant = self.settings.hypergradient is Hypergradient.SECANT
        # The gradients hold until the next call only.
        common_before = before.common * 1.0 if secant else None
        self._lower_step(oracle, before.personal, state)
        after = oracle.gradients(batch)
        if common_before is None:
            hypergradient = after.common
        else:
            hypergradient = 2.0 * after.common
            hypergradient -= common_before
        adamw_step(
            oracle.common,
            hypergradient,
            state,
            "upper",
            training.learning_rate,
            training.weight_decay,
        )
        return before.loss

    def _lower_step(self, oracle: GradientOracle, gradient: object, state: AlgorithmState) -> None:
        learning_rate = self.settings.lower_learning_rate
        if self.settings.lower_optimizer is LowerOptimizer.SGD:
            sgd_step(oracle.personal, gradient, learning_rate)
        else:
            adamw_step(oracle.personal, gradient, state, "lower", learning_rate)
