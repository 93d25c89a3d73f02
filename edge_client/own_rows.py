"""A device's own rows: where they are, and what a federation's task reads them as."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_client.data import Example, FieldNames, check_source, shown
from edge_client.errors import ConfigurationError, DataError
from edge_client.held_out import Division, Split, divide
from edge_client.private_store import DeviceState
from edge_client.splits import check_share, whole_seed
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


def data_settings(
    source: DataSource, fields: FieldNames | None, held_out: float | None, seed: int | None
) -> DataSettings:
    """What an app says of its rows, looked at before anything is loaded.

    Raises:
        ConfigurationError: of `fields`, `held_out` or `seed` one is none.
        DataError: `source` is nothing that can be read, again and again.
    """
    check_source(source)
    if isinstance(source, Iterator):
        kind = type(source).__name__
        raise DataError(f"expected rows that can be read again, got {kind}", path="data")
    if held_out is not None:
        check_share(held_out)
    if seed is not None:
        seed = whole_seed(seed)
    if not isinstance(fields, FieldNames | None):
        raise ConfigurationError("fields", f"{fields!r}", "a FieldNames of edge_client.client")
    return DataSettings(source, fields or FieldNames(), held_out, seed)
