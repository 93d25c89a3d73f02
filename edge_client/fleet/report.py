"""What a load test tells: a line now and then, a table at the end, CSV files, JSON."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TextIO

from edge_client.errors import ConfigurationError
from edge_client.fleet.figures import LATENCIES, PERCENTILES, TIMES, Figures

MIB: Final = 1 << 20
HISTORY: Final = (
    *("seconds", "connected", "rounds", "accepted", "late", "rejected", "errors"),
    *("updates_per_second", "sent_bytes", "received_bytes"),
    *TIMES,
)
Values = Mapping[str, float | None]


class Files:
    """PREFIX_stats.csv, a value a row, and PREFIX_history.csv, a row a second.

    Raises:
        ConfigurationError: they cannot be written; before the test begins.
    """

    def __init__(self, prefix: Path) -> None:
        self._open: list[TextIO] = []
        try:
            for name in ("stats", "history"):
                path = prefix.with_name(f"{prefix.name}_{name}.csv")
                self._open.append(path.open("w", newline=""))
        except OSError as error:
            self.close()
            problem = f"{error.filename}: {error.strerror}"
            raise ConfigurationError("--csv", problem, "a prefix in a folder that is") from error
        self._stats, self._history = map(csv.writer, self._open)
        self._stats.writerow(("name", "value"))
        self._history.writerow(HISTORY)

    def add(self, row: Mapping[str, float]) -> None:
        """A second of the history; what it does not have stays empty."""
        self._history.writerow([_short(row.get(name)) for name in HISTORY])
        self._open[1].flush()

    def finish(self, values: Values) -> None:
        """All values, when the test is over."""
        self._stats.writerows((name, _short(value)) for name, value in values.items())

    def close(self) -> None:
        for file in self._open:
            file.close()

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self.close()


def progress_line(row: Mapping[str, float]) -> str:
    """Where the test stands."""
    return (
        f"{row['seconds']:5.0f} s: {row['connected']:.0f} connected, {row['rounds']:.0f} rounds, "
        f"{row['accepted']:.0f} updates ({row['updates_per_second']:.0f}/s), "
        f"{row['errors']:.0f} errors"
    )


def table(values: Values, figures: Figures, notes: Sequence[str]) -> str:
    """The report, for people."""
    v = {name: value if value is not None else float("nan") for name, value in values.items()}
    lines = [
        f"devices   {v['joined']:.0f} of {v['devices']:.0f} joined; {v['seconds']:.1f} s in all",
        f"rounds    {v['rounds']:.0f}",
        f"reports   {v['accepted']:.0f} accepted, {v['late']:.0f} late, "
        f"{v['rejected']:.0f} rejected; {v['updates_per_second']:.1f} updates/s",
        f"bytes     {v['sent_bytes'] / MIB:.4g} MiB sent, "
        f"{v['received_bytes'] / MIB:.4g} MiB received",
        f"faults    {v['dropouts']:.0f} dropouts, {v['stragglers']:.0f} stragglers; "
        f"{v['resumed']:.0f} times a device came back after trouble",
        "",
        "seconds      count " + "".join(f"{f'p{p}':>9}" for p in PERCENTILES) + f"{'max':>9}",
    ]
    for name in LATENCIES:
        samples = figures.latencies[name]
        shown = [v[f"{name}_{level}"] for level in (*(f"p{p}" for p in PERCENTILES), "max")]
        cells = "".join(f"{value:>9.3f}" if samples.count else f"{'-':>9}" for value in shown)
        lines.append(f"{name:<9} {samples.count:>8} {cells}")
    lines += ["", f"errors    {v['errors']:.0f}"]
    for kind, trouble in sorted(figures.errors.items(), key=lambda item: -item[1].count):
        lines.append(f"  {kind:<18} {trouble.count:>7}  first: {trouble.first}")
    return "\n".join([*lines, "", *_machine(values), *notes])


def as_json(values: Values, figures: Figures, notes: Sequence[str]) -> dict[str, Any]:
    """The report, for programs: the values by name, errors by kind, notes."""
    kinds = {
        kind: {"count": trouble.count, "first": trouble.first}
        for kind, trouble in figures.errors.items()
    }
    return {**values, "errors_by_kind": kinds, "notes": list(notes)}


def _machine(values: Values) -> list[str]:
    """What the test cost its own process, and the coordinator if that was the test's own."""
    v = {name: value for name, value in values.items() if value is not None}
    lines = [
        f"load test    {100 * v['load_cpu_share']:.0f} % of a core, "
        f"{v['load_mib_per_device']:.2f} MiB a device; its event loop late by "
        f"{v.get('lag_p95', 0.0):.3f} s at p95, {v.get('lag_max', 0.0):.3f} s at most"
    ]
    if "coordinator_cpu_ms_per_update" in v:
        lines.append(
            f"coordinator  {v['coordinator_cpu_ms_per_update']:.2f} ms of CPU an update; "
            f"{v['coordinator_idle_mib']:.0f} MiB idle, {v['coordinator_connected_mib']:.0f} at "
            f"the first assignment, {v['coordinator_peak_mib']:.0f} at most"
        )
    return lines


def _short(value: float | None) -> float | str:
    return "" if value is None else round(value, 6)
