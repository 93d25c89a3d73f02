"""One federation whose devices have different backbones, over real sockets, from rows to PEFT."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client import cli
from edge_client.backends.base import Level
from edge_client.backends.torch_backend import load_trainer
from edge_client.client import EdgeClient
from edge_client.errors import ConfigurationError, StateError
from edge_client.private_store import PrivateStore
from edge_client.shared_adapter import shared_shapes
from protocol.federation import Adapter, FederationSettings, Task, TaskKind, Training
from protocol.methods import PFedLoRA
from protocol.tensors import NamedTensors
from tests.integration.device import ROWS, SETTINGS, Device
from tests.integration.test_federation import (
    MINILM,
    _coordinator,
    _run_all,
    _write_config,
    _write_data,
)
from tests.quantization.tiny import write_bert

SHARED = set(shared_shapes(2, 24, 4))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_bert(tmp_path_factory.mktemp("narrow"), width=32, blocks=3))


def _write(folder: Path, **rounds: Any) -> Path:
    path = _write_config(folder, **rounds)
    text = re.sub(r"\[backbone\]\n.*\n", "", path.read_text())
    path.write_text(text + '[algorithm]\nname = "pfedlora"\nshared_width = 24\n')
    assert cli.main(["prepare", str(path)]) == 0
    return path


def _state(client: EdgeClient) -> Any:
    return client.worker.state


def test_devices_of_two_backbones_share_one_adapter_through_restarts_of_both_sides(
    tmp_path: Path, narrow: str
) -> None:
    path = _write(tmp_path, count=3, cohort=2, minimum_reports=2)
    backbones, schemes = {"a": MINILM, "b": narrow}, {"a": "nf4", "b": "none"}
    data = {name: _write_data(tmp_path / f"{name}.jsonl", 0.5) for name in backbones}
    reported = threading.Event()

    def client(name: str, address: str, backbone: str | None = None) -> EdgeClient:
        return EdgeClient(
            address,
            data[name],
            tmp_path / name,
            backbone=backbone or backbones[name],
            scheme=schemes[name],
            progress=lambda line: reported.set() if name == "a" and "accepted" in line else None,
        )

    with _coordinator(path) as address:
        clients = [client(name, address) for name in backbones]
        runner = threading.Thread(target=_run_all, args=(clients,))
        runner.start()
        assert reported.wait(120)
        for one in clients:
            one.stop()
        runner.join(120)
    assert not runner.is_alive()
    assert 0 < clients[0].worker.rounds_done < 3
    for one in clients:
        one.close()
    # A state is its backbone's.
    with (
        client("b", "localhost:1", MINILM) as other,
        pytest.raises(StateError, match=r"not of sha256:.*: the weights differ; give that"),
    ):
        other.evaluate()
    with _coordinator(path) as address:
        clients = [client(name, address) for name in backbones]
        _run_all(clients)
    states = [_state(one) for one in clients]
    assert [state.rounds_done for state in states] == [3, 3]
    assert states[0].fingerprint != states[1].fingerprint
    assert states[0].groups["common"].keys() == states[1].groups["common"].keys() == SHARED
    for name in SHARED:
        finals = [state.groups["common"][name] for state in states]
        assert finals[0].tobytes() == finals[1].tobytes()
        assert finals[0].any()
    widths = [{a.shape for n, a in s.groups["personal"].items() if n[-2:] == ".P"} for s in states]
    assert widths == [{(24, 384)}, {(24, 32)}]
    for one, name in zip(clients, backbones, strict=True):
        assert len(one.predict(["a fine film"])) == 1
        levels = {level: one.evaluate(level=level).loss for level in Level}
        assert levels[Level.COMMON] != levels[Level.PERSONAL]
        export = one.save_pretrained(tmp_path / f"peft-{name}")
        assert export.full == export.written
        text = (tmp_path / f"peft-{name}" / "adapter_config.json").read_text()
        assert backbones[name] in text
        one.close()


def test_a_device_that_brings_no_backbone_is_told_what_to_bring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, data = _write(tmp_path, count=1, cohort=1), _write_data(tmp_path / "d.jsonl", 0.5)
    with _coordinator(path) as address:
        flags = ["--data", str(data), "--state-dir", str(tmp_path / "s")]
        assert cli.main(["run", "--coordinator", address, *flags]) == 1
        said = capsys.readouterr().err
        assert "backbone: is not given, and in 'test' each device has its own" in said
        with (
            EdgeClient(address, data, tmp_path / "s", backend="ort", artifact=tmp_path) as device,
            pytest.raises(ConfigurationError, match=r"backend: ort does not do pfedlora.*torch"),
        ):
            device.run()


class _OwnDevice(Device):
    """A device of pfedlora, without a coordinator."""

    def _trainer(self, settings: FederationSettings) -> Any:
        return load_trainer(settings, backbone=MINILM, scheme="none", device="cpu", personal_seed=1)


def test_a_device_killed_between_rounds_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    settings = replace(
        SETTINGS,
        backbone=None,
        task=Task(TaskKind.SEQUENCE_CLASSIFICATION, ("bad", "good"), 8),
        adapter=Adapter(rank=2, personal_rank=1),
        training=Training(local_steps=3, batch_size=4),
        algorithm=PFedLoRA(shared_width=24),
    )
    whole = _OwnDevice(tmp_path / "whole", settings, rows=ROWS)
    cut = _OwnDevice(tmp_path / "cut", settings, rows=ROWS)
    bases: list[NamedTensors] = []
    for number in (1, 2, 3):
        base = bases[-1] if bases else whole.worker.trainer.common()
        update = whole.round(number, base)
        assert np.isfinite(update.flat()).all()
        assert cut.round(number, base).digest() == update.digest()
        cut = _OwnDevice(tmp_path / "cut", settings, rows=ROWS)  # as after a kill
        flat = base.flat() + update.flat()
        bases.append(NamedTensors.from_flat(base.specs, flat, base.specs[0].dtype))
    assert cut.personal == whole.personal
    state = PrivateStore(tmp_path / "cut").load()
    assert state is not None
    assert {"upper.m", "lower.m"} <= state.groups["optimizer"].keys()
