"""Architectures by their configuration, small and untrained: each can be trained or is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from edge_client.backends.base import Level
from edge_client.backends.torch_backend import TorchTrainer
from edge_client.data import Example
from edge_client.errors import AdapterError, ConfigurationError, DataError
from protocol.federation import Adapter, Backbone, FederationSettings, Task, TaskKind, Training
from protocol.methods import Hypergradient, PF2LoRA
from quantization.backbone import load_backbone
from quantization.checkpoint import longest_input
from quantization.errors import BackboneError, SchemeError
from quantization.fingerprint import fingerprint
from quantization.quantize import quantize

WORDS = 300
POSITIONS = 32
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
ENCODER = {**SIZES, "max_position_embeddings": POSITIONS}
DECODER = {**ENCODER, "num_key_value_heads": 1}
GPT = {**ENCODER, "n_positions": POSITIONS, "n_embd": 16, "n_layer": 2, "n_head": 2}
# Kind of model, its configuration, and the adapted layers of "query-value".
CLASSIFIERS: dict[str, tuple[dict[str, Any], int]] = {
    "AlbertModel": ({**ENCODER, "embedding_size": 8}, 2),
    "DebertaV2Model": ({**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, 4),
    "DistilBertModel": ({**ENCODER, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}, 4),
    "ElectraModel": ({**ENCODER, "embedding_size": 8}, 4),
    "MPNetModel": (ENCODER, 4),
    "ModernBertModel": ({**ENCODER, "cls_token_id": 2, "sep_token_id": 2}, 2),
    "RobertaForMaskedLM": (ENCODER, 4),
}
DECODERS: dict[str, tuple[dict[str, Any], int]] = {
    "BloomForCausalLM": (GPT, 2),
    "FalconForCausalLM": (SIZES, 2),
    "GPT2LMHeadModel": (GPT, 2),
    "GPTJForCausalLM": ({**GPT, "rotary_dim": 4}, 4),
    "GPTNeoXForCausalLM": (ENCODER, 2),
    "GemmaForCausalLM": ({**DECODER, "head_dim": 8}, 4),
    "MistralForCausalLM": ({**DECODER, "sliding_window": 4}, 4),
    "OPTForCausalLM": ({**ENCODER, "ffn_dim": 24, "word_embed_proj_dim": 16}, 4),
    "Phi3ForCausalLM": (DECODER, 2),
    "PhiForCausalLM": (DECODER, 4),
    "Qwen2ForCausalLM": ({**DECODER, "tie_word_embeddings": True}, 4),
    "Qwen3ForCausalLM": ({**DECODER, "head_dim": 8, "tie_word_embeddings": True}, 4),
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
OTHERS: dict[str, dict[str, Any]] = {
    "BartForConditionalGeneration": {**SIZES, "d_model": 16, "encoder_layers": 1},
    "MambaForCausalLM": {**SIZES, "time_step_rank": 8},
    "MixtralForCausalLM": {**DECODER, **EXPERTS},
    "T5ForConditionalGeneration": {**SIZES, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2},
}
CLASSIFICATION, CAUSAL = TaskKind.SEQUENCE_CLASSIFICATION, TaskKind.CAUSAL_LM
TEXTS = ["a fine film", "The gradient comes back . So it does", "dull , all the way", "it does"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[[str], Path]:
    """Makes the folder of a kind of model, once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            known = {n: sizes for n, (sizes, _) in (CLASSIFIERS | DECODERS).items()} | OTHERS
            kind = getattr(transformers, name)
            torch.manual_seed(0)
            model = kind(kind.config_class(**known[name]))
            for parameter in model.parameters():  # larger than at first: differences must show
                parameter.data += 0.1 * torch.randn_like(parameter)
            model.save_pretrained(made[name])
            _save_tokenizer(made[name])
        return made[name]

    return folder


def _save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<pad>", "<end>"]
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<end>"
    )
    fast.save_pretrained(folder)


