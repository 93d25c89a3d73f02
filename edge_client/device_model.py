"""A device's model as its app asks it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edge_client.backends.base import (
    Evaluation,
    Export,
    FoundAnswer,
    LabelMix,
    Level,
    Prediction,
    Trainer,
)
from edge_client.data import Example, FieldNames, Place
from edge_client.errors import DataError
from edge_client.own_rows import DataSource
from edge_client.peft_export import cut_to
from edge_client.tasks import read_rows, rules_for
from protocol.federation import FederationSettings


@dataclass(frozen=True, slots=True)
class DeviceModel:
    """The trained model of a device, as long as `DeviceWorker.ready` keeps rounds away from it.

    `fields` are what this device calls a row's fields; `held_out_rows` were never trained on.
    """

    trainer: Trainer
    settings: FederationSettings
    fields: FieldNames
    held_out_rows: list[Example]

    def read(self, source: DataSource) -> list[Example]:
        """Rows of this federation's task."""
        return read_rows(source, self.settings.task, self.fields)

    def evaluate(
        self, rows: list[Example], level: Level, mix: LabelMix = LabelMix.OWN
    ) -> Evaluation:
        """Loss and accuracy on rows at one level; the rows must carry labels or answers.

        Raises:
            DataError: there are no rows.
            ConfigurationError: the model cannot answer for that mix of labels.
        """
        if not rows:
            raise DataError("no rows to evaluate on: hold some out, or pass some")
        return self.trainer.evaluate(self.trainer.encode(rows), level, mix)

    def predict(
        self, rows: Iterable[tuple[Place, object]], level: Level, mix: LabelMix = LabelMix.OWN
    ) -> list[Prediction] | list[FoundAnswer]:
        """What is likeliest of rows without a label or an answer.

        Raises:
            DataError: a row is not what this kind of task predicts from; names its place.
            ConfigurationError: the model cannot answer for that mix of labels.
        """
        rules = rules_for(self.settings.task)
        asked = [rules.asked(row, place, self.fields) for place, row in rows]
        return self.trainer.predict(asked, level, mix)

    def save_pretrained(
        self, folder: Path, base_model: str, rank: int | str | None, energy: float
    ) -> Export:
        """Write common + personal in PEFT's layout, cut as told.

        Raises:
            ConfigurationError: rank or energy is out of bounds, or the folder cannot be written.
            StorageFullError: there is no room; a file that was there before is intact.
        """
        ranks = cut_to(self.trainer.rank_report(), rank, energy)
        rows = self.trainer.encode(self.held_out_rows)
        return self.trainer.save_pretrained(folder, base_model, ranks, rows)
