"""The bilevel step against mathematics, and which vectors each algorithm moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from edge_client.algorithms import algorithm_for
from edge_client.algorithms.base import AlgorithmState, Gradients, Plan
from edge_client.algorithms.hetlora import HetLoRAStep
from edge_client.algorithms.optimizers import adam_derivative, adamw_step, clipped
from edge_client.algorithms.perfedavg import PerFedAvgStep
from edge_client.algorithms.pf2lora import PF2LoRAStep
from edge_client.algorithms.schedule import plans, rate_factor
from protocol.federation import Decay, Rounds, Training
from protocol.methods import (
    Algorithm,
    FedDPA,
    FedSALoRA,
    FFALoRA,
    HetLoRA,
    HomLoRA,
    Hypergradient,
    LocalOnly,
    LowerOptimizer,
    PerFedAvg,
    PF2LoRA,
)
from tests.protocol.samples import SETTINGS

PLAN = Plan(Training(learning_rate=0.01))
SIZE = 6  # of each level: one layer with A [1, 2], B [2, 2]... any split will do


class Quadratic:
    """f(x, y) = 1/2 z'Hz - b'z with z = (x, y), in float64; a batch is a shift of b."""

    def __init__(self, seed: int, size: int = SIZE) -> None:
        rng = np.random.default_rng(seed)
        root = rng.standard_normal((2 * size, 2 * size))
        self.hessian = root @ root.T / (2 * size)
        self.linear = rng.standard_normal(2 * size)
        self.common = rng.standard_normal(size)
        self.personal = rng.standard_normal(size)
        self.size = size
        self.personal_head = 0.0
        self.calls = 0

    def gradients(self, batch: float | None) -> Gradients:
        self.calls += 1
        linear = self.linear + (batch or 0.0)
        z = np.concatenate([self.common, self.personal])
        gradient = self.hessian @ z - linear
        loss = 0.5 * z @ self.hessian @ z - linear @ z
        return Gradients(float(loss), gradient[: self.size], gradient[self.size :])

    def local_gradients(self, batch: float | None) -> Gradients:
        common = self.common
        self.common = common * 0.0
        found = self.gradients(batch)
        self.common = common
        return Gradients(found.loss, found.common * 0.0, found.personal)

    def mixed_product(self, batch: object, vector: np.ndarray) -> np.ndarray:
        return self.hessian[: self.size, self.size :] @ vector

    def factors(self, vector: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        half = self.size // 2
        return [(vector[:half].reshape(half, 1), vector[half:].reshape(1, half))]

    def personal_factors(self, vector: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        return self.factors(vector)


def _hypergradient_used(
    oracle: Quadratic,
    settings: PF2LoRA,
    batches: tuple[float | None, ...] = (None,),
    plan: Plan = PLAN,
) -> np.ndarray:
    """What the upper AdamW step was given, read off its first moment."""
    state = _with_lower_moments()
    PF2LoRAStep(settings).step(oracle, batches, state, plan)
    return state.vectors["upper.m"] / 0.1


def _with_lower_moments() -> AlgorithmState:
    """As after some steps: Adam's first is of the gradient's sign, and has no derivative."""
    state, rng = AlgorithmState(), np.random.default_rng(8)
    for _ in range(3):
        adamw_step(np.zeros(SIZE), rng.standard_normal(SIZE), state.vectors, "lower", 0.1)
    return state


def _unrolled(
    oracle: Quadratic, settings: PF2LoRA, batches: tuple[float | None, ...], plan: Plan
) -> Callable[[np.ndarray], float]:
    """x -> f(x, y+(x)): what the hypergradient is the gradient of, by the step's own code."""

    def objective(x: np.ndarray) -> float:
        trial = Quadratic.__new__(Quadratic)
        trial.__dict__ = {**oracle.__dict__, "common": x.copy(), "personal": oracle.personal.copy()}
        step = PF2LoRAStep(replace(settings, hypergradient=Hypergradient.FIRST_ORDER))
        state = _with_lower_moments()
        step._lower_step(trial, trial.gradients(batches[0]).personal, state, plan)
        return trial.gradients(batches[-1]).loss

    return objective


