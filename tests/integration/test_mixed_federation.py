"""One federation of four kinds of device: torch float32 and NF4, onnxruntime int8 and 4 bits.

Needs both environments, so `make test-ort` runs it and says where the other one is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from edge_client.private_store import PrivateStore
from tests.integration.test_federation import _coordinator, _write_config, _write_data

ORT_PYTHON = os.environ.get("PF2LORA_ORT_PYTHON", "")
ARTIFACTS = Path(os.environ.get("PF2LORA_ON_DEVICE", ""))
DEVICES = {
    "torch-none": (sys.executable, ["--scheme", "none"]),
    "torch-nf4": (sys.executable, ["--scheme", "nf4"]),
    "ort-int8": (ORT_PYTHON, ["--backend", "ort", "--artifact", str(ARTIFACTS / "mixed-int8")]),
    "ort-int4": (ORT_PYTHON, ["--backend", "ort", "--artifact", str(ARTIFACTS / "mixed-int4")]),
}
ROUNDS = 3

pytestmark = pytest.mark.skipif(not ORT_PYTHON, reason="make test-ort runs this")


def _run(name: str, number: int, folder: Path, address: str) -> dict[str, Any]:
    """A device from its first connection to its end; its summary."""
    python, flags = DEVICES[name]
    command = [python, "-m", "edge_client.cli", "run", "--coordinator", address, "--json", *flags]
    command += ["--data", str(folder / f"{name}.jsonl"), "--state-dir", str(folder / name)]
    command += ["--seed", str(number)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{name}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["summary"]
    return summary


def test_devices_on_four_kinds_of_weights_train_one_common_adapter(tmp_path: Path) -> None:
    # All four must report in every round: none is carried by the others.
    config = _write_config(tmp_path, count=ROUNDS, cohort=4, minimum_reports=4)
    for number, name in enumerate(DEVICES):
        _write_data(tmp_path / f"{name}.jsonl", 0.2 + number / 5)
    with _coordinator(config) as address, ThreadPoolExecutor(len(DEVICES)) as pool:
        running = [pool.submit(_run, n, i, tmp_path, address) for i, n in enumerate(DEVICES)]
        summaries = [one.result() for one in running]
    assert [summary["rounds"] for summary in summaries] == [ROUNDS] * 4
    common, personal = set(), set()
    for name in DEVICES:
        state = PrivateStore(tmp_path / name).load()
        assert state is not None
        common.add(b"".join(array.tobytes() for array in state.groups["common"].values()))
        personal.add(b"".join(array.tobytes() for array in state.groups["personal"].values()))
    assert len(common) == 1
    assert len(personal) == 4
