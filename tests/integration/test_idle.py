"""Ten thousand connections that say nothing, and devices that work beside them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks.idle_connections import measure


@pytest.mark.parametrize(
    "wished", [100, pytest.param(10_000, marks=[pytest.mark.soak, pytest.mark.timeout(600)])]
)
def test_silent_connections_cost_little_and_hurt_nobody(tmp_path: Path, wished: int) -> None:
    found = asyncio.run(measure(wished, tmp_path))
    print(f"{found.count} connections, {found.memory_bytes / 1024:.0f} KiB each")
    assert found.open_still == found.count
    if wished > 1000:  # with few, what is measured is the allocator
        assert found.memory_bytes < 40 * 1024