@pytest.mark.parametrize("kind", [Hypergradient.EXACT, Hypergradient.FINITE_DIFFERENCE])
@pytest.mark.parametrize("optimizer", list(LowerOptimizer))
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("clip_norm", [0.0, 1.5])
def test_the_hypergradient_is_the_gradient_of_the_unrolled_objective(
    kind: Hypergradient, optimizer: LowerOptimizer, separate: bool, clip_norm: float
) -> None:
    settings = PF2LoRA(kind, optimizer, 0.3, separate_batches=separate)
    batches = (0.0, 0.7) if separate else (0.0,)
    plan = replace(PLAN, training=replace(PLAN.training, clip_norm=clip_norm))
    oracle = Quadratic(4)
    assert np.linalg.norm(oracle.gradients(0.0).personal) > clip_norm
    objective = _unrolled(oracle, settings, batches, plan)
    slope = np.array(
        [
            (objective(oracle.common + e) - objective(oracle.common - e)) / 2e-6
            for e in 1e-6 * np.eye(SIZE)
        ]
    )
    wanted = clipped(slope, clip_norm)  # as the upper step's gradient is in its turn
    used = _hypergradient_used(Quadratic(4), settings, batches, plan)
    assert used == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_secant_is_the_hypergradient_to_second_order_in_alpha(seed: int) -> None:
    print(f"seed {seed}")
    alphas = [0.1, 0.05, 0.025, 0.0125]
    errors: dict[Hypergradient, list[float]] = {}
    for alpha in alphas:
        found = {
            kind: _hypergradient_used(Quadratic(seed), PF2LoRA(kind, LowerOptimizer.SGD, alpha))
            for kind in (Hypergradient.EXACT, Hypergradient.SECANT, Hypergradient.FIRST_ORDER)
        }
        exact = found.pop(Hypergradient.EXACT)
        for kind, used in found.items():
            errors.setdefault(kind, []).append(float(np.linalg.norm(used - exact)))
    orders = {k: np.polyfit(np.log(alphas), np.log(e), 1)[0] for k, e in errors.items()}
    assert orders[Hypergradient.SECANT] == pytest.approx(2.0, abs=0.1)
    assert orders[Hypergradient.FIRST_ORDER] == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize(
    ("kind", "gradients"),
    [
        (Hypergradient.EXACT, 2),
        (Hypergradient.SECANT, 2),
        (Hypergradient.FIRST_ORDER, 2),
        (Hypergradient.FINITE_DIFFERENCE, 4),
        (Hypergradient.OPTIMISTIC, 1),
        (Hypergradient.JOINT, 1),
    ],
)
def test_each_hypergradient_costs_what_it_says(kind: Hypergradient, gradients: int) -> None:
    oracle = Quadratic(0)
    _hypergradient_used(oracle, PF2LoRA(kind))
    assert oracle.calls == gradients


def test_the_optimistic_step_extrapolates_the_last_gradient_within_a_round() -> None:
    oracle, state = Quadratic(0), AlgorithmState()
    step = PF2LoRAStep(PF2LoRA(Hypergradient.OPTIMISTIC, LowerOptimizer.SGD, 0.1))
    first = oracle.gradients(None).common.copy()
    step.step(oracle, [None], state, PLAN)
    second = oracle.gradients(None).common.copy()
    step.step(oracle, [None], state, replace(PLAN, step=1))
    assert state.vectors["upper.m"] == pytest.approx(0.09 * first + 0.1 * (2 * second - first))
    moved = oracle.gradients(None).common.copy()
    before = state.vectors["upper.m"].copy()
    step.step(oracle, [None], state, PLAN)  # a new round: the last gradient was elsewhere
    assert state.vectors["upper.m"] == pytest.approx(0.9 * before + 0.1 * moved)


