"""A federation that answers questions, over real sockets, from SQuAD's rows to the answers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from edge_client import cli
from edge_client.client import EdgeClient
from edge_client.errors import DataError
from tests.integration.test_federation import _coordinator, _run_all, _write_config

CLASSIFY = 'kind = "sequence-classification"\nlabels = ["bad", "good"]\nmax_length = 16'
ANSWER = 'kind = "question-answering"\nmax_length = 24'


def _write_questions(path: Path, place: str) -> Path:
    rows = []
    for number in range(12):
        context = f"In the year {1900 + number} Anna moved to {place} and she stayed for long."
        answers = {"text": [place], "answer_start": [context.index(place)]}
        rows.append({"question": "Where to?", "context": context, "answers": answers})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_devices_learn_to_answer_and_the_app_and_the_shell_ask_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _write_config(tmp_path)
    path.write_text(path.read_text().replace(CLASSIFY, ANSWER))
    assert cli.main(["prepare", str(path)]) == 0
    data = [_write_questions(tmp_path / f"{p}.jsonl", p) for p in ("Oslo", "Cape Town")]
    with _coordinator(path) as address:
        clients = [EdgeClient(address, f, tmp_path / f.stem, scheme="nf4") for f in data]
        _run_all(clients)
        context = "Later Anna moved to Oslo again."
        (found,) = clients[0].predict([{"question": "Where to?", "context": context}])
        assert context[found.start : found.end] == found.text != ""
        assert 0 < found.probability <= 1
        assert clients[0].evaluate([json.loads(data[1].read_text().splitlines()[0])]).count == 1
        for wrong, said in (("Where to?", "got str"), ({"question": "Where?"}, '"context"')):
            with pytest.raises(DataError, match=said):
                clients[0].predict([wrong])  # type: ignore[list-item]
        for client in clients:
            client.close()
    capsys.readouterr()
    flags = ["--data", str(data[0]), "--state-dir", str(tmp_path / "Oslo")]
    assert cli.main(["evaluate", *flags, "--json"]) == 0
    levels = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    levels = [line for line in levels if "level" in line]
    assert [one["level"] for one in levels] == ["backbone", "common", "personal"]
    for one in levels:
        assert set(one) == {"level", "rows", "loss", "exact_match", "f1"}
        assert one["rows"] == 2
        assert 0 <= one["exact_match"] <= one["f1"] <= 1
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"question": "Where to?", "context": context}))
    assert cli.main(["predict", *flags, "--scheme", "nf4", "--rows", str(asked), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer == asdict(found) | {"probability": pytest.approx(found.probability, rel=1e-4)}
    text = data[0].read_text().replace('"answer_start": [', '"answer_start": [1', 1)
    data[0].write_text(text)
    assert cli.main(["evaluate", *flags]) == 1
    assert 'line 1, field "answers.answer_start": 131 is no char' in capsys.readouterr().err
