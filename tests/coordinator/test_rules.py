"""Aggregation rules and server steps: laws, references, and the same bytes in any order."""

from __future__ import annotations

import asyncio
import contextlib
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.aggregation import aggregation_for
from coordinator.aggregation import robust as robust_module
from coordinator.aggregation.base import UpdateError
from coordinator.aggregation.robust import krum_selection, median, squared_distances, trimmed
from coordinator.server_step import take_step
from coordinator.store.base import Member, StoredReports
from coordinator.store.memory import MemoryStore
from coordinator.store.sql import SqlStore
from protocol.aggregation import (
    Aggregation,
    Average,
    CoordinateMedian,
    FedAdam,
    FedAvgM,
    FedYogi,
    Mean,
    MultiKrum,
    NormBound,
    ServerStep,
    TrimmedMean,
)
from protocol.federation import (
    FederationSettings,
    Rounds,
    Weighting,
    WireDtype,
)
from protocol.methods import HetLoRA
from protocol.scalars import SchemaError
from protocol.tensors import NamedTensors, TensorSpec
from protocol.virtual_time import simulate
from tests.coordinator.test_store import _report, _round
from tests.protocol.samples import SETTINGS
from tests.simulation.world import START, FakeDevice, World
from tests.simulation.world import settings as world_settings

RULES: list[Aggregation] = [
    Mean(),
    NormBound(0.5),
    CoordinateMedian(),
    TrimmedMean(0.2),
    MultiKrum(1),
]
BASE = NamedTensors.from_arrays({"x.A": np.linspace(-1, 1, 600, dtype=np.float32).reshape(3, 200)})


