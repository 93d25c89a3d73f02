"""Fuzz a target with atheris: python tests/fuzz/run.py TARGET NEW_INPUTS [KEPT] [-libfuzzer=flag]

Coverage leads it (libFuzzer's), of this project's packages alone.
"""

from __future__ import annotations

import logging
import sys

import atheris

with atheris.instrument_imports(include=["protocol", "coordinator", "edge_client"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    logging.disable(logging.CRITICAL)
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
