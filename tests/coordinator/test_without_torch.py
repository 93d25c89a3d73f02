"""The daemon serves where torch is not.

`make test-core` runs this folder in an environment that holds nothing but what the coordinator
needs; where torch is installed, this test hides it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from tests.coordinator.federation_file import write_federation

WITHOUT = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "bitsandbytes", "edge_client"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from coordinator.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_daemon_serves_without_torch(tmp_path: Path) -> None:
    config = write_federation(tmp_path)
    daemon = subprocess.Popen(
        [sys.executable, "-c", WITHOUT, "serve", "--config", str(config), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert daemon.stderr is not None
    first = daemon.stderr.readline() + daemon.stderr.readline()
    daemon.send_signal(signal.SIGTERM)
    _, rest = daemon.communicate()
    assert "listening on 127.0.0.1" in first, first + rest
    assert daemon.returncode == 0, rest
