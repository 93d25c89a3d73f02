"""What a device has learned is asked from an app and from the shell, of texts and of pairs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_client import cli
from edge_client.backends.base import Level
from edge_client.client import EdgeClient
from edge_client.errors import DataError
from quantization.quantize import quantize
from tests.integration.test_federation import MINILM, _coordinator, _run_all, _write_config

PAIR = {"text": "a cat sleeps", "text_pair": "an animal rests"}


def _write_pairs(path: Path) -> Path:
    rows = [{**PAIR, "text": f"cat {n} sleeps", "label": ["bad", "good"][n % 2]} for n in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_an_app_and_the_shell_ask_about_texts_and_pairs_of_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [_write_pairs(tmp_path / f"{name}.jsonl") for name in "ab"]
    with _coordinator(_write_config(tmp_path)) as address:
        quantize(MINILM, "nf4", tmp_path / "nf4")
        clients = [
            EdgeClient(address, file, tmp_path / file.stem, backbone=backbone)
            for file, backbone in zip(data, (None, str(tmp_path / "nf4")), strict=True)
        ]
        _run_all(clients)
        clients[1].save_pretrained(tmp_path / "adapter")
        (of_pair,) = clients[0].predict([PAIR])
        (of_first,) = clients[0].predict([PAIR["text"]])
        (common,) = clients[0].predict([PAIR], Level.COMMON)
        for wrong, said in (({"text_pair": "x"}, '"text": is missing'), (3, "expected text")):
            with pytest.raises(DataError, match=said):
                clients[0].predict([wrong])  # type: ignore[list-item]
        for client in clients:
            client.close()
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == MINILM, "PEFT cannot load a quantised folder"
    assert of_pair.probabilities != of_first.probabilities != common.probabilities

    flags = ["predict", "--data", str(data[0]), "--state-dir", str(tmp_path / "a"), "--json"]
    rows = tmp_path / "asked.csv"
    rows.write_text("text,text_pair\n" + ",".join(PAIR.values()) + "\n")
    capsys.readouterr()

    def shell(*more: str) -> list[dict[str, float]]:
        assert cli.main([*flags, *more]) == 0
        return [json.loads(line)["probabilities"] for line in capsys.readouterr().out.splitlines()]

    for more, wanted in (
        ([PAIR["text"], "--rows", str(rows)], [of_first, of_pair]),
        (["--rows", str(rows), "--level", "common"], [common]),
    ):
        for shares, one in zip(shell(*more), wanted, strict=True):
            assert list(shares) == ["bad", "good"]
            assert list(shares.values()) == pytest.approx(one.probabilities, rel=1e-4)
    rows.write_text(f"text,text_pair\n{','.join(PAIR.values())}\n,a\n")
    for more, named in (
        ([], f'{rows}, line 3, field "text": is empty'),
        (["\ud800"], "the texts given, line 2: holds half of a character"),
    ):
        assert cli.main([*flags, PAIR["text"], *more, "--rows", str(rows)]) == 1
        assert named in capsys.readouterr().err
    assert cli.main(flags) == 1
    assert "nothing" in capsys.readouterr().err
