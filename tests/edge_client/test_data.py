"""Rows are read as they are, or refused with file, line and field."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from edge_client.data import Answer, Example, FieldNames, device_files, find_labels
from edge_client.errors import DataError
from edge_client.tasks import read_rows
from protocol.federation import Task, TaskKind

LABELS = Task(TaskKind.SEQUENCE_CLASSIFICATION, ("no", "yes"))
TEXTS = Task(TaskKind.CAUSAL_LM)
QUESTIONS = Task(TaskKind.QUESTION_ANSWERING)


def _file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _answers(texts: list[object], starts: list[object]) -> dict[str, object]:
    return {"text": texts, "answer_start": starts}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", '{"text": "a, b", "label": "yes"}\n\n{"text": "c", "label": 0}\n'),
        ("d.csv", 'text,label\n"a, b",yes\nc,0\n'),
        ("d.tsv", "text\tlabel\na, b\tyes\nc\t0\n"),
        ("d.CSV", '\n\r\ntext,label\r\n"a, b",yes\r\n\r\nc,0'),
        ("d.jsonl", b'\xef\xbb\xbf{"text": "a, b", "label": "yes"}\r\n{"text": "c", "label": "0"}'),
    ],
)
def test_files_of_every_kind_give_the_same_rows(
    tmp_path: Path, name: str, content: str | bytes
) -> None:
    rows = read_rows(_file(tmp_path, name, content), LABELS)
    assert rows == [Example("a, b", None, 1), Example("c", None, 0)]


def test_mappings_other_names_pairs_and_causal_texts(tmp_path: Path) -> None:
    rows = read_rows([{"s1": "a", "s2": "b", "y": 1}], LABELS, FieldNames("s1", "s2", "y"))
    assert rows == [Example("a", "b", 1)]
    assert read_rows([{"text": "t", "label": "anything"}], TEXTS) == [Example("t", None, None)]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("d.jsonl", '{"text": "a", "label": 1}\n{"text": ', r"d\.jsonl, line 2: is not JSON"),
        ("d.jsonl", "[1]", "line 1: expected an object"),
        ("d.jsonl", '{"label": 1}', 'line 1, field "text": is missing'),
        ("d.jsonl", '{"text": " ", "label": 1}', 'line 1, field "text": is empty'),
        ("d.jsonl", '{"text": 3, "label": 1}', 'field "text": expected text, got int'),
        ("d.jsonl", '{"text": "a"}', 'field "label": is missing'),
        ("d.jsonl", '{"text": "a", "label": "maybe"}', "'maybe' is not a label.*'no', 'yes'"),
        ("d.jsonl", '{"text": "a", "label": 2}', "2 is not a label"),
        ("d.jsonl", '{"text": "a", "label": true}', "True is not a label"),
        ("d.jsonl", '{"text": "a", "label": -1}', "-1 is not a label"),
        ("d.jsonl", b'{"text": "a", "label": 1}\n\xff', "line 2: is not UTF-8"),
        ("d.jsonl", '{"text": "a", "label": null}', 'field "label": is null'),
        ("d.jsonl", '{"text": "a", "label": 1.0}', "1.0 is not a label"),
        ("d.jsonl", '{"text": "a", "label": "' + "9" * 5000 + '"}', "is not a label"),
        ("d.jsonl", '{"text": "a", "label": ' + "9" * 5000 + "}", "line 1: is not JSON"),
        ("d.jsonl", r'{"text": "a\ud800", "label": 1}', 'field "text": holds half of a character'),
        ("d.jsonl", "\n", "holds no rows"),
        ("d.csv", "text,text,label\na,b,yes\n", "line 1: the header names 'text' twice"),
        ("d.csv", "text,label\na,yes,more\n", "line 2: expected 2 columns, got 3"),
        (
            "d.csv",
            'text,label\na,no\n"b,yes\nc,no\nd,no\n',
            "line 3: is malformed: a quote that begins in this row is never closed",
        ),
        ("d.txt", "a", r"expected a \.jsonl, \.csv, \.tsv file"),
    ],
)
def test_what_is_malformed_is_refused_by_file_line_and_field(
    tmp_path: Path, name: str, content: str | bytes, problem: str
) -> None:
    with pytest.raises(DataError, match=problem) as refused:
        read_rows(_file(tmp_path, name, content), LABELS)
    assert name in str(refused.value)


ODD = "שלום \u200f👩\u200d👧 e\u0301 \u2028 \x85 \x0b\x1c"


@pytest.mark.parametrize("text", [ODD, "long " * 200_000], ids=["odd", "1 MB"])
def test_a_text_stays_as_it_is_in_every_kind_of_file(tmp_path: Path, text: str) -> None:
    limit = csv.field_size_limit()
    for name, content in (
        ("d.jsonl", json.dumps({"text": text, "label": "yes"})),
        ("d.csv", f"text,label\n{text},yes\n"),
        ("d.tsv", f"text\tlabel\n{text}\tyes\n"),
    ):
        rows = read_rows(_file(tmp_path, name, content), LABELS)
        assert rows == [Example(text, None, 1)], name
    assert csv.field_size_limit() == limit  # which is one for the whole process


def test_a_number_is_a_label_by_name_before_it_is_an_index() -> None:
    stars = Task(TaskKind.SEQUENCE_CLASSIFICATION, ("1", "2", "3", "4", "5"))
    rows = [{"text": "a", "label": label} for label in (1, "1", 5, np.int64(5))]
    assert [row.label for row in read_rows(rows, stars)] == [0, 0, 4, 4]
    with pytest.raises(DataError, match="0 is not a label of the task"):
        read_rows([{"text": "a", "label": 0}], stars)


def test_a_label_in_another_form_of_unicode_is_told_from_what_it_looks_like() -> None:
    foods = Task(TaskKind.SEQUENCE_CLASSIFICATION, ("caf\xe9", "th\xe9"))
    looks_like = r"'cafe\\u0301' is not a label of the task, though it looks like 'caf\\xe9'"
    with pytest.raises(DataError, match=looks_like):
        read_rows([{"text": "a", "label": "cafe\u0301"}], foods)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([Example("a", None, 7)], 'line 1, field "label": 7 is not an index of the 2 labels'),
        ([Example("a", None, None)], 'field "label": None is not an index'),
        ([Example("a", None, cast(Any, "yes"))], "field \"label\": 'yes' is not an index"),
        ([Example("a", None, cast(Any, 1.0))], 'field "label": 1.0 is not an index'),
        ([Example("a", " ", 1)], 'field "text_pair": is empty'),
        ({"text": ["a"], "label": [1]}, "data: expected a file, or rows that are mappings, got di"),
        (None, "expected a file, or rows that are mappings, got NoneType"),
    ],
)
def test_rows_of_an_app_are_looked_at_too(rows: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        read_rows(rows, LABELS)


def test_a_missing_file_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_rows(tmp_path / "none.jsonl", LABELS)
    with pytest.raises(DataError, match=r"holds no \.jsonl"):
        device_files(tmp_path)


def test_labels_are_found_and_numbers_sorted_as_numbers(tmp_path: Path) -> None:
    numbers = _file(tmp_path, "a.jsonl", "".join(f'{{"label": {i}}}\n' for i in (10, 2, 1)))
    names = _file(tmp_path, "b.jsonl", '{"label": "b"}\n{"label": "a"}\n')
    assert find_labels([numbers]) == ["1", "2", "10"]
    assert find_labels([names]) == ["a", "b"]


SQUAD_ROW = {
    "id": "1",
    "question": "Who wrote it?",
    "context": "Ada wrote it in 1843.",
    "answers": {"text": ["Ada", "Ada wrote"], "answer_start": [0, 0]},
}


def test_questions_have_a_context_and_answers_in_it(tmp_path: Path) -> None:
    wanted = Example(
        "Who wrote it?", "Ada wrote it in 1843.", None, (Answer("Ada", 0), Answer("Ada wrote", 0))
    )
    assert read_rows(_file(tmp_path, "d.jsonl", json.dumps(SQUAD_ROW)), QUESTIONS) == [wanted]
    of_pandas = {"text": np.array(["Ada", "Ada wrote"], object), "answer_start": np.zeros(2, "i4")}
    for answers in (of_pandas, _answers(["Ada", "Ada wrote"], [np.int64(0)] * 2)):
        assert read_rows([SQUAD_ROW | {"answers": answers}], QUESTIONS) == [wanted]
    names = {"q": "question", "c": "context", "a": "answers"}
    renamed = {short: SQUAD_ROW[name] for short, name in names.items()}
    fields = FieldNames(question="q", context="c", answers="a")
    assert read_rows([renamed], QUESTIONS, fields) == [wanted]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"question": None}, 'line 2, field "question": is null'),
        ({"context": " "}, 'line 2, field "context": is empty'),
        ({"answers": "Ada"}, 'field "answers": expected an object with .* answer_start, got str'),
        ({"answers": {"text": ["Ada"]}}, r'"answers\.answer_start": expected a list, got NoneType'),
        ({"answers": _answers([], [])}, r'"answers\.text": is empty: a question needs an answer'),
        ({"answers": _answers(["Ada"], [0, 4])}, "has 2 starts for 1 texts"),
        ({"answers": _answers([3], [0])}, r'"answers\.text": expected text, got 3'),
        ({"answers": _answers(["Ada"], ["0"])}, r"'0' is no character of the context \(0 to 20\)"),
        ({"answers": _answers(["Ada"], [21])}, "21 is no character of the context"),
        (
            {"answers": _answers(["Ada", "1843"], [0, 15])},
            r"line 2, field \"answers\.answer_start\": '1843' is not at 15, where ' 184' is; "
            "it is at 16",
        ),
        ({"answers": _answers(["Bob"], [0])}, "where 'Ada' is; it is nowhere in the context"),
    ],
)
def test_an_answer_that_is_not_there_is_refused_by_line_and_field(
    tmp_path: Path, changes: dict[str, object], problem: str
) -> None:
    lines = [json.dumps(SQUAD_ROW), json.dumps(SQUAD_ROW | changes)]
    with pytest.raises(DataError, match=problem):
        read_rows(_file(tmp_path, "d.jsonl", "\n".join(lines)), QUESTIONS)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"rows\.jsonl: is a pipe"):
        read_rows(tmp_path / "rows.jsonl", LABELS)
