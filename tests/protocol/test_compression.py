"""Few-bit updates: sizes, error bounds, and bytes from anywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from protocol.compression import BLOCK, TOPK_ONE_IN, topk_count
from protocol.federation import WireDtype
from protocol.tensors import NamedTensors, TensorSpec, stretches

LOSSY = [WireDtype.INT8, WireDtype.INT4, WireDtype.TOPK]
vectors = arrays.arrays(
    np.float32, st.integers(1, 700), elements=st.floats(-8, 8, width=32, allow_subnormal=False)
)


def _through(values: np.ndarray, dtype: WireDtype) -> np.ndarray:
    tensors = NamedTensors.from_arrays({"x": values}, dtype)
    assert len(tensors.buffer) == dtype.bytes_of(len(values)) == tensors.specs[0].size_bytes
    return tensors.flat()


@settings(derandomize=True, deadline=None)
@given(vectors)
def test_codes_are_within_half_a_step_of_their_blocks_largest(values: np.ndarray) -> None:
    for dtype, levels in ((WireDtype.INT8, 127), (WireDtype.INT4, 7)):
        found = _through(values, dtype)
        for at in range(0, len(values), BLOCK):
            block = values[at : at + BLOCK]
            bound = np.abs(block).max() * (0.5 / levels + 1e-6)
            assert np.abs(found[at : at + BLOCK] - block).max() <= bound


@settings(derandomize=True, deadline=None)
@given(vectors)
def test_the_largest_travel_and_the_others_are_zero(values: np.ndarray) -> None:
    found = _through(values, WireDtype.TOPK)
    kept = topk_count(len(values))
    assert np.count_nonzero(found) <= kept
    least = np.sort(np.abs(values))[-kept]
    sure = np.abs(values) > least
    assert np.allclose(found[sure], values[sure], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", LOSSY, ids=lambda dtype: dtype.value)
def test_many_tensors_flat_or_by_name_are_the_same_bytes(dtype: WireDtype) -> None:
    rng = np.random.default_rng(0)
    by_name = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in (("a", (3, 100)), ("b", (7,)), ("c", (2, 3, 50)))
    }
    tensors = NamedTensors.from_arrays(by_name, dtype)
    flat = np.concatenate([array.reshape(-1) for array in by_name.values()])
    assert NamedTensors.from_flat(tensors.specs, flat, dtype).buffer == tensors.buffer
    again = np.concatenate([array.reshape(-1) for array in tensors.arrays().values()])
    assert np.array_equal(again, tensors.flat())
    share = len(tensors.buffer) / (4 * len(flat))
    assert share < {"int8": 0.27, "int4": 0.15, "topk": 0.11}[dtype.value]


@pytest.mark.parametrize("dtype", LOSSY, ids=lambda dtype: dtype.value)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(dtype: WireDtype, value: float) -> None:
    values = np.linspace(-1, 1, 40, dtype=np.float32)
    values[7] = value
    assert not np.isfinite(_through(values, dtype)).all()


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 300), st.data())
def test_any_bytes_decode_to_as_many_numbers(count: int, data: st.DataObject) -> None:
    for dtype in LOSSY:
        size = dtype.bytes_of(count)
        buffer = data.draw(st.binary(min_size=size, max_size=size))
        found = NamedTensors((TensorSpec("x", dtype, (count,)),), buffer).flat()
        assert found.shape == (count,)
        assert found.dtype == np.float32


def test_a_place_outside_the_tensor_makes_it_unusable() -> None:
    count = 2 * TOPK_ONE_IN
    for places in ([0, count], [5, 5], [6, 5]):
        buffer = np.array(places, np.uint32).tobytes() + np.ones(2, np.float16).tobytes()
        tensors = NamedTensors((TensorSpec("x", WireDtype.TOPK, (count,)),), buffer)
        assert np.isnan(tensors.flat()).all()


@pytest.mark.parametrize("dtype", list(WireDtype), ids=lambda dtype: dtype.value)
def test_a_stretch_of_numbers_is_what_it_is_in_the_whole(dtype: WireDtype) -> None:
    rng = np.random.default_rng(0)
    by_name = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in (("a", (3, 100)), ("b", (7,)), ("c", (3, 501)))
    }
    tensors = NamedTensors.from_arrays(by_name, dtype)
    whole = tensors.flat()
    for begin, end in (*rng.integers(0, len(whole) + 1, (300, 2)), (0, len(whole)), (300, 307)):
        found = [
            one.decoded(tensors.buffer[one.offset : one.offset + one.spec.size_bytes])
            for one in stretches(tensors.specs, begin, end)
        ]
        expected = whole[begin:end]
        assert np.array_equal(np.concatenate(found) if found else expected[:0], expected)
