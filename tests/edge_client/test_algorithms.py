"""The bilevel step against mathematics, and which vectors each algorithm moves."""

from __future__ import annotations

import numpy as np
import pytest

from edge_client.algorithms.base import AlgorithmState, Gradients
from edge_client.algorithms.homlora import HomLoRAStep
from edge_client.algorithms.local import LocalOnlyStep
from edge_client.algorithms.optimizers import adamw_step
from edge_client.algorithms.pf2lora import PF2LoRAStep
from protocol.federation import Hypergradient, LowerOptimizer, PF2LoRA, Training

TRAINING = Training(learning_rate=0.01)


class Quadratic:
    """f(x, y) = 1/2 z'Hz - b'z with z = (x, y), in float64; notes the gradients it gave."""

    def __init__(self, seed: int, size: int = 5) -> None:
        rng = np.random.default_rng(seed)
        root = rng.standard_normal((2 * size, 2 * size))
        self.hessian = root @ root.T / (2 * size)
        self.linear = rng.standard_normal(2 * size)
        self.common = rng.standard_normal(size)
        self.personal = rng.standard_normal(size)
        self.size = size

    def gradients(self, batch: object) -> Gradients:
        z = np.concatenate([self.common, self.personal])
        gradient = self.hessian @ z - self.linear
        loss = 0.5 * z @ self.hessian @ z - self.linear @ z
        return Gradients(float(loss), gradient[: self.size], gradient[self.size :])


def _hypergradient_used(oracle: Quadratic, kind: Hypergradient, alpha: float) -> np.ndarray:
    """What the upper AdamW step was given, read off its first moment."""
    state = AlgorithmState()
    settings = PF2LoRA(kind, LowerOptimizer.SGD, alpha)
    PF2LoRAStep(settings).step(oracle, None, state, TRAINING)
    return state.vectors["upper.m"] / 0.1


def _exact_hypergradient(oracle: Quadratic, alpha: float) -> np.ndarray:
    """grad_x f(x, y+) - alpha H_xy grad_y f(x, y+), in closed form."""
    n = oracle.size
    x, y = oracle.common, oracle.personal
    y_plus = y - alpha * oracle.gradients(None).personal
    gradient = oracle.hessian @ np.concatenate([x, y_plus]) - oracle.linear
    return gradient[:n] - alpha * oracle.hessian[:n, n:] @ gradient[n:]


@pytest.mark.parametrize("seed", range(3))
def test_the_secant_is_the_hypergradient_to_second_order_in_alpha(seed: int) -> None:
    print(f"seed {seed}")
    alphas = [0.1, 0.05, 0.025, 0.0125]
    secant, first = [], []
    for alpha in alphas:
        exact = _exact_hypergradient(Quadratic(seed), alpha)
        for kind, errors in ((Hypergradient.SECANT, secant), (Hypergradient.FIRST_ORDER, first)):
            used = _hypergradient_used(Quadratic(seed), kind, alpha)
            errors.append(float(np.linalg.norm(used - exact)))
    orders = [np.polyfit(np.log(alphas), np.log(errors), 1)[0] for errors in (secant, first)]
    assert orders[0] == pytest.approx(2.0, abs=0.1)
    assert orders[1] == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize(
    ("algorithm", "common_moves", "personal_moves"),
    [
        (PF2LoRAStep(PF2LoRA()), True, True),
        (PF2LoRAStep(PF2LoRA(lower_optimizer=LowerOptimizer.SGD)), True, True),
        (HomLoRAStep(), True, False),
        (LocalOnlyStep(), False, True),
    ],
)
def test_each_algorithm_moves_what_it_says(
    algorithm: object, common_moves: bool, personal_moves: bool
) -> None:
    oracle = Quadratic(0)
    before = oracle.common.tobytes(), oracle.personal.tobytes()
    loss = oracle.gradients(None).loss
    state = AlgorithmState()
    assert algorithm.step(oracle, None, state, TRAINING) == pytest.approx(loss)
    assert (oracle.common.tobytes() != before[0]) == common_moves
    assert (oracle.personal.tobytes() != before[1]) == personal_moves
    for _ in range(20):
        algorithm.step(oracle, None, state, TRAINING)
    assert oracle.gradients(None).loss < loss


def test_adamw_is_torchs() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start = rng.standard_normal(20)
    ours, state = start.copy(), AlgorithmState()
    theirs = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    for _ in range(30):
        gradient = rng.standard_normal(20)
        adamw_step(ours, gradient, state, "x", 0.01, 0.1)
        theirs.grad = torch.from_numpy(gradient)
        optimizer.step()
    assert np.abs(ours - theirs.detach().numpy()).max() < 1e-12