class Matrix:
    """Reports that are the rows of a matrix."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows.astype(np.float32)
        self.count = len(rows)
        self.asked: list[tuple[int, int]] = []

    def block(self, begin: int, end: int) -> np.ndarray:
        self.asked.append((begin, end))
        return self.rows[:, begin:end]


def _settings(aggregation: Aggregation, **changes: Any) -> FederationSettings:
    rounds = Rounds(cohort=20, minimum_reports=5, weighting=Weighting.UNIFORM)
    values = {name: getattr(SETTINGS, name) for name in ("name", "backbone", "task")}
    return FederationSettings(**values, rounds=rounds, aggregation=aggregation, **changes)


def _aggregated(rule: Aggregation, rows: np.ndarray) -> np.ndarray:
    """The averaged update under a rule."""
    aggregate = aggregation_for(_settings(rule), BASE)
    for row in rows:
        aggregate.accumulate(NamedTensors.from_flat(BASE.specs, row.astype(np.float32)), 1)
    return aggregate.finalize(Matrix(rows)).flat() - BASE.flat()


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(5, 12), st.integers(0, 100))
def test_rules_are_their_references(count: int, seed: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    rows = 0.1 * np.random.default_rng(seed).standard_normal((count, 600))
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    wanted = {
        Mean(): rows.mean(0),
        NormBound(0.5): (rows * np.minimum(1, 0.5 / lengths)).mean(0),
        CoordinateMedian(): np.median(rows, 0),
        TrimmedMean(0.2): stats.trim_mean(rows, 0.2, axis=0),
        MultiKrum(1): rows[_naive_krum(rows, 1)].mean(0),
    }
    for rule in RULES:
        assert np.abs(_aggregated(rule, rows) - wanted[rule]).max() < 1e-6, rule


@pytest.mark.parametrize("count", [1, 2, 5, 24, 151])
def test_a_median_is_numpys_to_the_last_bit(count: int) -> None:
    rows = np.random.default_rng(count).standard_normal((count, 600)).astype(np.float32)
    rows[:, :50] = np.round(rows[:, :50])  # some are equal
    assert np.array_equal(median(rows.copy()), np.median(rows, 0))


def _naive_krum(rows: np.ndarray, hostile: int) -> list[int]:
    scores = []
    for i, one in enumerate(rows):
        others = sorted(np.sum((one - rows[j]) ** 2) for j in range(len(rows)) if j != i)
        scores.append(sum(others[: len(rows) - hostile - 2]))
    return sorted(np.argsort(scores)[: len(rows) - hostile].tolist())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.NAME)
def test_equal_updates_are_their_own_aggregate_and_none_is_the_base(rule: Aggregation) -> None:
    row = 0.001 * np.random.default_rng(0).standard_normal(600)
    assert np.abs(_aggregated(rule, np.tile(row, (7, 1))) - row).max() < 1e-6
    aggregate = aggregation_for(_settings(rule), BASE)
    assert aggregate.finalize(Matrix(np.empty((0, 600)))).digest() == BASE.digest()


@pytest.mark.parametrize("rule", RULES[1:], ids=lambda rule: rule.NAME)
def test_one_absurd_report_hardly_moves_a_robust_aggregate(rule: Aggregation) -> None:
    rows = 0.01 * np.random.default_rng(1).standard_normal((9, 600))
    hostile = np.vstack([rows, np.full(600, 15.0)])
    moved = np.linalg.norm(_aggregated(rule, hostile) - _aggregated(rule, rows))
    assert moved < 0.1 < np.linalg.norm(_aggregated(Mean(), hostile)) / 100


@pytest.mark.parametrize("rule", RULES[2:], ids=lambda rule: rule.NAME)
def test_blocks_change_nothing_and_bound_the_memory(
    rule: Aggregation, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(2).standard_normal((8, 600))
    whole = _aggregated(rule, rows)
    monkeypatch.setattr(robust_module, "BLOCK_BYTES", 8 * 8 * 7)  # seven coordinates
    reports = Matrix(rows)
    found = aggregation_for(_settings(rule), BASE)
    for row in rows:
        found.accumulate(NamedTensors.from_flat(BASE.specs, row.astype(np.float32)), 1)
    assert np.abs(found.finalize(reports).flat() - BASE.flat() - whole).max() < 1e-6
    assert max(end - begin for begin, end in reports.asked) == 7


def test_trimming_nothing_is_the_mean_and_krum_of_few_still_chooses() -> None:
    rows = np.random.default_rng(3).standard_normal((4, 6)).astype(np.float32)
    assert np.allclose(trimmed(rows, 0.2), rows.mean(0, np.float64))  # floor(0.8) is none
    assert len(krum_selection(squared_distances(6, Matrix(rows)), 3)) == 1


def test_a_broken_update_is_refused_by_every_rule() -> None:
    flat = np.zeros(600, np.float32)
    flat[3] = np.nan
    for rule in RULES:
        with pytest.raises(UpdateError, match="finite"):
            aggregation_for(_settings(rule), BASE).check(NamedTensors.from_flat(BASE.specs, flat))


def test_settings_that_cannot_work_are_named() -> None:
    with pytest.raises(SchemaError, match=r"minimum_reports: must be 7 or more .* 2 hostile"):
        _settings(MultiKrum(2))
    with pytest.raises(SchemaError, match=r"aggregation.name: must be 'mean'"):
        _settings(CoordinateMedian(), algorithm=HetLoRA())


# --- from the store -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(WireDtype), ids=lambda dtype: dtype.value)
@pytest.mark.parametrize("rule", [Mean(), CoordinateMedian()], ids=lambda rule: rule.NAME)
def test_every_encoding_reaches_every_kind_of_rule(dtype: WireDtype, rule: Aggregation) -> None:
    base = world_settings(count=2, cohort=5, minimum_reports=5, deadline_s=1e6)
    values = {name: getattr(base, name) for name in ("name", "backbone", "task", "rounds")}
    finals = []
    for update_dtype in (dtype, WireDtype.FLOAT32):
        rules = FederationSettings(**values, aggregation=rule, update_dtype=update_dtype)
        devices = [FakeDevice(f"device-{i}", dtype=update_dtype) for i in range(5)]

        async def scenario(rules: Any = rules, devices: Any = devices) -> None:
            world = World(rules)
            await world.start()
            await asyncio.gather(*(world.take_part(device) for device in devices))

        simulate(scenario)
        assert len({device.final.digest() for device in devices if device.final}) == 1
        assert devices[0].final
        finals.append(devices[0].final.flat())
    near = {"int8": 0.005, "int4": 0.1, "topk": 1.0}.get(dtype.value, 0.005)
    assert np.abs(finals[0] - finals[1]).max() < near * np.abs(finals[1]).max()


@pytest.mark.parametrize("kind", ["memory", "sql"])
def test_stored_reports_are_read_in_blocks_and_in_order(tmp_path: Path, kind: str) -> None:
    store = MemoryStore() if kind == "memory" else SqlStore(f"sqlite:///{tmp_path}/s.sqlite")
    store.create(SETTINGS, BASE)
    store.open_round("demo", _round())
    for device in ("b", "a"):
        store.keep_reports("demo", [_report(device)])
    values = {name: getattr(SETTINGS, name) for name in ("name", "backbone", "task")}
    rules = FederationSettings(**values, update_dtype=WireDtype.BFLOAT16)
    reports = StoredReports(store, rules, 1, 1)
    assert reports.count == 2
    wanted = np.stack([report.update.flat() for report in store.reports("demo", 1, 1)])
    assert np.array_equal(reports.block(1, 4), wanted[:, 1:4])
    store.close()


@pytest.mark.parametrize("dtype", list(WireDtype), ids=lambda dtype: dtype.value)
def test_a_block_costs_the_memory_of_one_report_whatever_their_number(
    tmp_path: Path, dtype: WireDtype
) -> None:
    flat = np.linspace(-1, 1, 100_000, dtype=np.float32)
    update = NamedTensors.from_flat([TensorSpec("x", WireDtype.FLOAT32, (100_000,))], flat, dtype)
    names = [f"device-{i:02}" for i in range(20)]
    with contextlib.closing(SqlStore(f"sqlite:///{tmp_path}/s.sqlite")) as store:
        store.create(SETTINGS, BASE)
        cohort = tuple(Member(name, f"1-1-{name}") for name in names)
        store.open_round("demo", replace(_round(), cohort=cohort))
        store.keep_reports("demo", [replace(_report(name), update=update) for name in names])
        reports = StoredReports(store, replace(SETTINGS, update_dtype=dtype), 1, 1)
        tracemalloc.start()
        block = reports.block(0, 5)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert np.array_equal(block, np.tile(update.flat()[:5], (20, 1)))
    assert peak_bytes < 8 * flat.nbytes


@pytest.mark.parametrize("dtype", list(WireDtype), ids=lambda dtype: dtype.value)
def test_a_block_decodes_no_other_numbers_than_its_own(dtype: WireDtype) -> None:
    """Or the time that a rule takes would grow with the square of the reports' number."""
    flat = np.linspace(-1, 1, 100_000, dtype=np.float32)
    specs = [TensorSpec(name, WireDtype.FLOAT32, (50_000,)) for name in ("x", "y")]
    update = NamedTensors.from_flat(specs, flat, dtype)
    store = MemoryStore()
    store.create(SETTINGS, BASE)
    store.open_round("demo", _round())
    store.keep_reports("demo", [replace(_report("a"), update=update)])
    reports = StoredReports(store, replace(SETTINGS, update_dtype=dtype), 1, 1)
    tracemalloc.start()
    block = reports.block(49_990, 50_010)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(block[0], update.flat()[49_990:50_010])
    assert peak_bytes < 2 * len(update.buffer) + 20_000


