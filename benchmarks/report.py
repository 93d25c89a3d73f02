"""Tables and plots of the accuracy matrix, from its recorded cells alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tasks import TASKS
from protocol.federation import TaskKind

Record = dict[str, Any]
# (task, set) -> method -> records of its seeds
Group = dict[tuple[str, tuple[str, ...]], dict[str, list[Record]]]
LEGEND = (
    'Means over devices and seeds, ± half the range over seeds; "over devices" is the standard '
    "deviation over devices of what methods are compared by."
)
# Ten colours that the colour-blind can tell apart (Petroff, arXiv 2107.02270), and ten shapes.
COLOURS = [
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
]
MARKERS = "osD^vP*X<>"
COLUMNS = {
    TaskKind.SEQUENCE_CLASSIFICATION: ("accuracy", "balanced_accuracy", "matthews", "loss"),
    TaskKind.CAUSAL_LM: ("bleu", "rouge_l", "accuracy", "loss"),
    TaskKind.QUESTION_ANSWERING: ("f1", "exact_match", "loss"),
}


def write_report(records: list[Record], methods: Sequence[str], folder: Path) -> None:
    """`accuracy.md` and a PNG for each task: reported cells, those with `--set` as variants.

    A method has the colour and the marker of its place in `methods` in every plot.
    """
    groups = _grouped(record for record in records if record["cell"]["split"] == "test")
    if not groups:
        raise SystemExit("no cell on the test split is finished yet")
    lines = ["# Accuracy, from accuracy.jsonl", "", LEGEND, ""]
    lines += _overview(groups, methods)
    for task in sorted({task for task, _ in groups}):
        lines += _table(task, groups)
        _plot(task, groups, methods, folder / f"{task}.png")
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
        variant += [f"devices={cell['devices']}"] if cell.get("devices") else []
        groups[cell["task"], tuple(variant)][cell["method"]].append(record)
    return groups


def _overview(groups: Group, methods: Sequence[str]) -> list[str]:
    """All methods as they are on all tasks of classification, a table a score."""
    classified = TaskKind.SEQUENCE_CLASSIFICATION
    tasks = [task for task in TASKS if groups[task, ()] and TASKS[task].kind is classified]
    lines = ["## Tasks of classification side by side", ""]
    for score in ("", "balanced_accuracy", "loss"):
        columns = {task: score or TASKS[task].metric for task in tasks}
        title = score or "what methods are compared by"
        lines += [f"### {title}", "", f"| method | {' | '.join(tasks)} |"]
        lines += ["|---|" + "---|" * len(tasks)]
        for method in methods:
            found = {task: groups[task, ()].get(method) for task in tasks}
            cells = [
                _mean_and_spread(_final(records, columns[task])) if records else ""
                for task, records in found.items()
            ]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        counts = [_majority(groups[task, ()], columns[task]) for task in tasks]
        lines += [f"| label counts alone | {' | '.join(counts)} |", ""]
    return lines


def _table(task: str, groups: Group) -> list[str]:
    """The methods as they are, and below them those with other settings."""
    metric = TASKS[task].metric
    lines = [f"## {task} (compared by {metric})", "", *_head(task)]
    lines += _rows(task, "", groups[task, ()])
    others = {variant: found for (name, variant), found in groups.items() if name == task}
    del others[()]
    if others:
        lines += ["", f"### {task}, other settings", "", *_head(task)]
    # Who were dealt other rows are compared among themselves.
    for variant in sorted(others, key=lambda v: (_dealt(v), v)):
        lines += _rows(
            task, " ".join(("", *variant)), others[variant], counts=bool(_dealt(variant))
        )
    return lines


def _head(task: str) -> list[str]:
    columns = _columns(task)
    return [
        f"| method | seeds | rate | {' | '.join(columns)} | over devices | common level "
        "| KiB sent a round |",
        "|---|---|---|" + "---|" * (len(columns) + 3),
    ]


def _dealt(variant: Sequence[str]) -> list[str]:
    return [one for one in variant if one.startswith(("rows=", "devices="))]


def _rows(
    task: str, suffix: str, methods: dict[str, list[Record]], *, counts: bool = True
) -> list[str]:
    """A row a method, the best first; at the end what label counts alone would give."""
    metric = TASKS[task].metric
    ordered = sorted(methods.items(), key=lambda item: -_final(item[1], metric).mean())
    lines = []
    for method, records in ordered:
        lines.append(_row(method + suffix, records, task))
        if even := [_for_even_mix(record) for record in records if "even_mix" in record]:
            lines.append(_row(f"{method}{suffix}, for an even mix", even, task))
    if counts and any(r["majority"] for records in methods.values() for r in records):
        cells = [_majority(methods, column) for column in _columns(task)]
        lines.append(f"| label counts alone{suffix} | | | {' | '.join(cells)} | | | 0 |")
    return lines


def _majority(methods: dict[str, list[Record]], column: str) -> str:
    """What label counts alone give, the mean over all cells: rows differ by the seed."""
    cells = [record["majority"] for records in methods.values() for record in records]
    return f"{np.mean([one[column] for one in cells if one]):.3f}"


def _for_even_mix(record: Record) -> Record:
    """The record with the scores of answers for an even mix of labels."""
    devices = record["even_mix"]["devices"]
    means = {name: float(np.mean([one[name] for one in devices])) for name in devices[0]}
    last: Record = record["curve"][-1] | means
    return {**record, **record["even_mix"], "curve": [last]}


def _columns(task: str) -> tuple[str, ...]:
    return COLUMNS[TASKS[task].kind]


def _row(label: str, records: list[Record], task: str) -> str:
    metric = TASKS[task].metric
    seeds = ", ".join(str(record["cell"]["seed"]) for record in records)
    rates = " ".join(sorted({f"{record['cell']['learning_rate']:g}" for record in records}))
    cells = [_mean_and_spread(_final(records, column)) for column in _columns(task)]
    over_devices = np.mean([np.std([d[metric] for d in r["devices"]]) for r in records])
    common = [np.mean([d[metric] for d in record["devices_common"]]) for record in records]
    last = records[0]["curve"][-1]
    sends = records[0]["cell"]["method"] != "centralised"
    sent = sends * last["sent_bytes"] / last["round"] / 1024
    spread = f"{label} | {seeds} | {rates} | {' | '.join(cells)}"
    return f"| {spread} | {over_devices:.3f} | {_mean_and_spread(np.array(common))} | {sent:.0f} |"


def _final(records: list[Record], column: str) -> np.ndarray:
    """The last round's mean over devices, [seeds]."""
    return np.array([record["curve"][-1][column] for record in records])


