"""Write an adapter in PEFT's file layout, so that any program that loads PEFT adapters can run it.

Both levels become one LoRA of rank r + r2, without rounding:

    B A + D C = [B D] [A; C]        lora_B [m, r + r2], lora_A [r + r2, n], lora_alpha = s (r + r2)

A layer may also be cut to a smaller rank, which then stands in `rank_pattern` and `alpha_pattern`.

PEFT itself is not needed; the layout is that of PEFT 0.19 to 0.21 (`adapter_config.json`,
`adapter_model.safetensors`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    cut: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Write `adapter` into `folder` for `PeftModel.from_pretrained(base_model, folder)`.

    With `level` COMMON only the federated level is written; at PERSONAL the files hold what never
    leaves the device otherwise. The base model is the unquantised checkpoint, or one quantised
    otherwise; its logits then differ as its backbone does. `cut` has factors [k, n] and [m, k] for
    layers that are to be written with these in place of their own.

    Raises:
        AdapterError: the adapter has nothing at that level; or a classifier's head is not part of
            it, and PEFT would put a random one in its place.
    """
    kind = TaskKind(task)
    heads = _heads(adapter, level)
    if kind is TaskKind.SEQUENCE_CLASSIFICATION and not heads:
        raise AdapterError(f"no trained head at level {level.name.lower()}: a classifier needs one")
    factors = {
        name: (cut or {}).get(name) or layer.factors(level)
        for name, layer in adapter.layers.items()
    }
    pairs = {name: pair for name, pair in factors.items() if pair is not None}
    if not pairs:
        raise AdapterError(f"the adapter has no factors at level {level.name.lower()}")
    ranks = {name: down.shape[0] for name, (down, _) in pairs.items()}
    config = _config(adapter, ranks, base_model_name, kind)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_named(pairs) | heads, folder / "adapter_model.safetensors", {"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def _named(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{_PREFIX}.{name}.lora_{letter}.weight": _plain(factor)
        for name, pair in pairs.items()
        for letter, factor in zip("AB", pair, strict=True)
    }


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
    adapter: TwoLevelAdapter, ranks: Mapping[str, int], base_model_name: str, kind: TaskKind
) -> dict[str, Any]:
    rank = max(ranks.values())
    smaller = {name: own for name, own in ranks.items() if own != rank}
    return {
        # PEFT divides alpha by the layer's own rank.
        "alpha_pattern": {name: adapter.scaling * own for name, own in smaller.items()},
        "base_model_name_or_path": base_model_name,
        "bias": "none",
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in adapter.layers.values()),
        "inference_mode": True,
        "lora_alpha": adapter.scaling * rank,
        "lora_dropout": 0.0,
        "modules_to_save": list(adapter.head_modules) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": smaller,
        # Whole names: a suffix could match layers that were left out.
        "target_modules": list(adapter.layers),
        "task_type": _TASK_TYPES[kind],
        "use_rslora": False,
    }
