"""A device with `.[ort]` has nothing of torch, and does not miss it."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

DEVICE = ("client", "cli", "data", "worker", "session", "transport", "backends.ort")


@pytest.mark.parametrize("name", ["torch", "transformers", "bitsandbytes", "onnx"])
def test_what_a_device_does_not_need_is_not_here(name: str) -> None:
    with pytest.raises(ImportError):
        importlib.import_module(name)


def test_the_runtime_is_the_plain_one() -> None:
    with pytest.raises(ImportError):
        importlib.import_module("onnxruntime.training.api")
    assert importlib.import_module("onnxruntime").get_available_providers()


def test_importing_the_sdk_loads_no_runtime() -> None:
    modules = ", ".join(f"edge_client.{name}" for name in DEVICE)
    script = (
        f"import sys, {modules}; print(sorted({{'onnxruntime', 'tokenizers'}} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_torch_backend_says_what_to_install(tmp_path) -> None:
    from edge_client.backends.loading import TorchChoice, load_trainer
    from edge_client.errors import MissingExtraError
    from tests.ort.cases import CASES

    with pytest.raises(MissingExtraError, match=r"torch.*'\.\[torch\]'"):
        load_trainer(TorchChoice(None, "nf4", "cpu"), CASES["minilm"].settings, 0)
