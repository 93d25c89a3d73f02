"""Devices of different ranks in one aggregate: against NumPy, and the same bytes in any order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from coordinator.aggregation.base import UpdateError
from coordinator.aggregation.hetlora import HetLoRA
from protocol.federation import WireDtype
from protocol.tensors import NamedTensors, truncated

RANK = 4
RNG = np.random.default_rng(3)
BASE = NamedTensors.from_arrays(
    {
        "encoder.A": RNG.standard_normal((RANK, 6)).astype(np.float32),
        "encoder.B": RNG.standard_normal((5, RANK)).astype(np.float32),
        "head": RNG.standard_normal(3).astype(np.float32),
    }
)
# Of ranks 1, 2 and 4: (update, its number of examples).
REPORTS = [
    (
        NamedTensors.from_arrays(
            {
                name: (0.1 * RNG.standard_normal(array.shape)).astype(np.float32)
                for name, array in truncated(BASE, rank).arrays().items()
            }
        ),
        examples,
    )
    for rank, examples in [(1, 10), (2, 30), (4, 60)]
]


def _aggregate() -> HetLoRA:
    return HetLoRA(BASE, weight_bound_total=1000, cohort=3)


def test_a_device_receives_its_first_ranks_and_the_whole_head() -> None:
    assert _aggregate().download(0) is BASE
    received = _aggregate().download(2).arrays()
    base = BASE.arrays()
    assert np.array_equal(received["encoder.A"], base["encoder.A"][:2])
    assert np.array_equal(received["encoder.B"], base["encoder.B"][:, :2])
    assert np.array_equal(received["head"], base["head"])


def test_layers_are_averaged_by_the_norm_of_their_product_and_the_head_by_examples() -> None:
    base = {name: array.astype(np.float64) for name, array in BASE.arrays().items()}
    padded, norms, heads, examples = [], [], [], []
    for update, count in REPORTS:
        arrays = update.arrays()
        rank = arrays["encoder.A"].shape[0]
        a, b = np.zeros((RANK, 6)), np.zeros((5, RANK))
        a[:rank] = base["encoder.A"][:rank] + arrays["encoder.A"]
        b[:, :rank] = base["encoder.B"][:, :rank] + arrays["encoder.B"]
        padded.append((a, b))
        norms.append(np.linalg.norm(b @ a))
        heads.append(base["head"] + arrays["head"])
        examples.append(count)
    aggregate = _aggregate()
    for update, count in REPORTS:
        aggregate.accumulate(update, count)
    found = aggregate.finalize().arrays()
    wanted = np.average([a for a, _ in padded], 0, norms)
    assert np.abs(found["encoder.A"] - wanted).max() < 1e-5
    wanted = np.average([b for _, b in padded], 0, norms)
    assert np.abs(found["encoder.B"] - wanted).max() < 1e-5
    assert np.abs(found["head"] - np.average(heads, 0, examples)).max() < 1e-6


def test_any_order_gives_the_same_bytes() -> None:
    results = set()
    for order in itertools.permutations(REPORTS):
        aggregate = _aggregate()
        for update, count in order:
            aggregate.accumulate(update, count)
        results.add(aggregate.finalize().digest())
    assert len(results) == 1


def test_nothing_added_is_the_base() -> None:
    assert _aggregate().finalize().digest() == BASE.digest()


def test_what_is_of_no_rank_or_not_finite_is_refused_and_leaves_the_sums_alone() -> None:
    aggregate = _aggregate()
    aggregate.accumulate(*REPORTS[0])
    before = aggregate.finalize().digest()
    arrays = REPORTS[1][0].arrays()
    unlike = {**arrays, "encoder.B": np.zeros((5, 3), np.float32)}
    broken = {**arrays, "head": np.array([0, np.nan, 0], np.float32)}
    far = {**arrays, "head": np.full(3, 15.9, np.float32)}  # with the base's it is over the bound
    for bad, match in [(unlike, "tensors"), ({}, "tensors"), (broken, "finite"), (far, "finite")]:
        with pytest.raises(UpdateError, match=match):
            aggregate.check(NamedTensors.from_arrays(bad))
    with pytest.raises(UpdateError, match="weight"):
        aggregate.accumulate(REPORTS[1][0], 1000)
    assert aggregate.finalize().digest() == before
    assert aggregate.fits(REPORTS[1][0].specs, WireDtype.FLOAT32)
    assert not aggregate.fits(REPORTS[1][0].specs, WireDtype.BFLOAT16)
