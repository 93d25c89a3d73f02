"""Settings by name: what is written is read, also by a version that knows more of them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings

from protocol.federation import (
    FederationSettings,
    Rounds,
    settings_from_json,
    settings_to_json,
)
from protocol.methods import PF2LoRA
from protocol.scalars import SchemaError
from tests.protocol.samples import FINGERPRINT, SETTINGS
from tests.protocol.strategies import of_class

PFEDLORA = {"backbone": None, "algorithm": {"name": "pfedlora"}}


@settings(derandomize=True, deadline=None)
@given(of_class(FederationSettings))
def test_any_settings_come_back(written: FederationSettings) -> None:
    assert settings_from_json(settings_to_json(written)) == written


def test_settings_that_the_writer_did_not_know_take_their_defaults() -> None:
    table = json.loads(settings_to_json(SETTINGS))
    del table["rounds"]["report_goal"], table["algorithm"]["separate_batches"]
    read = settings_from_json(json.dumps(table))
    assert read == SETTINGS
    assert (read.rounds, read.algorithm) == (Rounds(), PF2LoRA())


def test_a_federation_whose_devices_have_their_own_backbones_has_none() -> None:
    table = json.loads(settings_to_json(SETTINGS)) | PFEDLORA
    read = settings_from_json(json.dumps(table))
    assert (read.backbone, read.fingerprint) == (None, "")
    del table["backbone"]  # as in a federation.toml
    assert settings_from_json(json.dumps(table)) == read
    assert SETTINGS.fingerprint == FINGERPRINT


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rounds": {"cohrot": 4}}, r"rounds\.cohrot: is unknown; did you mean 'cohort'"),
        (
            {"task": {"kind": "question-answering", "labels": ["a", "b"], "max_length": 64}},
            r"labels: question-answering takes no labels",
        ),
        (
            {"task": {"kind": "question-answer", "labels": [], "max_length": 64}},
            r"task\.kind: expected one of .*'question-answering'",
        ),
        (
            {"algorithm": {"name": "ffa-lora", "hypergradient": "exact"}},
            r"algorithm\.hypergradient: is no setting of 'ffa-lora', which has no settings",
        ),
        (
            {"aggregation": {"name": "trimmed-mean", "norm_max": 1.0}},
            r"aggregation\.norm_max: is no setting of 'trimmed-mean', which has share",
        ),
        ({"rounds": {"cohort": 4, "report_goal": 5}}, r"report_goal: is over the cohort of 4"),
        ({"rounds": {"mode": "asynchronous"}}, r"report_goal: must be given: how many reports"),
        (
            {
                "rounds": {"mode": "asynchronous", "report_goal": 2},
                "algorithm": {"name": "hetlora"},
            },
            r"rounds.mode: must be 'synchronous': hetlora",
        ),
        (
            {"rounds": {"cohort": 4, "report_goal": 2, "minimum_reports": 3}},
            r"minimum_reports: is over the report goal of 2",
        ),
        ({"backbone": None}, r"backbone: is missing; of the methods pfedlora alone does without"),
        (
            {"algorithm": {"name": "pfedlora"}},
            r"backbone: must be left out: each device of pfedlora has its own",
        ),
        (PFEDLORA | {"algorithm": {"name": "pfedlora", "mu": 0.6}}, r"mu: expected 0\.001 to 0\.5"),
        (PFEDLORA | {"algorithm": {"name": "pfedlora", "mu": 0}}, r"mu: expected 0\.001 to 0\.5"),
        (
            PFEDLORA | {"algorithm": {"name": "pfedlora", "shared_width": 4}},
            r"algorithm\.shared_width: is under the rank of 8",
        ),
        (PFEDLORA | {"adapter": {"head": "common"}}, r"adapter\.head: must be 'personal'"),
        (PFEDLORA | {"adapter": {"personal_rank": 0}}, r"personal_rank: pfedlora needs"),
        (PFEDLORA | {"training": {"local_steps": 1}}, r"training\.local_steps: must be 2 or more"),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, object], said: str) -> None:
    table = json.loads(settings_to_json(SETTINGS)) | wrong
    with pytest.raises(SchemaError, match=said):
        settings_from_json(json.dumps(table))
    with pytest.raises(SchemaError, match="no JSON"):
        settings_from_json("{")
