"""Kinds of task, one file a kind: what a row is, what is foretold of it, and how that is scored.

A new kind is a file here, a member of both `TaskKind`s (protocol/federation.py, quantization/
tasks.py) and, in quantization/checkpoint.py, the class of transformers that has its head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from edge_client.data import Example, FieldNames, RawRow, raw_rows, shown
from edge_client.errors import DataError
from edge_client.tasks.base import TaskRules
from edge_client.tasks.causal_lm import CausalLM
from edge_client.tasks.classification import Classification
from edge_client.tasks.question_answering import QuestionAnswering
from protocol.federation import Task, TaskKind

RULES: Final[dict[TaskKind, type[TaskRules]]] = {
    TaskKind.SEQUENCE_CLASSIFICATION: Classification,
    TaskKind.CAUSAL_LM: CausalLM,
    TaskKind.QUESTION_ANSWERING: QuestionAnswering,
}


def rules_for(task: Task) -> TaskRules:
    """What the task's kind means on a device."""
    return RULES[task.kind](task)


def read_rows(
    source: str | Path | Iterable[object], task: Task, fields: FieldNames | None = None
) -> list[Example]:
    """All rows of a source.

    Args:
        source: a file, or mappings (or Examples) in any iterable.
        task: says what fields a row has.
        fields: their names, if not the usual ones.

    Raises:
        DataError: a row is malformed; names file, line and field.
    """
    rules, names = rules_for(task), fields or FieldNames()
    rows = []
    for place, row in raw_rows(source):
        if isinstance(row, Example):
            rules.check(row, place, names)
            rows.append(replace(row, place=place))
        elif isinstance(row, Mapping):
            rows.append(rules.read(RawRow(row, place), names))
        else:
            raise place.error(f"expected an object with fields, got {type(row).__name__}")
    if not rows:
        raise DataError("holds no rows", path=shown(source))
    return rows
