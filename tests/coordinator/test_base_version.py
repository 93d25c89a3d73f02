"""What a federation's base version makes of the reports of its devices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from coordinator.base_version import BaseVersion
from protocol.federation import Backbone, FederationSettings, Task, TaskKind
from protocol.messages import Report
from protocol.signing import UNSIGNED
from protocol.tensors import NamedTensors, TensorSpec

SETTINGS = FederationSettings(
    "reviews",
    Backbone("none", "sha256:" + "a" * 64),
    Task(TaskKind.SEQUENCE_CLASSIFICATION, ("a", "b")),
)
BASE = NamedTensors.from_arrays({"x.A": np.zeros((8, 4), np.float32)})


def report(device: int, name: str = "x.A") -> Report:
    """As it comes from the wire: every object in it its own."""
    specs = tuple(TensorSpec(name, spec.dtype, spec.shape) for spec in BASE.specs)
    payload = replace(BASE.payload(), tensors=specs)
    return Report(f"assignment-{device}", 1, BASE.digest(), 10, (), payload, UNSIGNED)


def test_reports_that_wait_share_their_list_of_tensors() -> None:
    base = BaseVersion(SETTINGS, BASE, None)
    first, second = report(1), report(2)
    assert base.misfit(first) is None
    shared = base.shared(second)
    assert shared == second
    assert shared.payload.tensors is first.payload.tensors


def test_a_list_of_tensors_that_does_not_fit_is_not_kept() -> None:
    base = BaseVersion(SETTINGS, BASE, None)
    stranger = report(1, "y.A")
    assert base.misfit(stranger)
    assert base.shared(report(2, "y.A")).payload.tensors is not stranger.payload.tensors
