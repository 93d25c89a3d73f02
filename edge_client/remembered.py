"""What a device's state says beside its arrays: the settings it was learned under, which rows were
held out then, and the report that has no receipt yet. State in, state out."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from edge_client.errors import ConfigurationError, StateError
from edge_client.private_store import DeviceState, Fact
from edge_client.session import FinishedReport
from protocol.federation import FederationSettings, settings_from_json, settings_to_json
from protocol.messages import Metric
from protocol.schema import SchemaError
from protocol.tensors import NamedTensors, TensorSpec

# Settings that give what a device has learned its meaning.
MEANING: Final = ("task", "adapter", "algorithm", "update_dtype", "seed")
HELD_OUT: Final = 0.2


@dataclass(frozen=True, slots=True)
class Split:
    """The share of the rows that is held out, and the device's seed, which says which ones."""

    held_out: float
    seed: int


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


def split_of(state: DeviceState) -> Split:
    """What was held out of what it was trained on."""
    return Split(float(state.facts["held_out"] or 0), int(state.facts["seed"] or 0))


def with_split(state: DeviceState, split: Split) -> DeviceState:
    """The same, trained on what that leaves."""
    facts: dict[str, Fact] = {"held_out": split.held_out, "seed": split.seed}
    return replace(state, facts={**state.facts, **facts})


def choose_split(state: DeviceState | None, held_out: float | None, seed: int | None) -> Split:
    """What is asked for; where nothing is, what the state says.

    Before any training all is open. Afterwards a smaller share is (its rows are among those of a
    greater one): it can be trained on more, but never looked at what was trained on.

    Raises:
        ConfigurationError: rows that were trained on would be held out.
    """
    before = split_of(state) if state else Split(HELD_OUT, 0)
    split = Split(
        before.held_out if held_out is None else held_out, before.seed if seed is None else seed
    )
    if state is None or not state.steps_done:
        return split
    looks_at = "so that evaluate would look at rows that were trained on"
    if split.seed != before.seed:
        problem = f"is {split.seed}, and this device was trained with {before.seed}, {looks_at}"
        raise ConfigurationError("seed", problem, f"{before.seed}, none, or another state folder")
    if split.held_out > before.held_out:
        problem = f"is {split.held_out}, and {before.held_out} when this device was trained"
        right = f"{before.held_out} at most, none, or another state folder"
        raise ConfigurationError("held_out", f"{problem}, {looks_at}", right)
    return split


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
