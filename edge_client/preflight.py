"""What this machine can train with: one real local step of each scheme, not an import check.

Every scheme runs in a process of its own, so that its peak memory is its own and a kernel that
crashes is a line of the table.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from edge_client.errors import EdgeClientError, MissingExtraError
from protocol.federation import (
    Backbone,
    FederationSettings,
    Task,
    TaskKind,
    Training,
)
from protocol.methods import PF2LoRA
from quantization.errors import QuantizationError
from quantization.folder_manifest import is_quantized, read_manifest
from quantization.schemes import Scheme

BATCH_SIZE = 8
LENGTH = 64
STEPS = 5
TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Preflight:
    """One scheme here: either its step's time, memory and loss, or why it does not work."""

    scheme: str
    step_ms: float = 0.0
    peak_mib: float = 0.0
    loss: float = 0.0
    problem: str = ""


def preflight(
    model: str, schemes: list[str], device: str, compute_dtype: str | None = None
) -> Iterator[Preflight]:
    """Try each scheme, one after the other; none named means all that there can be.

    Raises:
        MissingExtraError: torch is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError("torch", "torch")
    for scheme in schemes or schemes_of(model, compute_dtype):
        command = [sys.executable, "-m", "edge_client.preflight", model, scheme, device]
        command += [compute_dtype] if compute_dtype else []
        try:
            done = subprocess.run(  # noqa: S603 - our own module
                command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            yield Preflight(scheme, problem=f"no step within {TIMEOUT_S:g} s")
            continue
        if done.returncode == 0:
            yield Preflight(**json.loads(done.stdout.splitlines()[-1]))
        else:
            lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
            yield Preflight(scheme, problem=lines[-1][:300])


def schemes_of(model: str, compute_dtype: str | None) -> list[str]:
    """A quantised folder has one scheme; any other backbone can take each that has the dtype."""
    folder = Path(model).expanduser()
    if is_quantized(folder):
        return [read_manifest(folder).scheme.value]
    return [
        scheme.value
        for scheme in Scheme
        if compute_dtype is None or scheme.fixed_compute_dtype in (None, compute_dtype)
    ]


def _try(model: str, scheme: str, device: str, compute_dtype: str | None = None) -> Preflight:
    from edge_client.backends.torch_backend import load_trainer
    from edge_client.data import Example
    from quantization.backbone import resolve_backbone
    from quantization.fingerprint import fingerprint

    settings = FederationSettings(
        "preflight",
        Backbone(model, fingerprint(resolve_backbone(model))),
        Task(TaskKind.SEQUENCE_CLASSIFICATION, ("no", "yes"), LENGTH),
        training=Training(local_steps=1, batch_size=BATCH_SIZE),
        algorithm=PF2LoRA(),
    )
    trainer = load_trainer(
        settings,
        backbone=None,
        scheme=scheme,
        device=device,
        personal_seed=0,
        compute_dtype=compute_dtype,
    )
    rows = trainer.encode([Example("a word " * LENGTH, None, n % 2) for n in range(BATCH_SIZE)])
    before = trainer.common()
    trainer.train(rows, 0, 1)
    took_s = []
    for step in range(1, STEPS + 1):
        started = time.perf_counter()
        result = trainer.train(rows, step, 1)  # its loss is read, so CUDA has done the work
        took_s.append(time.perf_counter() - started)
    if not result.mean_loss < float("inf"):
        raise RuntimeError(f"the loss is {result.mean_loss}")
    if trainer.common().digest() == before.digest():
        raise RuntimeError("a step changed nothing")
    return Preflight(scheme, 1000 * median(took_s), _peak_mib(device), result.mean_loss)


def _peak_mib(device: str) -> float:
    """Of the process; on CUDA of the device's memory."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _main() -> int:
    try:
        print(json.dumps(asdict(_try(*sys.argv[1:5]))))
    except (EdgeClientError, QuantizationError) as error:  # meant for the user, all of it
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