def _mean_and_spread(values: np.ndarray) -> str:
    """Mean, and the half range over seeds."""
    half = f" ± {(values.max() - values.min()) / 2:.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{half}"


def _plot(task: str, groups: Group, methods: Sequence[str], path: Path) -> None:
    from matplotlib.figure import Figure

    # Text is written at the end of a run only.
    metric = "loss" if TASKS[task].causal else TASKS[task].metric
    figure = Figure(figsize=(12, 4.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    axes_of = (("round", 1.0), ("sent_bytes", 2.0**20), ("training_s", 1.0))
    for method, records in sorted(groups[task, ()].items()):
        place = methods.index(method)
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        for axes, (across, unit) in zip(panels, axes_of, strict=True):
            if across == "sent_bytes" and method == "centralised":
                continue  # its rows are where it trains
            x = np.mean([[at[across] / unit for at in r["curve"]] for r in records], 0)
            y = np.array([[at[metric] for at in record["curve"]] for record in records])
            style = {"marker": marker, "markersize": 5, "markerfacecolor": "none"}
            axes.plot(x, y.mean(0), label=method, color=colour, **style)
            axes.fill_between(x, y.min(0), y.max(0), alpha=0.12, color=colour, linewidth=0)
    every = [record for records in groups[task, ()].values() for record in records]
    majority = [record["majority"][metric] for record in every if record["majority"]]
    names = ("rounds", "MiB sent by a device", "processor seconds of a device's training")
    for axes, name in zip(panels, names, strict=True):
        if majority:
            axes.axhline(float(np.mean(majority)), color="grey", linewidth=1, linestyle=":")
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    panels[0].xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel(f"{metric}, mean over devices")
    note = "; dotted: label counts alone" if majority else ""
    panels[0].set_title(
        f"{task} (bands: least to greatest of the seeds{note})", fontsize=10, loc="left"
    )
    # Below and not inside: there it hides curves.
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=len(labels), fontsize=8)
    figure.savefig(path)