# --- server steps ---------------------------------------------------------------------------------

STEPS: list[ServerStep] = [Average(), FedAvgM(0.5, 0.9), FedAdam(), FedYogi()]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.NAME)
def test_server_steps_are_the_papers(step: ServerStep) -> None:
    """Algorithm 2 of arXiv 2003.00295, written out, over five rounds."""
    rng, base, memory = np.random.default_rng(0), BASE, None
    x = base.flat().astype(np.float64)
    m, v = np.zeros_like(x), np.full_like(x, getattr(step, "tau", 0.0) ** 2)
    for _ in range(5):
        delta = 0.1 * rng.standard_normal(len(x))
        averaged = NamedTensors.from_flat(base.specs, (base.flat() + delta).astype(np.float32))
        delta = averaged.flat().astype(np.float64) - base.flat()
        base, memory = take_step(step, base, averaged, memory)
        match step:
            case Average():
                x = x + delta
            case FedAvgM():
                m = 0.9 * m + delta
                x = x + 0.5 * m
            case _:
                m = 0.9 * m + 0.1 * delta
                square = delta**2
                adam = 0.99 * v + 0.01 * square
                yogi = v - 0.01 * square * np.sign(v - square)
                v = adam if isinstance(step, FedAdam) else yogi
                x = x + 0.01 * m / (np.sqrt(v) + 1e-3)
        assert np.abs(base.flat() - x).max() < 1e-4
        x = base.flat().astype(np.float64)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.NAME)
@pytest.mark.parametrize("step", [Average(), FedAdam()], ids=lambda step: step.NAME)
def test_a_killed_coordinator_ends_with_the_same_bytes_under_every_rule(
    rule: Aggregation, step: ServerStep
) -> None:
    base = world_settings(count=4, cohort=6, minimum_reports=6, deadline_s=1e6)
    values = {name: getattr(base, name) for name in ("name", "backbone", "task", "rounds")}
    rules = FederationSettings(**values, aggregation=rule, server_step=step)

    def final(kills: int) -> bytes:
        devices = [FakeDevice(f"device-{i}", training_s=1.0 + i) for i in range(6)]

        async def scenario() -> None:
            world = World(rules, seed=kills)
            await world.start()
            everyone = [asyncio.create_task(world.take_part(device)) for device in devices]
            for _ in range(kills):
                await asyncio.sleep(random.Random(kills).uniform(2.0, 5.0))
                await world.kill()
                await world.start()
            await asyncio.gather(*everyone)

        simulate(scenario)
        (digest,) = {device.final.digest() for device in devices if device.final}
        return digest

    assert final(0) == final(5) != START.digest()