def _trainer(
    folder: Path,
    task: TaskKind,
    scheme: str = "none",
    *,
    max_length: int = 12,
    targets: str = "query-value",
    hypergradient: Hypergradient = Hypergradient.SECANT,
    **training: Any,
) -> TorchTrainer:
    labels = ("dull", "fine") if task is CLASSIFICATION else ()
    settings = FederationSettings(
        "test",
        Backbone(str(folder), "sha256:" + "0" * 64),
        Task(task, labels, max_length),
        Adapter(rank=2, personal_rank=1, target_modules=targets),
        Training(local_steps=2, batch_size=4, **training),
        PF2LoRA(hypergradient=hypergradient),
    )
    attention = "eager" if hypergradient is Hypergradient.EXACT else None
    backbone = load_backbone(
        str(folder), scheme=scheme, task=task.value, label_count=len(labels), attention=attention
    )
    return TorchTrainer(settings, backbone, personal_seed=1)


def _rows(task: TaskKind) -> list[Example]:
    return [
        Example(t, None, n % 2 if task is CLASSIFICATION else None) for n, t in enumerate(TEXTS)
    ]


def _backbone_bytes(trainer: TorchTrainer) -> dict[str, bytes]:
    trained = {**trainer._adapter.common, **trainer._adapter.personal}
    tensors = {**dict(trainer._model.named_parameters()), **dict(trainer._model.named_buffers())}
    return {
        name: tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors.items()
        if name not in trained and tensor.numel()
    }


COUNTS = {name: count for name, (_, count) in (CLASSIFIERS | DECODERS).items()}
CASES = [(name, CLASSIFICATION) for name in COUNTS] + [(name, CAUSAL) for name in DECODERS]


@pytest.mark.parametrize(("name", "task"), CASES)
def test_both_levels_move_all_of_them_and_not_a_byte_of_the_backbone(folders, name, task):
    for scheme in ("none", "bf16", "int8", "nf4") if task is CLASSIFICATION else ("nf4",):
        trainer = _trainer(folders(name), task, scheme)
        assert len(trainer._adapter.layers) == COUNTS[name]
        frozen, common, personal = _backbone_bytes(trainer), trainer.common(), trainer.personal()
        trainer.train(trainer.encode(_rows(task)), 0)
        assert _backbone_bytes(trainer) == frozen
        for parameter, array in trainer.common().arrays().items():
            assert (array != common.arrays()[parameter]).any(), (scheme, parameter)
        for parameter, array in trainer.personal().items():
            assert (array != personal[parameter]).any(), (scheme, parameter)


@pytest.mark.parametrize("name", DECODERS)
def test_no_keys_and_values_are_held_for_a_pass_that_never_comes(folders, name):
    model = load_backbone(str(folders(name)), task="causal-lm").model
    output = model(input_ids=torch.full((1, 4), 5))
    assert output.get("past_key_values") is None


@pytest.mark.parametrize("name", CLASSIFIERS | DECODERS)
def test_the_longest_input_is_the_longest_that_the_model_takes(folders, name):
    model = load_backbone(str(folders(name)), task="sequence-classification", label_count=2).model
    longest = longest_input(model)

    def run(length: int) -> None:
        ids = torch.full((1, length), 5)
        model(input_ids=ids, attention_mask=torch.ones_like(ids))

    if longest is None:
        run(2 * POSITIONS)  # they go on
    else:
        run(longest)
        with pytest.raises((IndexError, RuntimeError)):
            run(longest + 1)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("name", "task"), CASES)
