"""The device behind the session: its data, its model, and what it remembers.

Everything that must survive a crash is one state file, replaced whole: the personal adapter, the
optimizers' state, which rows were trained on, and the report that has no receipt yet. So a round is
either trained and its report remembered, or it is as if it had never begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Final

import numpy as np

from edge_client.aside import aside
from edge_client.backends.base import Level, Trainer
from edge_client.backends.encoding import EncodedRows
from edge_client.data import Example
from edge_client.device_model import DeviceModel
from edge_client.errors import ConfigurationError, DivergedError
from edge_client.factors import RankReport
from edge_client.held_out import NO_DIGESTS, Division, choose_split, split_of, with_split
from edge_client.own_rows import DataSettings
from edge_client.private_store import DeviceState, Fact, Group, PrivateStore
from edge_client.remembered import (
    report_of,
    settings_of,
    with_report,
    with_settings,
    without_report,
)
from edge_client.session import FinishedReport, Offer
from edge_client.splits import sample
from protocol.federation import FederationSettings, settings_to_json
from protocol.messages import Assignment, Metric, Receipt
from protocol.tensors import NamedTensors, TensorSpec

# Makes the model of a federation; where torch (or another backend) comes in.
TrainerFactory = Callable[[FederationSettings], Trainer]
Progress = Callable[[str], None]

# Of the held-out rows, in a run; `evaluate` takes all of them.
LOOKED_AT_MAX: Final = 1000
# The share of a layer's energy that a rank must keep to be told as the layer's.
TOLD_ENERGY: Final = 0.99


class DeviceWorker:
    """Does the assignments of one device (a session.Worker) and answers the app's questions."""

    def __init__(
        self,
        data: DataSettings,
        store: PrivateStore,
        make_trainer: TrainerFactory,
        progress: Progress,
        tell_accuracy: bool = False,
    ) -> None:
        self._data = data
        self._tell_accuracy = tell_accuracy
        self._store = store
        self._make_trainer = make_trainer
        self._progress = progress
        self._state: DeviceState | None = store.load()
        self.split = choose_split(self._state, data.held_out, data.seed)
        self._settings: FederationSettings | None = None
        self._trainer: Trainer | None = None
        self._base: NamedTensors | None = None
        self._is_personal = False
        # The app asks from threads of its own, and an evaluation puts the model at another level.
        self._alone = threading.RLock()
        self._questions: list[threading.Event] = []  # set when they are answered
        self._division = Division([], [], NO_DIGESTS)
        self._are_rows_read = False

    # --- session.Worker -----------------------------------------------------------------------

    def begin_run(self) -> None:
        """The rows are read again when the run prepares: an app may have added some."""
        self._are_rows_read = False

    async def prepare(self, settings: FederationSettings) -> None:
        """Load data and backbone for this federation, where that is not done.

        Raises:
            StateError: the state folder belongs to another federation or backbone, or what it holds
                would mean something else under these settings.
            DataError, BackboneError, AdapterError: naming what is wrong.
        """

        def make_ready() -> None:
            with self._alone:
                # They may be others than those that an app's question found in the state.
                if self._settings != settings:
                    self._set_up(settings)
                    self._progress("ready; waiting for a round")
                elif not self._are_rows_read:
                    self._read_rows()
                    self._progress(f"{self._counts()}; waiting for a round")
                self._are_rows_read = True

        await aside(make_ready)

    def offer(self) -> Offer:
        return Offer(self.trainer.fingerprint, len(self.training_rows), self.trainer.rank)

    def held(self, digest: bytes) -> NamedTensors | None:
        if self._base is not None and self._base.digest() == digest:
            return self._base
        return None

    def unsent(self) -> FinishedReport | None:
        return report_of(self.state)

    async def train(self, assignment: Assignment, base: NamedTensors) -> FinishedReport:
        unwanted = threading.Event()
        return await aside(lambda: self._train(assignment, base, unwanted), unwanted)

    async def settled(self, receipt: Receipt) -> None:
        round_number = self.state.facts.get("report_round")
        self._progress(f"report of round {round_number}: {receipt.status.value}")
        await aside(lambda: self._save(without_report(self.state)))

    async def finish(self, base: NamedTensors, rounds: int) -> None:
        def take() -> None:
            groups = {**self.state.groups, "common": base.arrays()}
            with self._alone:
                self._take(base)
                self._save(replace(self.state, groups=groups))

        await aside(take)
        self._progress(f"finished after {rounds} rounds")

    # --- the app's questions ------------------------------------------------------------------

    @contextlib.contextmanager
    def ready(self) -> Iterator[DeviceModel]:
        """The model, for this thread alone.

        A round that is being trained makes way after its next step, and goes on afterwards: the
        model is what it was when the round began.

        Raises:
            ConfigurationError: nothing was trained here yet.
        """
        answered = threading.Event()
        self._questions.append(answered)
        try:
            with self._alone:
                self._restore()
                self._personalise()
                yield DeviceModel(
                    self.trainer, self.settings, self._data.fields, self.held_out_rows
                )
        finally:
            self._questions.remove(answered)
            answered.set()

    def _restore(self) -> None:
        """Make the model ready from what is on this device alone, without a coordinator."""
        if self._settings is not None:
            if self._trainer is None:  # the same thread is at it: `progress` asks
                problem = "the model is being loaded, and `progress` is called meanwhile"
                raise ConfigurationError("progress", problem, "a question once that has returned")
            return
        if self._state is None:
            problem = f"{self._store.folder} holds no trained state"
            raise ConfigurationError("state_dir", problem, "one that a run has trained")
        self._set_up(settings_of(self._state))

    @property
    def state(self) -> DeviceState:
        if self._state is None:
            raise RuntimeError("the device has not been set up")
        return self._state

    @property
    def training_rows(self) -> list[Example]:
        return self._division.training

    @property
    def held_out_rows(self) -> list[Example]:
        return self._division.held_out

    @property
    def rounds_done(self) -> int:
        return self._state.rounds_done if self._state else 0

    @property
    def settings(self) -> FederationSettings:
        if self._settings is None:
            raise RuntimeError("the device has not been set up")
        return self._settings

    @property
    def trainer(self) -> Trainer:
        if self._trainer is None:
            raise RuntimeError("the device has not been set up")
        return self._trainer

    # --- inside -------------------------------------------------------------------------------

    def _set_up(self, settings: FederationSettings) -> None:
        self._settings, self._trainer = settings, None  # two models need not fit
        self._is_personal = False
        try:
            self._division = self._divided()
            self._progress(f"{self._counts()}; loading the backbone")
            self._trainer = self._make_trainer(settings)
            self._start = self._trainer.common()
            self._encoded = self._trainer.encode(self.training_rows)
            if self._state is None:
                self._begin()
            else:
                self._go_on(self._state)
        except BaseException:
            self._settings = self._trainer = None
            raise

    def _read_rows(self) -> None:
        division = self._divided()
        # Where a row of them is refused, the ones before are still there to be asked about.
        self._encoded = self.trainer.encode(division.training)
        self._division = division
        self._is_personal = False

    def _divided(self) -> Division:
        return self._data.divided(self.settings.task, self.split, self._state, self._progress)

    def _counts(self) -> str:
        held = len(self.held_out_rows)
        return f"{len(self.training_rows) + held} rows, {held} of them held out"

    def _begin(self, common: Group | None = None) -> None:
        """Begin to remember; with the common adapter if this device has one already."""
        trainer = self.trainer
        facts: dict[str, Fact] = {"settings": settings_to_json(self.settings)}
        if rows := self._looked_at():
            self._personalise()
            before = trainer.evaluate(rows, Level.BACKBONE)
            facts |= {"before_loss": before.loss, "before_accuracy": before.accuracy}
        groups = {"personal": trainer.personal(), "optimizer": trainer.optimizer_state()}
        state = DeviceState(
            federation=self.settings.name,
            fingerprint=trainer.fingerprint,
            steps_done=0,
            rounds_done=0,
            groups=groups if common is None else groups | {"common": common},
            facts=facts,
        )
        self._save(with_split(state, self.split))

    def _go_on(self, state: DeviceState) -> None:
        self._store.check(state, self.settings.name, self.trainer.fingerprint)
        self._state = with_settings(state, self.settings, self._store.folder)
        if not state.steps_done and split_of(state) != self.split:
            self._begin(state.groups.get("common"))
            state = self.state
        self.trainer.set_personal(state.groups["personal"])
        self.trainer.set_optimizer_state(state.groups.get("optimizer", {}))
        common = state.groups.get("common", self._start.arrays())
        self._take(_in_order(common, self._start.specs))

    def _train(
        self, assignment: Assignment, base: NamedTensors, unwanted: threading.Event
    ) -> FinishedReport:
        def before_step() -> None:
            if unwanted.is_set():
                raise asyncio.CancelledError
            self._make_way(base)

        with self._alone:
            try:
                return self._train_alone(assignment, base, before_step)
            except BaseException:
                # An app that goes on after it must not find half of a round in the model.
                self._go_on(self.state)
                raise

    def _make_way(self, base: NamedTensors) -> None:
        """In the middle of a round, for the questions that wait by now."""
        if not (waiting := self._questions[:]):
            return
        trainer = self.trainer
        common, personal = trainer.common(), trainer.personal()
        self._take(base)
        trainer.set_personal(self.state.groups["personal"])
        self._alone.release()
        for answered in waiting:
            answered.wait()
        self._alone.acquire()
        trainer.set_common(common)
        trainer.set_personal(personal)

    def _train_alone(
        self, assignment: Assignment, base: NamedTensors, before_step: Callable[[], None]
    ) -> FinishedReport:
        trainer = self.trainer
        self._progress(f"round {assignment.round}: training")
        self._take(base)
        told = self._accuracy_of_base() if self._tell_accuracy else {}
        done = self.state.steps_done
        result = trainer.train(self._encoded, done, assignment.round, before_step)
        update = trainer.update_from(base)
        if not _are_finite(update.flat(), *trainer.personal().values()):
            raise DivergedError(assignment.round, result.last_loss)
        if self._tell_accuracy:
            told |= _rank_range(trainer.rank_report())
        metrics = {"loss": result.mean_loss, "steps": float(result.steps), **told}
        report = FinishedReport(
            assignment.assignment,
            assignment.round,
            assignment.base_version,
            len(self.training_rows),
            tuple(Metric(name, value) for name, value in metrics.items()),
            update,
        )
        self._remember(report, result.steps, base)
        # What the round made of it is in the update: a restart would not find it here either.
        self._take(base)
        self._progress(f"round {assignment.round}: loss {result.mean_loss:.4f}")
        return report

    def _remember(self, report: FinishedReport, steps: int, base: NamedTensors) -> None:
        """Save what a round of so many steps has made of this device, and its report."""
        state = replace(
            self.state,
            steps_done=self.state.steps_done + steps,
            rounds_done=self.state.rounds_done + 1,
            groups={
                "personal": self.trainer.personal(),
                "optimizer": self.trainer.optimizer_state(),
                "common": base.arrays(),
            },
        )
        state = with_split(state, self.split, self._division.trained)
        self._save(with_report(state, report))

    def _take(self, base: NamedTensors) -> None:
        """Make it the common adapter here; what is personal of it is made when it is asked for."""
        self.trainer.set_common(base)
        self._base, self._is_personal = base, False

    def _personalise(self) -> None:
        if not self._is_personal:
            self.trainer.personalise(self._encoded)
            self._is_personal = True

    def _accuracy_of_base(self) -> dict[str, float]:
        """What the base version gives this device on the rows it holds out, before it trains."""
        if not (rows := self._looked_at()):
            return {}
        self._personalise()
        return {
            "accuracy_common": self.trainer.evaluate(rows, Level.COMMON).accuracy,
            "accuracy_personal": self.trainer.evaluate(rows, Level.PERSONAL).accuracy,
        }

    def _looked_at(self) -> EncodedRows:
        """Held-out rows for what a run asks by itself, which no round should wait for long."""
        return self.trainer.encode(sample(self.held_out_rows, LOOKED_AT_MAX, self.split.seed))

    def _save(self, state: DeviceState) -> None:
        self._store.save(state)
        self._state = state


def _rank_range(reports: Mapping[str, RankReport]) -> dict[str, float]:
    """The least and the greatest rank that keeps a layer's energy, over the layers."""
    ranks = [report.rank_for(TOLD_ENERGY) for report in reports.values()]
    return {"rank_min": float(min(ranks)), "rank_max": float(max(ranks))} if ranks else {}


def _are_finite(*arrays: np.ndarray) -> bool:
    return all(bool(np.isfinite(array).all()) for array in arrays)


def _in_order(arrays: Mapping[str, np.ndarray], specs: tuple[TensorSpec, ...]) -> NamedTensors:
    return NamedTensors.from_arrays({spec.name: arrays[spec.name] for spec in specs})
