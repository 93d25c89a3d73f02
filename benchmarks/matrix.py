"""Cells, each a federation's run: finished ones are a file's lines, the others run in processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from coordinator.config import leaves
from protocol.federation import FederationSettings
from protocol.schema import from_text, record_of

# What a cell is; the same values are the same cell.
Cell = dict[str, Any]


def key_of(cell: Cell) -> str:
    return json.dumps(cell, sort_keys=True)


def finished(results: Path) -> list[dict[str, Any]]:
    """Records of finished cells; of one that was run again, the last."""
    if not results.exists():
        return []
    records = map(json.loads, results.read_text().splitlines())
    return list({key_of(record["cell"]): record for record in records}.values())


def append(results: Path, record: dict[str, Any]) -> None:
    results.parent.mkdir(exist_ok=True)
    line = (json.dumps(record) + "\n").encode()
    # One write of one line: cells in other processes append to the same file.
    descriptor = os.open(results, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def run(module: str, waiting: list[Cell], jobs: int) -> int:
    """Run `python -m module --cell CELL` for each, so many at a time; how many failed."""
    running: list[subprocess.Popen[bytes]] = []
    waiting = list(waiting)
    total, failed = len(waiting), 0
    while waiting or running:
        while waiting and len(running) < jobs:
            command = [sys.executable, "-m", module, "--cell", key_of(waiting.pop(0))]
            threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            running.append(subprocess.Popen(command, env={**os.environ, **threads}))
        os.wait()
        ended = [process for process in running if process.poll() is not None]
        failed += sum(process.returncode != 0 for process in ended)
        running = [process for process in running if process.poll() is None]
        print(f"[{total - len(waiting) - len(running)}/{total}]", flush=True)
    return failed


def settings_from(table: dict[str, Any], assignments: list[str]) -> FederationSettings:
    """A federation's settings: a table, and over it KEY=VALUE by dotted key."""
    for assignment in assignments:
        key, _, text = assignment.partition("=")
        *sections, leaf = key.split(".")
        at = table
        for section in sections:
            at = at.setdefault(section, {})
        at[leaf] = from_text(leaves()[key], text, key)
    settings: FederationSettings = record_of(FederationSettings).from_mapping(table, "")
    return settings
