"""Base versions in half the bytes: nothing drifts, and what is too small for them is not lost."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

import numpy as np
import pytest

from coordinator.aggregation.base import Reports
from coordinator.base_version import BaseVersion
from coordinator.store.base import ReportRecord
from protocol import codec
from protocol.federation import DownloadDtype
from protocol.messages import Chunk
from protocol.methods import HetLoRA
from protocol.tensors import Array, NamedTensors, truncated
from protocol.virtual_time import simulate
from tests.simulation.world import FakeDevice, World, settings

HALVES = [DownloadDtype.FLOAT16, DownloadDtype.BFLOAT16]
# Half a unit in the last place of numbers under 2.
ROUNDING = {DownloadDtype.FLOAT16: 2.0**-11, DownloadDtype.BFLOAT16: 2.0**-8}
WIDE = NamedTensors.from_arrays({"layer.A": np.linspace(-1, 1, 65536, dtype=np.float32)})


@dataclass(frozen=True)
class NoReports(Reports):
    count: int = 0

    def block(self, begin: int, end: int) -> Array:
        raise AssertionError("the mean does not look at them")


def _run(dtype: DownloadDtype, rounds: int) -> tuple[NamedTensors, int]:
    """The coordinator's base version in the end, and the bytes that went down in chunks."""
    rules = settings(count=rounds, cohort=2, minimum_reports=2, deadline_s=1e5)
    world = World(replace(rules, download_dtype=dtype), base=WIDE)
    devices = [FakeDevice(f"device-{number}") for number in range(2)]

    async def scenario() -> None:
        await world.start()
        await asyncio.gather(*(world.take_part(device) for device in devices))

    simulate(scenario)
    messages = [codec.decode(data) for link in world.device_ends for data in link.other.sent]
    down = sum(len(message.data) for message in messages if isinstance(message, Chunk))
    snapshot = world.store.load("sim")
    assert snapshot is not None
    assert {spec.dtype.value for d in devices if d.final for spec in d.final.specs} == {dtype.value}
    return snapshot.base, down


@pytest.mark.parametrize("dtype", HALVES)
def test_half_the_bytes_go_down_and_the_base_stays_float32_near_what_it_would_be(
    dtype: DownloadDtype,
) -> None:
    (whole, whole_bytes), (half, half_bytes) = _run(DownloadDtype.FLOAT32, 40), _run(dtype, 40)
    assert half_bytes * 2 == whole_bytes
    assert {spec.dtype.value for spec in half.specs} == {"float32"}
    # A device's update is -0.1 of what it received: of each round's rounding a tenth gets into the
    # base, and nine tenths of what got in before stay. That sums to one rounding, however long.
    assert np.abs(half.flat() - whole.flat()).max() <= ROUNDING[dtype]


def _added(base: BaseVersion, rank: int, change: float) -> None:
    """One device's report: what it received, each number moved by `change`."""
    received = base.offered(base.offer(rank).digest)
    assert received is not None
    moved = {name: array + np.float32(change) for name, array in received.arrays().items()}
    before = received.arrays()
    update = NamedTensors.from_arrays({name: moved[name] - before[name] for name in moved})
    base.check(update)
    base.add(ReportRecord("a", "d", 1, 1, 1, (), 0.0, update, bytes(32), bytes(64)))


@pytest.mark.parametrize("dtype", HALVES)
def test_steps_too_small_for_the_download_add_up(dtype: DownloadDtype) -> None:
    start = NamedTensors.from_arrays({"layer.A": np.full((2, 4), 1.0, np.float32)})
    rules = replace(settings(cohort=1), download_dtype=dtype)
    base = BaseVersion(rules, start, None)
    step = 2.0**-14  # far under the distance of neighbours at 1 in either
    rounds = 100
    for _ in range(rounds):
        _added(base, 0, step)
        base.move(*base.following(NoReports()))
    found = base._base.flat()
    assert np.abs(found - (1.0 + rounds * step)).max() <= rounds * 2.0**-24


@pytest.mark.parametrize("dtype", HALVES)
def test_a_device_of_a_lower_rank_receives_its_part_in_half_the_bytes(
    dtype: DownloadDtype,
) -> None:
    rng = np.random.default_rng(5)
    start = NamedTensors.from_arrays(
        {
            "layer.A": rng.standard_normal((4, 6)).astype(np.float32),
            "layer.B": rng.standard_normal((5, 4)).astype(np.float32),
        }
    )
    rules = replace(settings(cohort=1), download_dtype=dtype, algorithm=HetLoRA())
    base = BaseVersion(rules, start, None)
    received = base.offered(base.offer(2).digest)
    assert received is not None
    part = truncated(start, 2)
    assert len(received.buffer) * 2 == len(part.buffer)
    assert received.digest() == part.cast(dtype.wire).digest()
    # An update of nothing leaves the part that the device has as it is on the coordinator.
    _added(base, 2, 0.0)
    following, _ = base.following(NoReports())
    corner = truncated(following, 2).flat()
    assert np.abs(corner - part.flat()).max() <= 2.0**-20
