"""Write an adapter in PEFT's file layout, so that any program that loads PEFT adapters can run it.

Both levels become one LoRA of rank r + r2, without rounding:

    B A + D C = [B D] [A; C]        lora_B [m, r + r2], lora_A [r + r2, n], lora_alpha = s (r + r2)

A layer may also be cut to a smaller rank. The layout itself is in protocol/peft_layout.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.numpy import save

from edge_client.errors import ConfigurationError, StorageFullError
from edge_client.factors import RankReport
from edge_client.private_store import FULL
from protocol.federation import TaskKind
from protocol.peft_layout import (
    CONFIGURATION_FILE,
    METADATA,
    TENSORS_FILE,
    PeftAdapter,
    peft_configuration,
    peft_tensors,
)


def save_pretrained(
    adapter: PeftAdapter, folder: Path, *, base_model_name: str, task: TaskKind
) -> None:
    """Write `adapter` into `folder` for `PeftModel.from_pretrained(base_model, folder)`.

    The files hold what never leaves the device otherwise. The base model is the unquantised
    checkpoint, or one quantised otherwise; its logits then differ as its backbone does.

    Raises:
        ConfigurationError, StorageFullError: the folder cannot be written.
    """
    files = {
        TENSORS_FILE: save(peft_tensors(adapter, task), METADATA),
        CONFIGURATION_FILE: peft_configuration(adapter, base_model_name, task).encode(),
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


def cut_to(
    reports: Mapping[str, RankReport], rank: int | str | None, energy: float
) -> dict[str, int]:
    """The rank that each layer is cut to: none leaves all whole, "auto" goes by the energy kept.

    Raises:
        ConfigurationError: rank or energy is out of bounds.
    """
    most = min((len(report.singular_values) for report in reports.values()), default=0)
    match rank:
        case None:
            return {}
        case "auto":
            if not 0 < energy <= 1:
                raise ConfigurationError("energy", f"{energy} is no share", "over 0, up to 1")
            return {name: report.rank_for(energy) for name, report in reports.items()}
        case int() if 1 <= rank <= most:
            return dict.fromkeys(reports, rank)
        case _:
            raise ConfigurationError("rank", f"{rank!r}", f'none, "auto" or 1 to {most}')