def test_several_lower_steps_go_further_down() -> None:
    one, three = Quadratic(1), Quadratic(1)
    for oracle, steps in ((one, 1), (three, 3)):
        settings = PF2LoRA(Hypergradient.SECANT, LowerOptimizer.SGD, 1e-3, lower_steps=steps)
        _hypergradient_used(oracle, replace(settings, lower_learning_rate=0.1))
    oracle = Quadratic(1)
    for _ in range(3):
        oracle.personal -= 0.1 * oracle.gradients(None).personal
    assert three.personal == pytest.approx(oracle.personal)
    assert one.calls == 2
    assert three.calls == 4


def test_until_the_warm_up_is_over_only_the_common_level_learns() -> None:
    oracle, state = Quadratic(0), AlgorithmState()
    personal = oracle.personal.copy()
    step = PF2LoRAStep(PF2LoRA(common_warmup_rounds=2))
    for number, stays in ((1, True), (2, True), (3, False)):
        step.step(oracle, [None], state, replace(PLAN, round=number))
        assert np.array_equal(oracle.personal, personal) == stays


@pytest.mark.parametrize(
    ("settings", "common_moves", "personal_moves"),
    [
        *[(PF2LoRA(kind), True, True) for kind in Hypergradient],
        (PF2LoRA(Hypergradient.SECANT, LowerOptimizer.SGD, 1e-3, lower_momentum=0.5), True, True),
        (HomLoRA(), True, False),
        (FFALoRA(), True, False),
        (LocalOnly(), False, True),
        (FedSALoRA(), True, True),
        (PerFedAvg(inner_learning_rate=0.01), True, False),
        (PerFedAvg(hessian_free=True, inner_learning_rate=0.01), True, False),
    ],
)
def test_each_algorithm_moves_what_it_says_and_learns(
    settings: Algorithm, common_moves: bool, personal_moves: bool
) -> None:
    algorithm = algorithm_for(replace(SETTINGS, algorithm=settings), 0)
    layout = algorithm.layout(SETTINGS.adapter)
    oracle = Quadratic(0)
    # A level that the layout leaves out has no parameters.
    if not layout.personal_rank and layout.personal == "CD":
        oracle = _without(oracle, personal=True)
    if not layout.common_rank:
        oracle = _without(oracle, personal=False)
    before = oracle.common.copy(), oracle.personal.copy()
    loss = oracle.gradients(None).loss
    state = AlgorithmState()
    batches = [None] * algorithm.batches_per_step
    assert algorithm.step(oracle, batches, state, PLAN) == pytest.approx(loss)
    assert np.array_equal(oracle.common, before[0]) != common_moves
    assert np.array_equal(oracle.personal, before[1]) != personal_moves
    for _ in range(20):
        algorithm.step(oracle, batches, state, PLAN)
    assert oracle.gradients(None).loss < loss


def _without(oracle: Quadratic, *, personal: bool) -> Quadratic:
    n = oracle.size
    kept = slice(0, n) if personal else slice(n, 2 * n)
    oracle.hessian, oracle.linear = oracle.hessian[kept, kept], oracle.linear[kept]
    if personal:
        oracle.personal = np.empty(0)
    else:
        oracle.common, oracle.size = np.empty(0), 0
    return oracle


def test_feddpa_trains_the_personal_level_first_and_then_the_common_one() -> None:
    algorithm = algorithm_for(replace(SETTINGS, algorithm=FedDPA()), 0)
    oracle, state = Quadratic(0), AlgorithmState()
    moved = []
    for step in range(4):
        before = oracle.common.copy(), oracle.personal.copy()
        plan = Plan(Training(local_steps=4), step=step)
        algorithm.step(oracle, [None], state, plan)
        moved.append(
            (
                not np.array_equal(oracle.common, before[0]),
                not np.array_equal(oracle.personal, before[1]),
            )
        )
    assert moved == [(False, True), (False, True), (True, False), (True, False)]


