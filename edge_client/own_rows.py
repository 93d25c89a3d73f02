"""A device's own rows: where they are, and what a federation's task reads them as."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_client.data import Example, FieldNames, shown
from edge_client.errors import DataError
from edge_client.held_out import Division, Split, divide
from edge_client.private_store import DeviceState
from edge_client.tasks import read_rows
from protocol.federation import Task
from protocol.limits import EXAMPLES_MAX

DataSource = str | Path | Iterable[Example | Mapping[str, object]]


@dataclass(frozen=True, slots=True)
class DataSettings:
    """Where this device's rows are, and the share of them kept apart to evaluate on.

    Without a share or a seed they are what they were when the device was trained.
    """

    source: DataSource
    fields: FieldNames
    held_out: float | None = None
    seed: int | None = None

    def divided(
        self, task: Task, split: Split, state: DeviceState | None, progress: Callable[[str], None]
    ) -> Division:
        """The rows to train on and those held out, on the device of this state.

        Raises:
            DataError: a row is malformed, or there are too few or too many.
        """
        rows = read_rows(self.source, task, self.fields)
        division = divide(rows, split, state, progress)
        if (count := len(division.training)) > EXAMPLES_MAX:
            problem = f"{count} rows to train on; a device has {EXAMPLES_MAX} at most"
            raise DataError(problem, path=shown(self.source))
        return division
