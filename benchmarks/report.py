"""Tables and plots of the accuracy matrix, from its recorded cells alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tasks import TASKS

Record = dict[str, Any]
# (task, set) -> method -> records of its seeds
Group = dict[tuple[str, tuple[str, ...]], dict[str, list[Record]]]
COLUMNS = ("accuracy", "balanced_accuracy", "matthews", "loss")


def write_report(records: list[Record], folder: Path) -> None:
    """`accuracy.md` and a PNG for each task: reported cells, those with `--set` as variants."""
    groups = _grouped(record for record in records if record["cell"]["split"] == "test")
    if not groups:
        raise SystemExit("no cell on the test split is finished yet")
    lines = ["# Accuracy, from accuracy.jsonl", ""]
    for task in sorted({task for task, _ in groups}):
        lines += _table(task, groups)
        _plot(task, groups, folder / f"{task}.png")
        lines += ["", f"![{task}]({task}.png)", ""]
    (folder / "accuracy.md").write_text("\n".join(lines))
    print("\n".join(lines))


def _grouped(records: Iterable[Record]) -> Group:
    groups: Group = defaultdict(lambda: defaultdict(list))
    for record in records:
        cell = record["cell"]
        variant = list(cell["set"])
        variant += [f"scheme={cell['scheme']}"] if cell["scheme"] != "bf16" else []
        variant += [f"rows={cell['rows']}"] if cell["rows"] else []
        groups[cell["task"], tuple(variant)][cell["method"]].append(record)
    return groups


def _table(task: str, groups: Group) -> list[str]:
    metric = TASKS[task].metric
    lines = [
        f"## {task} (compared by {metric})",
        "",
        f"| method | seeds | rate | {' | '.join(COLUMNS)} | common level | KiB sent a round |",
        "|---|---|---|" + "---|" * (len(COLUMNS) + 2),
    ]
    majority: list[dict[str, float]] = []
    rows = []
    for (name, variant), methods in groups.items():
        if name != task:
            continue
        for method, records in methods.items():
            majority += [record["majority"] for record in records]
            label = " ".join((method, *variant))
            rows.append((-_final(records, metric).mean(), _row(label, records, metric)))
    lines += [row for _, row in sorted(rows)]
    cells = [f"{np.mean([one[column] for one in majority]):.3f}" for column in COLUMNS]
    return [*lines, f"| label counts alone | | | {' | '.join(cells)} | | 0 |"]


def _row(label: str, records: list[Record], metric: str) -> str:
    seeds = ", ".join(str(record["cell"]["seed"]) for record in records)
    rates = " ".join(sorted({f"{record['cell']['learning_rate']:g}" for record in records}))
    cells = [_mean_and_spread(_final(records, column)) for column in COLUMNS]
    common = [np.mean([d[metric] for d in record["devices_common"]]) for record in records]
    last = records[0]["curve"][-1]
    sent = last["sent_bytes"] / last["round"] / 1024
    spread = f"{label} | {seeds} | {rates} | {' | '.join(cells)}"
    return f"| {spread} | {_mean_and_spread(np.array(common))} | {sent:.0f} |"


def _final(records: list[Record], column: str) -> np.ndarray:
    """The last round's mean over devices, [seeds]."""
    return np.array([record["curve"][-1][column] for record in records])


def _mean_and_spread(values: np.ndarray) -> str:
    """Mean, and the half range over seeds."""
    half = f" ± {(values.max() - values.min()) / 2:.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{half}"


def _plot(task: str, groups: Group, path: Path) -> None:
    from matplotlib.figure import Figure

    metric = TASKS[task].metric
    figure = Figure(figsize=(12, 3.6), dpi=110)
    panels = figure.subplots(1, 3, sharey=True)
    axes_of = (("round", 1.0), ("sent_bytes", 2.0**20), ("training_s", 1.0))
    for method, records in groups[task, ()].items():
        for axes, (across, unit) in zip(panels, axes_of, strict=True):
            x = np.mean([[at[across] / unit for at in r["curve"]] for r in records], 0)
            y = np.array([[at[metric] for at in record["curve"]] for record in records])
            (line,) = axes.plot(x, y.mean(0), marker="o", markersize=3, label=method)
            axes.fill_between(x, y.min(0), y.max(0), alpha=0.15, color=line.get_color())
    majority = np.mean([r["majority"][metric] for m in groups[task, ()].values() for r in m])
    for axes, name in zip(
        panels, ("rounds", "MiB sent by a device", "seconds of training on a device"), strict=True
    ):
        axes.axhline(majority, color="grey", linewidth=1, linestyle=":")
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"{metric}, mean over devices")
    panels[0].set_title(f"{task} (dotted: label counts alone)", fontsize=10, loc="left")
    panels[2].legend(fontsize=7, ncol=2)
    figure.tight_layout()
    figure.savefig(path)