def test_peft_gives_the_same_logits_merged_or_not(folders, name, task, tmp_path):
    peft = pytest.importorskip("peft")
    trainer = _trainer(folders(name), task)
    torch.manual_seed(1)
    for parameter in (trainer._adapter.common | trainer._adapter.personal).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    trainer.save_pretrained(tmp_path, str(folders(name)), {}, trainer.encode([]))
    batch = trainer.batch(trainer.encode(_rows(task)))
    ours = torch.from_numpy(trainer._logits(batch))
    with trainer._running_at(Level.BACKBONE):
        assert not torch.allclose(ours, torch.from_numpy(trainer._logits(batch)), atol=1e-3)
    kind = AutoModelForSequenceClassification if task is CLASSIFICATION else AutoModelForCausalLM
    base = kind.from_pretrained(folders(name))  # of two labels, unless told otherwise
    model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    inputs = {name: torch.from_numpy(array) for name, array in batch.inputs.items()}
    counted = inputs["attention_mask"].bool() if task is CAUSAL else slice(None)
    with torch.no_grad():
        for theirs in (model, model.merge_and_unload().eval()):
            torch.testing.assert_close(
                theirs(**inputs).logits[counted], ours[counted], rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("name", ["AlbertModel", "FalconForCausalLM", "GPT2LMHeadModel"])
def test_the_secant_is_near_the_exact_hypergradient(folders, name):
    """Over shared layers, fused and transposed ones alike; `exact` works by double backward."""
    found = {}
    for kind in Hypergradient:
        trainer = _trainer(folders(name), CLASSIFICATION, hypergradient=kind)
        before = trainer.common().flat()
        trainer.train(trainer.encode(_rows(CLASSIFICATION)), 0)
        found[kind] = trainer.common().flat() - before
        assert found[kind].any()
    step = found[Hypergradient.EXACT]
    for kind in (Hypergradient.SECANT, Hypergradient.FINITE_DIFFERENCE):
        cosine = found[kind] @ step / np.linalg.norm(found[kind]) / np.linalg.norm(step)
        assert cosine > 0.9, kind


@pytest.mark.parametrize("name", [*CLASSIFIERS, *DECODERS])
def test_a_row_does_not_notice_the_longer_ones_beside_it(folders, name):
    trainer = _trainer(folders(name), CLASSIFICATION)
    rows = trainer.encode(_rows(CLASSIFICATION))
    together = trainer._logits(trainer.batch(rows))
    for row, logits in zip(rows, together, strict=True):
        assert abs(trainer._logits(trainer.batch([row]))[0] - logits).max() < 1e-5


@pytest.mark.parametrize("name", ["AlbertModel", "BloomForCausalLM", "Qwen3ForCausalLM"])
def test_a_quantised_folder_is_the_same_backbone(folders, name, tmp_path):
    written = quantize(str(folders(name)), "nf4", tmp_path / "nf4")
    assert written.fingerprint == fingerprint(folders(name))
    batches = []
    for folder in (folders(name), tmp_path / "nf4"):
        trainer = _trainer(folder, CLASSIFICATION, "nf4")
        trainer.train(trainer.encode(_rows(CLASSIFICATION)), 0)
        batches.append(trainer.common().digest())
    assert batches[0] == batches[1]


@pytest.mark.parametrize(
    ("name", "task", "settings", "error", "reason"),
    [
        ("T5ForConditionalGeneration", CLASSIFICATION, {}, BackboneError, "t5 is an encoder with"),
        ("BartForConditionalGeneration", CAUSAL, {}, BackboneError, "bart is an encoder with"),
        ("RobertaForMaskedLM", CAUSAL, {}, BackboneError, "sees the tokens after the one it fore"),
        ("AlbertModel", CAUSAL, {}, BackboneError, r"Unrecognized.*AutoModelForCausalLM\.$"),
        ("MixtralForCausalLM", CAUSAL, {"scheme": "nf4"}, SchemeError, "experts.*use scheme none"),
        ("MambaForCausalLM", CAUSAL, {}, AdapterError, "linear layers are named: dt_proj, in_proj"),
        (
            "AlbertModel",
            CLASSIFICATION,
            {"gradient_checkpointing": True},
            ConfigurationError,
            "training.gradient_checkpointing: AlbertForSequenceClassification has none; use false",
        ),
        (
            "RobertaForMaskedLM",
            CLASSIFICATION,
            {"max_length": POSITIONS - 1},
            ConfigurationError,
            "task.max_length: the backbone does not take 31 tokens, with its 32 positions",
        ),
        ("GPT2LMHeadModel", CAUSAL, {"max_length": 33}, ConfigurationError, "task.max_length"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_it_is(
    folders, name, task, settings, error, reason
):
    with pytest.raises(error, match=reason):
        _trainer(folders(name), task, **settings)


@pytest.mark.parametrize(
    "name",
    ["MPNetModel", "RobertaForMaskedLM", "GPT2LMHeadModel", "GPTJForCausalLM", "OPTForCausalLM"],
)
def test_a_position_that_is_not_there_is_never_looked_up(folders, name):
    """On CUDA nothing would work in this process after that."""
    with pytest.raises(
        ConfigurationError, match=r"task\.max_length: .* not take 33 tokens"
    ) as found:
        _trainer(folders(name), CLASSIFICATION, max_length=POSITIONS + 1)
    assert re.fullmatch(r"row 3[2-4] of a table of 3[24]", str(found.value.__cause__))


def _in_json(file: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | changes))

    return change


def _as_bin(folder: Path, **more: object) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, **more}, folder / "pytorch_model.bin")


class _Program:
    """What runs if it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return pytest.fail, ("a program in a checkpoint has run",)


def _with_a_pad_token_of_its_own(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<filler>"})
    tokenizer.save_pretrained(folder)


OWN_CODE = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
FORMS = {
    "code": (_in_json("config.json", model_type="own", auto_map=OWN_CODE), "contains custom code"),
    "pickle": (lambda folder: _as_bin(folder, program=_Program()), "holds more than tensors"),
    "adapter": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "an adapter lies beside the model",
    ),
    "pad": (
        _with_a_pad_token_of_its_own,
        "the tokenizer's '<filler>' has id 300, and the model has 300 embeddings",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_that_brings_what_it_should_not_is_refused(folders, form, tmp_path, monkeypatch):
    # Nobody is asked whether to run the model's own code.
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    change, reason = FORMS[form]
    folder = tmp_path / "model"
    shutil.copytree(folders("GPT2LMHeadModel"), folder)
    change(folder)
    with pytest.raises(BackboneError, match=reason):
        load_backbone(str(folder), task="causal-lm")


def test_weights_in_bin_and_in_shards_are_the_same_backbone(folders, tmp_path):
    whole, found = folders("GPT2LMHeadModel"), []
    for name in ("bin", "shards"):
        shutil.copytree(whole, tmp_path / name)
    _as_bin(tmp_path / "bin")
    model = AutoModelForCausalLM.from_pretrained(whole)
    (tmp_path / "shards" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert fingerprint(tmp_path / "shards") == fingerprint(whole)
    for folder in (whole, tmp_path / "bin", tmp_path / "shards"):
        trainer = _trainer(folder, CAUSAL)
        trainer.train(trainer.encode(_rows(CAUSAL)), 0)
        found.append(trainer.common().digest())
    assert found == found[:1] * 3


def test_a_token_without_embedding_is_refused_with_its_text(folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders("GPT2LMHeadModel"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(folder)
    trainer = _trainer(folder, CLASSIFICATION)
    trainer.encode(_rows(CLASSIFICATION))
    with pytest.raises(DataError, match=r"token '<image>', for which.*no embedding: 'an <image>'"):
        trainer.encode([Example("an <image>", None, 0)])
    with pytest.raises(DataError, match="leaves no token"):
        trainer.predict([Example("", None, None)], Level.PERSONAL)


def test_experts_are_trained_unquantised_and_an_input_may_fill_all_positions(folders):
    trainer = _trainer(folders("MixtralForCausalLM"), CAUSAL)
    trainer.train(trainer.encode(_rows(CAUSAL)), 0)
    trainer = _trainer(folders("GPT2LMHeadModel"), CAUSAL, max_length=POSITIONS)
    trainer.train(trainer.encode([Example("a fine film " * POSITIONS, None, None)]), 0)
