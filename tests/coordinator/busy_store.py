"""A store as it is after months: many devices, many rounds, one of them open."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path

import numpy as np
import sqlalchemy as sa

from coordinator.store.schema import (
    bases,
    federations,
    members,
    reports,
    round_metrics,
    rounds,
    sightings,
)
from coordinator.store.sightings import DeviceState
from coordinator.store.sql import SqlStore
from protocol.federation import (
    Backbone,
    FederationSettings,
    Rounds,
    Task,
    TaskKind,
)
from protocol.tensors import NamedTensors

COHORT = 24
STATES = [*[DeviceState.AWAY] * 6, *[DeviceState.WAITING] * 3, DeviceState.RESTING]


def busy_settings(rounds_done: int) -> FederationSettings:
    return FederationSettings(
        "reviews",
        Backbone("sentence-transformers/all-MiniLM-L6-v2", "sha256:" + "a" * 64),
        Task(TaskKind.SEQUENCE_CLASSIFICATION, ("negative", "positive")),
        rounds=Rounds(count=rounds_done + 100, cohort=COHORT, report_goal=20, deadline_s=600),
    )


def fill_store(path: Path, devices: int, rounds_done: int, seed: int = 0) -> SqlStore:
    """A federation `reviews` of so many devices, after so many rounds, the next one half over."""
    rng = random.Random(seed)
    now = time.time()
    names = [f"{rng.getrandbits(64):016x}" for _ in range(devices)]
    store = SqlStore(f"sqlite:///{path}")
    start = NamedTensors.from_arrays({"x.A": np.ones((2, 3), np.float32)})
    settings = busy_settings(rounds_done)
    store.create(settings, start)
    with store.database.begin() as db:
        for number in range(1, rounds_done + 2):
            _add_round(db, rng, names, number, number <= rounds_done, now - 60)
        db.execute(sightings.insert(), [_sighting(rng, name, now, rounds_done) for name in names])

        db.execute(federations.update().values(rounds_done=rounds_done))
        db.execute(bases.update().values(number=rounds_done))
    return store


def _add_round(
    db: sa.Connection, rng: random.Random, names: list[str], number: int, over: bool, now: float
) -> None:
    opened_at = now - 240 * (1 + rng.random() / 2)
    took_s = 95 + 70 * rng.random() + 60 * math.exp(-number / 40)
    cohort = rng.sample(names, COHORT)
    kept = rng.randint(19, COHORT) if over else 13
    db.execute(
        rounds.insert().values(
            federation="reviews",
            number=number,
            attempt=1,
            base_version=bytes(32),
            opened_at=opened_at if over else now,
            deadline_at=now + 600,
            closed_at=opened_at + took_s if over else None,
            outcome="aggregated" if over else None,
            reports=kept if over else None,
            new_version=bytes(32) if over else None,
        )
    )
    db.execute(
        members.insert(),
        [
            {
                "assignment": f"{number}-{device}",
                "federation": "reviews",
                "number": number,
                "attempt": 1,
                "device": device,
            }
            for device in cohort
        ],
    )
    if not over:
        kept_now = [
            {
                "assignment": f"{number}-{device}",
                "federation": "reviews",
                "number": number,
                "attempt": 1,
                "received_at": now,
                "report": b"",
            }
            for device in cohort[:kept]
        ]
        db.execute(reports.insert(), kept_now)
        return
    learned = 1 - math.exp(-number / 120)
    told = {
        "loss": (0.69 - 0.42 * learned, 0.05),
        "accuracy_common": (0.52 + 0.30 * learned, 0.025),
        "accuracy_personal": (0.55 + 0.36 * learned, 0.02),
    }
    for name, (middle, spread) in told.items():
        median = middle + rng.gauss(0, spread / 6)
        db.execute(
            round_metrics.insert().values(
                federation="reviews",
                number=number,
                attempt=1,
                name=name,
                devices=kept,
                low=median - spread * (0.8 + 0.4 * rng.random()),
                median=median,
                high=median + spread * (0.8 + 0.4 * rng.random()),
            )
        )


def _sighting(rng: random.Random, name: str, now: float, rounds_done: int) -> dict[str, object]:
    state = rng.choice([*STATES, DeviceState.TRAINING if rng.random() < 0.2 else DeviceState.AWAY])
    tells = rng.random() < 0.7
    common = 0.74 + rng.gauss(0, 0.04)
    low = rng.randint(1, 3)
    return {
        "federation": "reviews",
        "device": name,
        "state": state.value,
        "first_seen_at": now - 40 * 86400,
        "last_seen_at": now - (0 if state is not DeviceState.AWAY else rng.expovariate(1 / 40000)),
        "round": rng.randint(max(1, rounds_done - 80), max(1, rounds_done)),
        "examples": rng.randint(60, 4000),
        "sent_bytes": int(rng.lognormvariate(17, 0.6)),
        "received_bytes": int(rng.lognormvariate(17.8, 0.6)),
        "kept": rng.randint(0, 40),
        "rejected": int(rng.random() < 0.03),
        "late": rng.randint(0, 4),
        "loss": 0.3,
        "accuracy_common": common if tells else None,
        "accuracy_personal": common + rng.gauss(0.06, 0.03) if tells else None,
        "rank_min": low if tells else None,
        "rank_max": low + rng.randint(1, 6) if tells else None,
    }
