"""How long the end of a round takes: its aggregate, and letting go of its updates.

    python -m benchmarks.round_end --reports 1000 --rules mean median

A store with so many updates of 1,179,648 bytes, kept 16 in a transaction, and its round's end, in
this process. As in a coordinator a rule has a thread and a connection of its own, and the longest
of others' calls, one small write each 50 ms, is told; they wait for all of a round's closing. With
--cold the system has forgotten what was written, as where memory is wanted for other things;
without, it remembers what there was room for. The disk needs room for all updates.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.coordinator_load import adapter, folder_on_disk
from coordinator.aggregation import aggregation_for
from coordinator.control import Wish
from coordinator.store.base import Member, ReportRecord, RoundRecord, StoredReports
from coordinator.store.sql import SqlStore
from protocol.aggregation import Aggregation, CoordinateMedian, Mean, MultiKrum, TrimmedMean
from protocol.federation import (
    Backbone,
    FederationSettings,
    Rounds,
    Task,
    TaskKind,
    WireDtype,
)
from protocol.tensors import NamedTensors

RULES: Final[dict[str, Aggregation]] = {
    rule.NAME: rule for rule in (Mean(), CoordinateMedian(), TrimmedMean(0.1), MultiKrum(2))
}
TOGETHER: Final = 16
CALL_EVERY_S: Final = 0.05
TASK: Final = Task(TaskKind.SEQUENCE_CLASSIFICATION, ("a", "b"))


def read_bytes() -> int:
    """What this process has asked files for so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def timed(name: str, work: Callable[[], object], store: SqlStore | None = None) -> None:
    """Print a row; with a store, others call it meanwhile."""
    read, cpu_s, began = read_bytes(), time.process_time(), time.perf_counter()
    with ThreadPoolExecutor(1) as aside:
        working = aside.submit(work)
        waits_s = calls(store, working.done) if store else []
        working.result()
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - began
    row = f"{wall_s:.2f}", f"{cpu_s:.2f}", f"{(read_bytes() - read) / 1e9:.2f}"
    print("|", " | ".join((name, *row, f"{max(waits_s, default=wall_s):.2f}")), "|", flush=True)


def calls(store: SqlStore, is_over: Callable[[], bool]) -> list[float]:
    """How long each of others' calls takes until it is over, in seconds."""
    waits_s = []
    while not is_over():
        began = time.perf_counter()
        store.set_wish("load", Wish.RUN)
        waits_s.append(time.perf_counter() - began)
        time.sleep(CALL_EVERY_S)
    return waits_s


def keep(store: SqlStore, base: NamedTensors, count: int, dtype: WireDtype) -> None:
    """A round of so many reports, all different."""
    names = [f"{number:05}" for number in range(count)]
    cohort = tuple(Member(name, name) for name in names)
    store.open_round("load", RoundRecord(1, 1, base.digest(), 0.0, 1.0, cohort))
    noise = 0.01 * np.random.default_rng(0).standard_normal(base.flat().size).astype(np.float32)
    for begin in range(0, count, TOGETHER):
        store.keep_reports(
            "load",
            [
                ReportRecord(
                    *(name, name, 1, 1, 100, (), 0.0),
                    NamedTensors.from_flat(base.specs, np.roll(noise, int(name)), dtype),
                    *(bytes(32), bytes(64)),
                )
                for name in names[begin : begin + TOGETHER]
            ],
        )


def forget(path: Path) -> None:
    """Have the system read the file from the disk when it is asked for it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def end(rule: Aggregation, count: int, dtype: WireDtype, folder: Path, *, cold: bool) -> None:
    """Fill a store, and end its round."""
    settings = FederationSettings(
        "load",
        Backbone("none", "sha256:" + "a" * 64),
        TASK,
        rounds=Rounds(cohort=count, minimum_reports=count),
        update_dtype=dtype,
        aggregation=rule,
    )
    base = adapter(0.0)
    url = f"sqlite:///{folder}/store.sqlite"
    store = SqlStore(url)
    store.create(settings, base)
    keep(store, base, count, dtype)
    what = f"{rule.NAME} of {count} as {dtype.value}"
    if not isinstance(rule, Mean):  # the mean has been summed by then
        with contextlib.closing(SqlStore(url, create=False)) as reader:
            kept = StoredReports(reader, settings, 1, 1)
            timed(
                f"{what}: aggregate", lambda: aggregation_for(settings, base).finalize(kept), store
            )
    if cold:
        forget(folder / "store.sqlite")
    timed(f"{what}: close", lambda: store.close_round("load", 1, 1, base, 2.0))
    store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reports", type=int, nargs="+", default=[1000])
    parser.add_argument("--rules", nargs="+", default=["mean"], choices=sorted(RULES))
    parser.add_argument("--dtype", type=WireDtype, default=WireDtype.FLOAT32)
    parser.add_argument("--cold", action="store_true", help="nothing of the file is in memory")
    parser.add_argument("--folder", type=Path, help="where the store goes; not in memory")
    options = parser.parse_args()
    print("| round's end | wall s | CPU s | GB read | others wait s |\n|---|---|---|---|---|")
    for rule in options.rules:
        for count in options.reports:
            with folder_on_disk(options.folder) as folder:
                end(RULES[rule], count, options.dtype, folder, cold=options.cold)


if __name__ == "__main__":
    main()
