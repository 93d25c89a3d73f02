"""An adapter in PEFT's layout: what its arrays are called there, and its configuration.

Devices write both levels with it, the coordinator the common adapter. A LoRA of rank k has
lora_A [k, n] and lora_B [m, k]; layers of smaller ranks stand in `rank_pattern` and
`alpha_pattern`. PEFT itself is not needed; the layout is that of PEFT 0.19 to 0.21.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from protocol.federation import TaskKind
from protocol.tensors import Array

CONFIGURATION_FILE: Final = "adapter_config.json"
TENSORS_FILE: Final = "adapter_model.safetensors"
# What PEFT wants to be told of the tensors' origin.
METADATA: Final = {"format": "pt"}
_PREFIX: Final = "base_model.model"


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """One LoRA and the task's head, as they are written.

    `factors` has down [k, n] and up [m, k] of each layer, `heads` the head's arrays by name;
    `fan_in_fan_out` says that the checkpoint stores weights as [n, m] (PEFT's word).
    """

    factors: Mapping[str, tuple[Array, Array]]
    heads: Mapping[str, Array]
    head_modules: tuple[str, ...]
    scaling: float
    fan_in_fan_out: bool


def peft_tensors(adapter: PeftAdapter, kind: TaskKind) -> dict[str, Array]:
    """The arrays under PEFT's names."""
    named = {
        f"{name}.lora_{letter}.weight": factor
        for name, pair in adapter.factors.items()
        for letter, factor in zip("AB", pair, strict=True)
    }
    # safetensors writes what lies in memory: views in another order would be written wrong.
    return {
        f"{_PREFIX}.{name}": np.ascontiguousarray(array)
        for name, array in {**named, **adapter.heads, **_idle_biases(adapter, kind)}.items()
    }


def peft_configuration(adapter: PeftAdapter, base_model_name: str, kind: TaskKind) -> str:
    """The text of adapter_config.json for an adapter of one layer or more."""
    ranks = {name: len(down) for name, (down, _) in adapter.factors.items()}
    rank = max(ranks.values())
    smaller = {name: own for name, own in ranks.items() if own != rank}
    table: dict[str, Any] = {
        # PEFT divides alpha by the layer's own rank.
        "alpha_pattern": {name: adapter.scaling * own for name, own in smaller.items()},
        "base_model_name_or_path": base_model_name,
        "bias": "none",
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "inference_mode": True,
        "lora_alpha": adapter.scaling * rank,
        "lora_dropout": 0.0,
        "modules_to_save": list(adapter.head_modules) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": smaller,
        # Whole names: a suffix could match layers that were left out.
        "target_modules": list(adapter.factors),
        "task_type": _task_type(adapter, kind),
        "use_rslora": False,
    }
    return json.dumps(table, indent=2, sort_keys=True) + "\n"


def _task_type(adapter: PeftAdapter, kind: TaskKind) -> str | None:
    match kind:
        case TaskKind.CAUSAL_LM:
            return "CAUSAL_LM"
        case TaskKind.SEQUENCE_CLASSIFICATION:
            # Told the task, PEFT would look for a head in the files.
            return "SEQ_CLS" if adapter.heads else None
        case TaskKind.QUESTION_ANSWERING:
            # Under its own name for the task PEFT 0.21 drops the segments that tell question from
            # context.
            return None


def _idle_biases(adapter: PeftAdapter, kind: TaskKind) -> dict[str, Array]:
    """What quantization/checkpoint.py leaves out of a head, and PEFT asks the file for: zeros."""
    if kind is not TaskKind.QUESTION_ANSWERING:
        return {}
    weights = {name: adapter.heads.get(f"{name}.weight") for name in adapter.head_modules}
    return {
        f"{name}.bias": np.zeros(len(weight), np.float32)
        for name, weight in weights.items()
        if weight is not None and f"{name}.bias" not in adapter.heads
    }
