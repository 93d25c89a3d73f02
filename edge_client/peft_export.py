"""Write an adapter in PEFT's file layout, so that any program that loads PEFT adapters can run it.

Both levels become one LoRA of rank r + r2, without rounding:

    B A + D C = [B D] [A; C]        lora_B [m, r + r2], lora_A [r + r2, n], lora_alpha = s (r + r2)

PEFT itself is not needed; the layout is that of PEFT 0.19 to 0.21 (`adapter_config.json`,
`adapter_model.safetensors`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from safetensors.torch import save_file
from torch import Tensor

from edge_client.backends.base import Level
from edge_client.lora import AdapterError, TwoLevelAdapter
from protocol.federation import TaskKind
from quantization.bnb import is_below

_TASK_TYPES: Final = {
    TaskKind.SEQUENCE_CLASSIFICATION: "SEQ_CLS",
    TaskKind.CAUSAL_LM: "CAUSAL_LM",
}
_PREFIX: Final = "base_model.model"


def save_pretrained(
    adapter: TwoLevelAdapter,
    folder: Path,
    *,
    base_model_name: str,
    task: TaskKind | str,
    level: Level = Level.PERSONAL,
) -> None:
    """Write `adapter` into `folder` for `PeftModel.from_pretrained(base_model, folder)`.

    With `level` COMMON only the federated level is written; at PERSONAL the files hold what never
    leaves the device otherwise. The base model is the unquantised checkpoint, or one quantised
    otherwise; its logits then differ as its backbone does.

    Raises:
        AdapterError: the adapter has nothing at that level; or a classifier's head is not part of
            it, and PEFT would put a random one in its place.
    """
    kind = TaskKind(task)
    heads = _heads(adapter, level)
    if kind is TaskKind.SEQUENCE_CLASSIFICATION and not heads:
        raise AdapterError(f"no trained head at level {level.name.lower()}: a classifier needs one")
    factors = _factors(adapter, level)
    if not factors:
        raise AdapterError(f"the adapter has no factors at level {level.name.lower()}")
    rank = next(iter(factors.values())).shape[0]
    config = _config(adapter, rank, base_model_name, kind)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(factors | heads, folder / "adapter_model.safetensors", {"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def _factors(adapter: TwoLevelAdapter, level: Level) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, layer in adapter.layers.items():
        factors = layer.factors(level)
        if factors is not None:
            tensors[f"{_PREFIX}.{name}.lora_A.weight"] = _plain(factors[0])
            tensors[f"{_PREFIX}.{name}.lora_B.weight"] = _plain(factors[1])
    return tensors


def _heads(adapter: TwoLevelAdapter, level: Level) -> dict[str, Tensor]:
    trained = adapter.common | (adapter.personal if level is Level.PERSONAL else {})
    return {
        f"{_PREFIX}.{name}": _plain(parameter)
        for name, parameter in trained.items()
        if is_below(name, adapter.head_modules)
    }


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _config(
    adapter: TwoLevelAdapter, rank: int, base_model_name: str, kind: TaskKind
) -> dict[str, Any]:
    return {
        "base_model_name_or_path": base_model_name,
        "bias": "none",
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in adapter.layers.values()),
        "inference_mode": True,
        "lora_alpha": adapter.scaling * rank,
        "lora_dropout": 0.0,
        "modules_to_save": list(adapter.head_modules) or None,
        "peft_type": "LORA",
        "r": rank,
        # Whole names: a suffix could match layers that were left out.
        "target_modules": list(adapter.layers),
        "task_type": _TASK_TYPES[kind],
        "use_rslora": False,
    }