@pytest.mark.parametrize("hessian_free", [False, True])
def test_per_fedavg_descends_the_loss_after_adaptation(hessian_free: bool) -> None:
    rate = 0.2
    oracle = _without(Quadratic(3), personal=True)
    start = oracle.common.copy()
    state = AlgorithmState()
    step = PerFedAvgStep(PerFedAvg(hessian_free=hessian_free, inner_learning_rate=rate))
    step.step(oracle, [0.0, 0.5], state, PLAN)
    adapted = start - rate * (oracle.hessian @ start - oracle.linear)
    meta = oracle.hessian @ adapted - (oracle.linear + 0.5)
    if hessian_free:
        meta = meta - rate * oracle.hessian @ meta
    assert state.vectors["upper.m"] / 0.1 == pytest.approx(meta)


def test_hetlora_trains_its_own_rank_and_prunes_it_when_the_tail_shrinks() -> None:
    oracle = _without(Quadratic(2, 8), personal=True)
    algorithm, state = HetLoRAStep(HetLoRA(rank_min=1, rank_share=0.7, penalty=50.0), 3), None
    state = AlgorithmState()
    ((a, b),) = oracle.factors(oracle.common)
    a[3:], b[:, 3:] = 0.0, 0.0  # as the coordinator's truncation leaves it
    plan = Plan(Training(learning_rate=0.02))
    assert algorithm.rank(state) == 3
    for step in range(10):
        algorithm.step(oracle, [None], state, replace(plan, step=step))
    algorithm.end_round(oracle, state, PLAN)
    assert algorithm.rank(state) == 2  # floor(0.7 * 3)
    assert not a[2:].any()
    assert not b[:, 2:].any()
    assert a[:2].all()


def test_adamw_and_its_derivative_are_torchs() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start = rng.standard_normal(20)
    ours = start.copy()
    memory: dict[str, np.ndarray] = {}
    theirs = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    for _ in range(30):
        gradient = rng.standard_normal(20)
        before, earlier = ours.copy(), {name: v.copy() for name, v in memory.items()}
        adamw_step(ours, gradient, memory, "x", 0.01, 0.1)
        theirs.grad = torch.from_numpy(gradient)
        optimizer.step()
    assert np.abs(ours - theirs.detach().numpy()).max() < 1e-12
    nudged = []
    for sign in (1, -1):
        trial, copied = before.copy(), {name: v.copy() for name, v in earlier.items()}
        adamw_step(trial, gradient + sign * 1e-6, copied, "x", 0.01)
        nudged.append(trial)
    slope = (nudged[0] - nudged[1]) / 2e-6
    assert adam_derivative(gradient, memory, "x", 0.01) == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_clipping_bounds_the_norm_and_zero_leaves_it() -> None:
    gradient = np.array([3.0, 4.0])
    assert clipped(gradient, 1.0) == pytest.approx([0.6, 0.8])
    assert clipped(gradient, 6.0) is gradient
    assert clipped(gradient, 0.0) is gradient


@pytest.mark.parametrize(
    ("training", "factors"),
    [
        (Training(), [1.0, 1.0, 1.0, 1.0]),
        (Training(warmup_rounds=2), [1 / 3, 2 / 3, 1.0, 1.0]),
        (Training(decay=Decay.LINEAR), [1.0, 0.75, 0.5, 0.25]),
        (Training(decay=Decay.COSINE), [1.0, 0.8536, 0.5, 0.1464]),
        (Training(warmup_rounds=2, decay=Decay.LINEAR), [1 / 3, 2 / 3, 1.0, 0.5]),
    ],
)
def test_rates_follow_the_schedule(training: Training, factors: list[float]) -> None:
    settings = replace(SETTINGS, training=training, rounds=Rounds(count=4))
    assert [rate_factor(settings, n) for n in range(1, 5)] == pytest.approx(factors, abs=1e-4)
    plan = next(iter(plans(settings, 2)))
    assert plan.training.learning_rate == plan.factor * training.learning_rate
    assert plan.factor == rate_factor(settings, 2)
