"""What a device's state says beside its arrays: the settings that it was learned under, and the
report that has no receipt yet. State in, state out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from edge_client.errors import StateError
from edge_client.private_store import DeviceState, Fact
from edge_client.session import FinishedReport
from protocol.federation import FederationSettings, settings_from_json, settings_to_json
from protocol.messages import Metric
from protocol.scalars import SchemaError
from protocol.tensors import NamedTensors, TensorSpec

# Settings that give what a device has learned its meaning.
MEANING: Final = ("task", "adapter", "algorithm", "update_dtype", "seed")


def settings_of(state: DeviceState) -> FederationSettings:
    """The settings under which it was learned.

    Raises:
        StateError: they are not of this version.
    """
    try:
        return settings_from_json(str(state.facts["settings"]))
    except SchemaError as error:
        raise StateError(f"the state's settings are not of this version: {error}") from None


def with_settings(state: DeviceState, settings: FederationSettings, folder: Path) -> DeviceState:
    """The state of a folder under settings that may have changed since.

    Raises:
        StateError: what was learned would mean something else under them.
    """
    before = settings_of(state)
    changed = [name for name in MEANING if getattr(before, name) != getattr(settings, name)]
    if changed:
        raise StateError(
            f"{folder} holds what was learned in {before.name!r} when its {', '.join(changed)} had "
            "other settings; use another state folder"
        )
    return replace(state, facts={**state.facts, "settings": settings_to_json(settings)})


def with_report(state: DeviceState, report: FinishedReport) -> DeviceState:
    """The same with a report that is to be sent until it has its receipt."""
    facts: dict[str, Fact] = {
        "report_assignment": report.assignment,
        "report_round": report.round,
        "report_examples": report.examples,
        "report_base": report.base_version.hex(),
        "report_metrics": json.dumps({metric.name: metric.value for metric in report.metrics}),
        "report_specs": json.dumps([(spec.name, spec.shape) for spec in report.update.specs]),
    }
    buffer = {"buffer": np.frombuffer(report.update.buffer, np.uint8)}
    return replace(state, groups={**state.groups, "report": buffer}, facts={**state.facts, **facts})


def report_of(state: DeviceState) -> FinishedReport | None:
    """The report that has no receipt yet, if there is one."""
    facts = state.facts
    if "report_assignment" not in facts:
        return None
    dtype = settings_of(state).update_dtype
    specs = [
        TensorSpec(name, dtype, tuple(shape))
        for name, shape in json.loads(str(facts["report_specs"]))
    ]
    metrics = json.loads(str(facts["report_metrics"]))
    return FinishedReport(
        str(facts["report_assignment"]),
        int(facts["report_round"] or 0),
        bytes.fromhex(str(facts["report_base"])),
        int(facts["report_examples"] or 0),
        tuple(Metric(name, value) for name, value in metrics.items()),
        NamedTensors(tuple(specs), state.groups["report"]["buffer"].tobytes()),
    )


def without_report(state: DeviceState) -> DeviceState:
    """The same, its report settled."""
    groups = {name: group for name, group in state.groups.items() if name != "report"}
    facts = {key: fact for key, fact in state.facts.items() if not key.startswith("report_")}
    return replace(state, groups=groups, facts=facts)
