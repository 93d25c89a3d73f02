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
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
from safetensors.numpy import save

from edge_client.backends.base import Arrays, Level
from edge_client.errors import AdapterError, ConfigurationError, StorageFullError
from edge_client.factors import Factor
from edge_client.private_store import FULL
from edge_client.tasks import RULES
from protocol.federation import TaskKind

_PREFIX: Final = "base_model.model"


@dataclass(frozen=True, slots=True)
class TrainedAdapter:
    """An adapter at one level, as it is written.

    `factors` has down [k, n] and up [m, k] of each layer, `heads` the head's arrays by name;
    `fan_in_fan_out` says that the checkpoint stores weights as [n, m] (PEFT's word).
    """

    factors: Mapping[str, tuple[Factor, Factor]]
    heads: Arrays
    head_modules: tuple[str, ...]
    scaling: float
    fan_in_fan_out: bool
    level: Level = Level.PERSONAL

    def with_factors(self, others: Mapping[str, tuple[Factor, Factor]]) -> TrainedAdapter:
        """The same with other factors, of other ranks too, for some layers."""
        return replace(self, factors={**self.factors, **others})


def save_pretrained(
    adapter: TrainedAdapter, folder: Path, *, base_model_name: str, task: TaskKind | str
) -> None:
    """Write `adapter` into `folder` for `PeftModel.from_pretrained(base_model, folder)`.

    At level PERSONAL the files hold what never leaves the device otherwise. The base model is the
    unquantised checkpoint, or one quantised otherwise; its logits then differ as its backbone does.

    Raises:
        AdapterError: the adapter has nothing at that level; or the task's head is not part of it,
            and PEFT would put a random one in its place.
        ConfigurationError, StorageFullError: the folder cannot be written.
    """
    kind, level = TaskKind(task), adapter.level.name.lower()
    if RULES[kind].has_head and not adapter.heads:
        raise AdapterError(f"no trained head at level {level}: {kind.value} needs one")
    if not adapter.factors:
        raise AdapterError(f"the adapter has no factors at level {level}")
    text = json.dumps(_config(adapter, base_model_name, kind), indent=2, sort_keys=True) + "\n"
    arrays = _named(adapter, kind)
    files = {
        "adapter_model.safetensors": save(arrays, {"format": "pt"}),
        "adapter_config.json": text.encode(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".adapter.") as partial:
            for name, data in files.items():
                (Path(partial) / name).write_bytes(data)
            for name in files:
                (Path(partial) / name).replace(folder / name)
    except OSError as error:
        problem = f"{folder} cannot be written: {error.strerror}"
        if error.errno in FULL:
            raise StorageFullError(f"{problem}; what it held before is intact") from error
        raise ConfigurationError("folder", problem, "one that can be") from error


def _named(adapter: TrainedAdapter, kind: TaskKind) -> Arrays:
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


def _idle_biases(adapter: TrainedAdapter, kind: TaskKind) -> Arrays:
    """What quantization/checkpoint.py leaves out of a head, and PEFT asks the file for: zeros."""
    if kind is not TaskKind.QUESTION_ANSWERING:
        return {}
    weights = {name: adapter.heads.get(f"{name}.weight") for name in adapter.head_modules}
    return {
        f"{name}.bias": np.zeros(len(weight), np.float32)
        for name, weight in weights.items()
        if weight is not None and f"{name}.bias" not in adapter.heads
    }


def _config(adapter: TrainedAdapter, base_model_name: str, kind: TaskKind) -> dict[str, Any]:
    ranks = {name: len(down) for name, (down, _) in adapter.factors.items()}
    rank = max(ranks.values())
    smaller = {name: own for name, own in ranks.items() if own != rank}
    return {
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
        "task_type": RULES[kind].peft_type,
        "use_rslora": False,
    }
