"""Named tensors keep every bit, bfloat16's among them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from protocol.federation import WireDtype
from protocol.scalars import SchemaError
from protocol.tensors import NamedTensors, Payload, TensorSpec

steady = settings(derandomize=True, deadline=None, max_examples=150)
arrays = hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, max_side=5))


@steady
@given(st.dictionaries(st.text(min_size=1, max_size=8), arrays, max_size=4))
def test_float32_comes_back_bit_for_bit(bundle: dict[str, np.ndarray]) -> None:
    tensors = NamedTensors.from_arrays(bundle)
    back = tensors.arrays()
    assert list(back) == list(bundle)
    for name, array in bundle.items():
        assert back[name].shape == array.shape
        assert back[name].tobytes() == np.ascontiguousarray(array).tobytes()


@steady
@given(hnp.arrays(np.uint16, st.integers(0, 40)))
def test_every_bfloat16_survives(bits: np.ndarray) -> None:
    specs = (TensorSpec("x", WireDtype.BFLOAT16, bits.shape),) if bits.size else ()
    tensors = NamedTensors(specs, bits.tobytes())
    again = NamedTensors.from_flat(specs, tensors.flat(), WireDtype.BFLOAT16)
    quiet = np.where((bits & 0x7FFF) > 0x7F80, bits | 0x40, bits)  # NaNs stay, and are quiet
    assert bytes(again.buffer) == quiet.astype(np.uint16).tobytes()


@steady
@given(hnp.arrays(np.float32, st.integers(1, 40)))
def test_bfloat16_rounds_as_torch_does(values: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    values = np.where(np.isnan(values), np.float32(0), values).astype(np.float32)
    ours = NamedTensors.from_arrays({"x": values}, WireDtype.BFLOAT16)
    theirs = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
    assert bytes(ours.buffer) == theirs.tobytes()


def test_float16_rounds_and_overflows_as_numpy_does() -> None:
    values = np.array([1.0, 1e-8, 65504.0, 1e6, -np.inf], np.float32)
    back = NamedTensors.from_arrays({"x": values}, WireDtype.FLOAT16).arrays()["x"]
    assert back.tolist() == [1.0, 0.0, 65504.0, np.inf, -np.inf]


def test_anything_that_differs_changes_the_digest() -> None:
    x = np.arange(6, dtype=np.float32)
    bundles = [
        NamedTensors.from_arrays({"x": x}),
        NamedTensors.from_arrays({"y": x}),
        NamedTensors.from_arrays({"x": x.reshape(2, 3)}),
        NamedTensors.from_arrays({"x": x.reshape(3, 2)}),
        NamedTensors.from_arrays({"x": x + 1}),
        NamedTensors.from_arrays({"x": x[:3], "y": x[3:]}),
        NamedTensors.from_arrays({"y": x[:3], "x": x[3:]}),
        NamedTensors.from_arrays({"x": np.repeat(x, 2)}, WireDtype.FLOAT16),
        NamedTensors.from_arrays({"x": np.repeat(x, 2)}, WireDtype.BFLOAT16),
        NamedTensors.from_arrays({}),
    ]
    assert len({bundle.digest() for bundle in bundles}) == len(bundles)


def test_a_payload_that_contradicts_itself_is_refused() -> None:
    spec = TensorSpec("x", WireDtype.FLOAT32, (2, 2))
    with pytest.raises(SchemaError, match="take 16 bytes, not 15"):
        Payload(bytes(32), 15, (spec,))
    with pytest.raises(SchemaError, match="same name"):
        Payload(bytes(32), 32, (spec, spec))
    with pytest.raises(ValueError, match="the buffer has 3"):
        NamedTensors((spec,), b"abc")
