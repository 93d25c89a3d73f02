"""Compiling a backbone: what comes out, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the extra export: make test-export")
runtime = pytest.importorskip("onnxruntime.capi._pybind_state")
if not hasattr(runtime, "GradientGraphBuilder"):
    pytest.skip("this onnxruntime is not the training one", allow_module_level=True)

import onnxruntime  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from edge_client import cli  # noqa: E402
from quantization.artifact import load_artifact  # noqa: E402
from quantization.backbone import load_backbone  # noqa: E402
from quantization.errors import ArtifactError, MissingExtraError  # noqa: E402
from quantization.fingerprint import fingerprint  # noqa: E402
from quantization.manifest import WEIGHTS, ArtifactScheme, EmbeddingScheme  # noqa: E402
from quantization.onnx.export import export_artifact  # noqa: E402
from quantization.onnx.lowering import lower  # noqa: E402
from quantization.onnx.weights import int4_codes  # noqa: E402
from quantization.tasks import TaskKind  # noqa: E402
from tests.quantization.compiled import write_case  # noqa: E402

WORDS = ["<unk>", "<end>", "A", "text", "of", "a", "few", "words", "and", "then", "some", "more"]
SIZES: dict[str, Any] = {
    "vocab_size": 56,
    "hidden_size": 48,
    "intermediate_size": 41,
    "num_hidden_layers": 2,
}
CONFIGS = {
    "albert": (AlbertModel, AlbertConfig(**SIZES, embedding_size=24, num_attention_heads=4)),
    "bert": (BertModel, BertConfig(**SIZES, num_attention_heads=4)),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(
            vocab_size=56,
            n_positions=64,
            n_embd=48,
            n_layer=2,
            n_head=4,
            bos_token_id=1,
            eos_token_id=1,
        ),
    ),
    "gemma": (
        GemmaForCausalLM,
        GemmaConfig(
            **SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=12, pad_token_id=1
        ),
    ),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(
            **{**SIZES, "intermediate_size": 32},
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=2,
        ),
    ),
    "roberta": (RobertaModel, RobertaConfig(**SIZES, num_attention_heads=4)),
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)),
}
CLASSIFICATION, CAUSAL = TaskKind.SEQUENCE_CLASSIFICATION, TaskKind.CAUSAL_LM
PLAIN = EmbeddingScheme.FLOAT32


def write_backbone(folder: Path, name: str) -> str:
    """A tiny random model with a tokenizer of a few words."""
    torch.manual_seed(0)
    make, config = CONFIGS[name]
    make(config).save_pretrained(folder)
    words = {word: i for i, word in enumerate(dict.fromkeys(WORDS))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"eos_token": "<end>", "unk_token": "<unk>", "pad_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    return write_backbone(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture(scope="module")
def int8(tmp_path_factory, bert):
    folder = tmp_path_factory.mktemp("int8")
    return write_case(folder, bert, CLASSIFICATION, ArtifactScheme.INT8, EmbeddingScheme.INT8)


def nodes(path: Path, operator: str = "") -> list[Any]:
    graph = onnx.load(path, load_external_data=False).graph
    return [node for node in graph.node if not operator or node.op_type == operator]


def worst_error(case) -> float:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        case.artifact.gradient_graph, options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, case.arrays("inputs")), strict=True))
    expected = case.arrays("outputs")
    return max(
        float(np.linalg.norm(found[name] - expected[name]) / np.linalg.norm(expected[name]))
        for name in names
    )


@pytest.mark.parametrize("task", TaskKind)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_decoders_learn_either_task(tmp_path, name, task):
    backbone = write_backbone(tmp_path / "backbone", name)
    case = write_case(tmp_path, backbone, task, ArtifactScheme.NONE, PLAIN)
    assert worst_error(case) < 1e-5


@pytest.mark.parametrize("name", ["albert", "roberta"])
def test_layers_used_again_and_tensors_that_happen_to_be_equal(tmp_path, name):
    """ALBERT's layers are one; nothing is trained yet, so biases are zero, the head's two too."""
    backbone = write_backbone(tmp_path / "backbone", name)
    case = write_case(tmp_path, backbone, CLASSIFICATION, ArtifactScheme.NONE, PLAIN)
    assert worst_error(case) < 1e-5


def test_scaled_embeddings_stay_as_they_are(tmp_path):
    backbone = write_backbone(tmp_path / "backbone", "gemma")
    with pytest.raises(ArtifactError, match="no plain table of them; use float32"):
        write_case(tmp_path, backbone, CAUSAL, ArtifactScheme.NONE, EmbeddingScheme.INT8)
    assert worst_error(write_case(tmp_path, backbone, CAUSAL, ArtifactScheme.NONE, PLAIN)) < 1e-5


def test_experts_are_refused_by_name(tmp_path, capfd):
    backbone = write_backbone(tmp_path / "backbone", "mixtral")
    with pytest.raises(ArtifactError, match=r"experts\.gate_up_proj' is a stack of matrices"):
        write_case(tmp_path, backbone, CAUSAL, ArtifactScheme.NONE, PLAIN)
    assert "graph(" not in capfd.readouterr().out


@pytest.mark.parametrize("scheme", ArtifactScheme)
def test_blocks_that_do_not_divide_a_row(tmp_path, bert, scheme):
    """41 numbers a row are a block and a part of INT4, and 41 rows of 48 no whole ones of NF4."""
    assert worst_error(write_case(tmp_path, bert, CLASSIFICATION, scheme, PLAIN)) < 1e-5


def test_the_manifest_says_what_was_compiled(int8, bert):
    manifest = int8.artifact.manifest
    assert manifest.fingerprint == fingerprint(Path(bert))
    assert (manifest.scheme, manifest.embeddings) == (ArtifactScheme.INT8, EmbeddingScheme.INT8)
    assert (manifest.task, manifest.label_count) == (CLASSIFICATION, 4)
    assert manifest.target_modules == "all-linear"
    assert manifest.head_modules == ("classifier",)
    assert [(t.name, t.shape) for t in manifest.head] == [
        ("classifier.bias", (4,)),
        ("classifier.weight", (4, 48)),
    ]
    layer = next(layer for layer in manifest.layers if layer.name.endswith("0.intermediate.dense"))
    assert (layer.outputs, layer.inputs, layer.transposed) == (41, 48, False)
    assert [layer.name for layer in manifest.layers] == sorted(x.name for x in manifest.layers)
    assert (manifest.pad_id, manifest.end_id) == (1, 1)


def test_layers_stored_transposed_are_marked(tmp_path):
    backbone = write_backbone(tmp_path / "backbone", "gpt2")
    case = write_case(tmp_path, backbone, CAUSAL, ArtifactScheme.NONE, PLAIN)
    layers = {layer.name: layer for layer in case.artifact.manifest.layers}
    attention = layers["transformer.h.0.attn.c_attn"]
    assert (attention.outputs, attention.inputs, attention.transposed) == (144, 48, True)


def test_every_use_of_a_weight_expands_it_for_itself(int8):
    expansions = nodes(int8.artifact.gradient_graph, "DequantizeLinear")
    layers = int8.artifact.manifest.layers
    backward = nodes(int8.artifact.evaluation_graph, "DequantizeLinear")
    # The first layers have no gradient to hand on below them: query, key and value of layer 0.
    assert len(expansions) == 2 * len(layers) - 3
    assert len(backward) == len(layers)
    constants = {
        tensor.name
        for tensor in onnx.load(
            int8.artifact.gradient_graph, load_external_data=False
        ).graph.initializer
    }
    scales = [node.input[1] for node in expansions]
    assert len(set(scales)) == len(scales)
    assert not constants.intersection(scales)


def test_no_float_weight_of_a_quantised_layer_is_stored(int8):
    for path in (int8.artifact.gradient_graph, int8.artifact.evaluation_graph):
        graph = onnx.load(path, load_external_data=False).graph
        matrices = {
            tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type)
            for tensor in graph.initializer
            if len(tensor.dims) == 2 and tensor.name.endswith((".weight", ".codes"))
        }
        assert matrices
        assert set(matrices.values()) == {"INT8"}


def test_both_graphs_share_the_weights(int8):
    places = []
    for path in (int8.artifact.gradient_graph, int8.artifact.evaluation_graph):
        graph = onnx.load(path, load_external_data=False).graph
        places.append(
            {
                t.name: [e.value for e in t.external_data]
                for t in graph.initializer
                if t.external_data
            }
        )
    assert places[0] == places[1]


@pytest.mark.parametrize("embeddings", EmbeddingScheme)
def test_a_table_that_is_the_head_too_is_stored_once(tmp_path, embeddings):
    backbone = write_backbone(tmp_path / "backbone", "gpt2")
    case = write_case(tmp_path, backbone, CAUSAL, ArtifactScheme.NONE, embeddings)
    graph = onnx.load(case.artifact.gradient_graph, load_external_data=False).graph
    places = [
        tuple(entry.value for entry in tensor.external_data)
        for tensor in graph.initializer
        if tuple(tensor.dims) == (56, 48)
    ]
    assert len(set(places)) == 1
    assert worst_error(case) < 1e-5


def test_compiling_again_gives_the_same_bytes(tmp_path, int8, bert):
    again = write_case(tmp_path, bert, CLASSIFICATION, ArtifactScheme.INT8, EmbeddingScheme.INT8)
    assert again.artifact.digest == int8.artifact.digest


def test_int4_codes_come_back_to_half_a_step():
    weight = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
    weight[2] = 0
    codes, scales = int4_codes(weight)
    wide = np.repeat(scales, 32, axis=1)[:, :40]
    assert codes.min() == -7 or codes.max() == 7
    assert (np.abs(codes * wide - weight) <= wide / 2 * (1 + 1e-6)).all()
    assert not codes[2].any()


def export(*arguments: str) -> int:
    return cli.main(["export", *arguments])


def test_the_command_takes_a_federation_s_settings(tmp_path, bert, capsys):
    config = tmp_path / "federation.toml"
    config.write_text(
        f'name = "f"\n[backbone]\nname = "{bert}"\n[task]\nkind = "sequence-classification"\n'
        'labels = ["a", "b", "c"]\n[adapter]\ntarget_modules = ["key", "dense"]\n'
    )
    out = tmp_path / "artifact"
    assert export(bert, "--config", str(config), "--out", str(out), "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    artifact = load_artifact(out, facts["digest"])
    assert artifact.manifest.label_count == 3
    assert artifact.manifest.target_modules == ("key", "dense")
    assert facts["layers"] == len(artifact.manifest.layers) == 9
    assert facts["bytes"] == sum(f.size_bytes for f in artifact.manifest.files)


def test_the_command_refuses_two_sources_of_settings(tmp_path, bert, capsys):
    arguments = ("--config", "f.toml", "--label-count", "2", "--out", str(tmp_path / "a"))
    assert export(bert, *arguments) == 1
    assert "--config" in capsys.readouterr().err


def test_the_command_refuses_a_folder_in_use(tmp_path, bert, capsys):
    (tmp_path / "kept").write_text("mine")
    assert export(bert, "--label-count", "2", "--out", str(tmp_path)) == 1
    assert "not empty" in capsys.readouterr().err
    assert (tmp_path / "kept").read_text() == "mine"


def test_the_command_names_a_target_that_is_not_there(tmp_path, bert, capsys):
    out = tmp_path / "artifact"
    assert (
        export(bert, "--label-count", "2", "--target-modules", "qry", "x", "--out", str(out)) == 1
    )
    assert "'qry' matches nothing" in capsys.readouterr().err
    assert not out.exists()


def test_nothing_is_left_of_an_export_that_fails(tmp_path, bert, monkeypatch):
    def fail(*_: object) -> None:
        raise ArtifactError("no")

    monkeypatch.setattr("quantization.onnx.export.give_weights", fail)
    with pytest.raises(ArtifactError, match="no"):
        write_case(tmp_path, bert, CLASSIFICATION, ArtifactScheme.NONE, PLAIN)
    assert not (tmp_path / "artifact").exists()


def test_a_runtime_that_does_not_train_is_named(tmp_path, bert, monkeypatch):
    monkeypatch.delattr("quantization.onnx.gradient.runtime.GradientGraphBuilder")
    with pytest.raises(MissingExtraError, match=r"onnxruntime-training-cpu.*'\.\[export\]'"):
        write_case(tmp_path, bert, CLASSIFICATION, ArtifactScheme.NONE, PLAIN)


def test_the_weights_file_is_as_small_as_its_scheme(tmp_path, bert):
    sizes = {}
    for scheme in ArtifactScheme:
        case = write_case(tmp_path / scheme.value, bert, CLASSIFICATION, scheme, PLAIN)
        sizes[scheme] = (case.folder / "artifact" / WEIGHTS).stat().st_size
    assert sizes[ArtifactScheme.NONE] > sizes[ArtifactScheme.INT8] > sizes[ArtifactScheme.INT4]


def test_a_graph_that_computes_something_else_is_refused(tmp_path, bert, monkeypatch):
    def lower_wrongly(model: Any) -> None:
        lower(model)
        for node in model.graph.node:
            node.op_type = "Tanh" if node.op_type == "Erf" else node.op_type

    monkeypatch.setattr("quantization.onnx.gradient.lower", lower_wrongly)
    with pytest.raises(ArtifactError, match=r"is wrong: the gradient of .* is not torch's"):
        write_case(tmp_path, bert, CLASSIFICATION, ArtifactScheme.NONE, PLAIN)


def test_a_layer_that_has_no_part_in_the_loss_is_named(tmp_path, bert):
    loaded = load_backbone(bert, task=CLASSIFICATION, label_count=2, attention="eager")
    loaded.model.get_submodule("bert").register_module("spare", torch.nn.Linear(48, 48))
    with pytest.raises(ArtifactError, match="spare"):
        export_artifact(
            loaded,
            tmp_path / "artifact",
            scheme=ArtifactScheme.NONE,
            embeddings=PLAIN,
            layers=["bert.spare", "bert.pooler.dense"],
            target_modules=("spare", "pooler.dense"),
            label_count=2,
        )
