"""A heat map of what rank each layer has learned."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_client.errors import ConfigurationError, MissingExtraError
from edge_client.factors import RankReport


def check_drawing(path: Path) -> Any:
    """What draws into this file: matplotlib's module of figures.

    Asked for before the work, so that nobody waits for a drawing that cannot be.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigurationError: there is no folder for the file, or a folder of its name.
    """
    if not path.parent.is_dir() or path.is_dir():
        problem = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ConfigurationError("png", f"{path}: {problem}", "a file in a folder that exists")
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot") from error


def draw_ranks(reports: Mapping[str, RankReport], path: Path) -> None:
    """Draw singular values over layers into a PNG file; each layer's line ends at its rank.

    Colours are singular values relative to the layer's largest.

    Raises:
        MissingExtraError, ConfigurationError: as `check_drawing`; or it cannot be written.
    """
    figures = check_drawing(path)
    most = max(len(report.singular_values) for report in reports.values())
    heat = np.full((len(reports), most), np.nan)
    for row, report in enumerate(reports.values()):
        values = np.array(report.singular_values)
        heat[row, : len(values)] = values / (values[0] or 1.0)
    figure = figures.Figure(figsize=(2.5 + 0.45 * most, 1.6 + 0.28 * len(reports)), dpi=120)
    axes = figure.subplots()
    image = axes.imshow(heat, aspect="auto", cmap="viridis", vmin=0.0, vmax=1.0)
    for row, report in enumerate(reports.values()):
        end = report.numerical_rank - 0.5
        # Black in white is seen on every colour, and by who cannot tell red from green.
        for colour, width in (("white", 5), ("black", 2)):
            axes.plot([end, end], [row - 0.5, row + 0.5], color=colour, linewidth=width)
    axes.set_yticks(range(len(reports)), [_short(name) for name in reports])
    axes.set_xticks(range(most), range(1, most + 1))
    axes.set_xlabel("singular value (bar: numerical rank)")
    figure.colorbar(image, label="share of the layer's largest")
    figure.tight_layout()
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        problem = f"{path} cannot be written: {error.strerror}"
        raise ConfigurationError("png", problem, "a file that can be") from error


def _short(name: str) -> str:
    """A layer's number and last part, such as `0 query`, from its name in the model."""
    number = re.search(r"\.(\d+)\.", name)
    return f"{number[1] if number else ''} {name.rpartition('.')[2]}".strip()
