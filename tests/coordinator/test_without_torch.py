"""The coordinator runs where torch is not."""

from __future__ import annotations

import subprocess
import sys

WITHOUT = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "bitsandbytes", "edge_client"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import coordinator.cli
import coordinator.server
sys.exit(coordinator.cli.main(["rounds", "--store", "sqlite://", "--name", "none"]))
"""


def test_the_coordinator_imports_and_runs_without_torch() -> None:
    ended = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
