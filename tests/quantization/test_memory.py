"""Peak memory on a CPU, each in a process of its own: minutes, so with -m slow."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.quantized_memory import make_llama, measured
from quantization.quantize import quantize

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama")
    make_llama(place / "float", 1024, 24)  # 312 M parameters
    make_llama(place / "tiny", 64, 1)
    return place


@pytest.mark.parametrize("scheme", ["nf4-double", "int8"])
def test_a_quantised_folder_loads_in_little_more_than_its_own_size(
    place: Path, scheme: str
) -> None:
    size = quantize(str(place / "float"), scheme, place / scheme).total_bytes
    quantize(str(place / "tiny"), scheme, place / f"tiny-{scheme}")
    found = measured(place / scheme, place / f"tiny-{scheme}", scheme, 1, 8)
    print(f"{scheme}: {found['load_bytes'] / size:.3f} of {size} bytes")
    assert 0.9 * size < found["load_bytes"] < 1.3 * size
