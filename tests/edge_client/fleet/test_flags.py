"""What the flags of a load test mean, and what is refused."""

from __future__ import annotations

import random

import pytest

from edge_client.errors import ConfigurationError
from edge_client.fleet import plan
from edge_client.fleet.figures import TIMES
from edge_client.fleet.plan import Between, Lognormal
from edge_client.fleet.thresholds import SHARES, Threshold, read_threshold


def test_times_have_units() -> None:
    assert [plan.duration_s(text) for text in ("500ms", "2s", "1.5m", "1h")] == [0.5, 2, 90, 3600]


@pytest.mark.parametrize("text", ["", "2", "s", "-1s", "1d", "1 s", "1e3s", "1s2"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no time"):
        plan.duration_s(text)


def test_training_times() -> None:
    assert plan.training_time("2s") == Between(2, 2)
    assert plan.training_time("500ms-2s") == Between(0.5, 2)
    assert plan.training_time("lognormal:2s:0.5") == Lognormal(2, 0.5)
    rng = random.Random(1)
    drawn = sorted(Lognormal(2.0, 0.5).draw_s(rng) for _ in range(1001))
    assert drawn[500] == pytest.approx(2.0, rel=0.1)
    assert all(1.0 <= Between(1.0, 3.0).draw_s(rng) <= 3.0 for _ in range(100))


@pytest.mark.parametrize("text", ["2", "3s-1s", "lognormal:2s", "lognormal:2s:x", "1s-"])
def test_what_is_no_training_time_is_refused(text: str) -> None:
    # "1s-" has no end: it is not the same as "1s".
    with pytest.raises(ValueError, match=r"no time|ends before|lognormal:MEDIAN:SIGMA"):
        plan.training_time(text)


def test_shares_counts_and_rates() -> None:
    assert [plan.share(text) for text in ("0", "0.1", ".5", "1", "1.0")] == [0, 0.1, 0.5, 1, 1]
    assert plan.count("12") == 12
    assert [plan.rate(text) for text in ("50", "50/s", "0.5/s")] == [50, 50, 0.5]
    for read, wrong in ((plan.share, "1.1"), (plan.share, "10%"), (plan.share, "-1")):
        with pytest.raises(ValueError, match="is no share"):
            read(wrong)
    for text in ("0", "-3", "1.5", "x", ""):
        with pytest.raises(ValueError, match="whole number"):
            plan.count(text)
    for text in ("0", "50/m", "-1", ""):
        with pytest.raises(ValueError, match="is no rate"):
            plan.rate(text)


def test_a_threshold_is_missed_over_or_under_its_bound() -> None:
    over = read_threshold("upload_p95>500ms", own=False)
    assert over.missed({"upload_p95": 0.5}) is None
    assert over.missed({"upload_p95": 0.6}) == "upload_p95>500ms, and it was 0.6 s"
    under = read_threshold(" updates_per_second < 50 ", own=False)
    assert under.missed({"updates_per_second": 50.0}) is None
    assert under.missed({"updates_per_second": 49.0}) is not None


def test_what_was_not_measured_is_no_success() -> None:
    missed = read_threshold("upload_p95>2s", own=False).missed({"upload_p95": None})
    assert missed == "upload_p95>2s, and nothing was measured"


def test_a_share_is_of_all_that_was_tried() -> None:
    one_percent = read_threshold("errors>1%", own=False)
    values = {"errors": 1.0, "accepted": 99.0, "late": 0.0}
    assert one_percent.missed(values) is None
    assert one_percent.missed(values | {"errors": 2.0}) == "errors>1%, and it was 1.98%"
    assert read_threshold("errors>1", own=False).missed(values) is None
    assert one_percent.missed({"errors": 0.0, "accepted": 0.0, "late": 0.0}) is None


@pytest.mark.parametrize("name", [*TIMES, *SHARES])
def test_all_that_is_named_can_be_asked_for(name: str) -> None:
    bound = "2s" if name in TIMES else "1%"
    assert isinstance(read_threshold(f"{name}>{bound}", own=False), Threshold)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("uplod_p95>2s", "connect, check_in, download, upload or lag"),
        ("upload_p95=2s", "NAME>BOUND"),
        ("upload_p95>2", "2s"),
        ("errors>x", "errors>1%"),
        ("rounds>1%", "rounds>10"),
        ("coordinator_peak_mib>10", "is not measured"),
    ],
)
def test_a_bad_threshold_is_refused_with_what_is_right(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^--fail-if") as caught:
        read_threshold(text, own=False)
    assert said in str(caught.value)


def test_the_coordinators_figures_can_be_bound_where_it_is_the_tests_own() -> None:
    assert read_threshold("coordinator_cpu_ms_per_update>10", own=True).bound == 10
