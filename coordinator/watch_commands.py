"""`pf2lora-coordinator status` and `watch`: where federations stand, once or as it changes."""

from __future__ import annotations

import argparse
import contextlib
import json
import select
import sys
import time
from typing import Final

from coordinator.errors import ConfigurationError
from coordinator.store import views
from coordinator.store.sql import SqlStore
from coordinator.store.views import FederationView, OpenRoundView

LOOK_EVERY_S: Final = 1.0


def status(options: argparse.Namespace) -> int:
    """Print where each federation stands."""
    with contextlib.closing(SqlStore(options.store, create=False)) as store:
        running = store.database.is_coordinated
        for federation in _look(store, options.name):
            print(_json(federation, running) if options.json else _status_text(federation, running))
    return 0


def watch(options: argparse.Namespace) -> int:
    """Print a line whenever a federation stands otherwise than before; until interrupted.

    It ends by itself where nobody reads what it prints.
    """
    shown: dict[str, str] = {}
    with (
        contextlib.closing(SqlStore(options.store, create=False)) as store,
        contextlib.suppress(KeyboardInterrupt, BrokenPipeError),
    ):
        while True:
            running = store.database.is_coordinated
            for federation in _look(store, options.name):
                line = _json(federation, running) if options.json else _line(federation, running)
                if shown.get(federation.name) != line:
                    shown[federation.name] = line
                    print(
                        line if options.json else f"{time.strftime('%H:%M:%S')}  {line}", flush=True
                    )
            if _is_unread(LOOK_EVERY_S):
                break
    return 0


def _is_unread(wait_s: float) -> bool:
    """Wait; at once True when nobody reads the output any more, as under `| head -1`."""
    if sys.stdout is None:
        return True
    output = select.poll()
    output.register(sys.stdout, 0)  # errors are told unasked
    return bool(output.poll(wait_s * 1000))


def named(store: SqlStore, name: str | None) -> str:
    """The name that was given, if the store has a federation of it; the only one's if none was.

    Raises:
        ConfigurationError: naming those that there are.
    """
    with store.database.begin() as db:
        names = views.federation_names(db)
    if name is None and len(names) == 1:
        return names[0]
    if name in names:
        return name
    there_are = ", ".join(map(repr, names)) or "none"
    if name is None:
        raise ConfigurationError("--name", f"is missing; the store has {there_are}")
    raise ConfigurationError("--name", f"the store has no federation {name!r}, but {there_are}")


def _look(store: SqlStore, name: str | None) -> list[FederationView]:
    with store.database.begin() as db:
        found = views.all_federations(db)
    if name is None:
        return found
    wanted = named(store, name)
    return [federation for federation in found if federation.name == wanted]


def _json(federation: FederationView, running: bool | None) -> str:
    return json.dumps(views.as_json(federation) | {"coordinator_running": running})


def _status_text(federation: FederationView, running: bool | None) -> str:
    """`running`: whether a coordinator runs on the store; None where that cannot be known."""
    left = ("  no coordinator is running on this store: all is as the last one left it",)
    return "\n".join(
        (
            f"{federation.name}: {federation.algorithm} on {federation.backbone}",
            *(left if running is False else ()),
            f"  rounds   {federation.rounds_done} of {federation.rounds} done; "
            f"{_round_text(federation, countdown=running is not False)}",
            f"  devices  {_devices_text(federation)}",
            f"  reports  {federation.kept} kept, {federation.late} late, "
            f"{federation.rejected} rejected",
            f"  bytes    {_size(federation.sent_bytes)} sent by devices, "
            f"{_size(federation.received_bytes)} received",
        )
    )


def _line(federation: FederationView, running: bool | None) -> str:
    left = "; no coordinator is running" if running is False else ""
    return (
        f"{federation.name}  {federation.rounds_done}/{federation.rounds} rounds  "
        f"{_round_text(federation, countdown=False)}  ({_devices_text(federation)}{left})"
    )


def _round_text(federation: FederationView, *, countdown: bool) -> str:
    open_round = federation.open_round
    if open_round is None:
        if federation.rounds_done >= federation.rounds:
            return "all are done"
        return {"pause": "paused", "stop": "stopped"}.get(federation.wish.value, "waiting")
    # A buffer, which has no deadline, takes reports of devices that were asked before it.
    wanted = open_round.goal if open_round.deadline_at is None else open_round.cohort
    text = f"round {open_round.round} has {open_round.reports} of {wanted} reports"
    return text + (_left(open_round) if countdown else "")


def _left(open_round: OpenRoundView) -> str:
    if open_round.deadline_at is None:
        return ""
    return f", {max(0.0, open_round.deadline_at - time.time()):.0f} s left"


def _devices_text(federation: FederationView) -> str:
    states = sorted(federation.devices.items())
    return ", ".join(f"{count} {state}" for state, count in states) or "none yet"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
