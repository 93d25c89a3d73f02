"""What is told of ranks: energies, the table, the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_client.cli import rank_table
from edge_client.errors import ConfigurationError
from edge_client.factors import RankReport
from edge_client.rank_plot import draw_ranks

REPORTS = {
    "bert.encoder.layer.0.attention.self.query": RankReport(3, 2.0, 1e-5, (3.0, 2.0, 1.0, 0.0)),
    "bert.encoder.layer.1.attention.self.value": RankReport(1, 1.0, 1e-5, (5.0, 0.0, 0.0, 0.0)),
    "head": RankReport(0, 0.0, 0.0, (0.0, 0.0)),
}


def test_energies_are_shares_of_the_squared_norm() -> None:
    report = REPORTS["bert.encoder.layer.0.attention.self.query"]
    assert report.energies == pytest.approx((9 / 14, 13 / 14, 1.0, 1.0))
    asked = (0.1, 9 / 14, 0.65, 0.93, 1.0)
    assert [report.rank_for(energy) for energy in asked] == [1, 1, 2, 3, 3]
    assert REPORTS["head"].rank_for(1.0) == 1  # a zero matrix is kept by the least there can be


def test_rounding_asks_for_no_rank_that_is_not_there() -> None:
    values = tuple(np.random.default_rng(0).random(10).tolist())
    assert RankReport(10, 1.0, 0.0, values).rank_for(1.0) == 10


def test_the_table_has_a_row_a_layer() -> None:
    head, *rows = rank_table(REPORTS).splitlines()
    assert head.split() == ["layer", "rank", "entropy", "90", "%", "99", "%"]
    assert rows[0].split() == [next(iter(REPORTS)), "3", "2.00", "2", "3"]
    assert len({len(row) for row in rows}) == 1


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_ranks(REPORTS, tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigurationError, match=r"ranks\.png cannot be written: No such"):
        draw_ranks(REPORTS, Path("/proc/ranks.png"))
