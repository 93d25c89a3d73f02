"""The comparison of devices with different backbones has different backbones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from benchmarks import different_models
from benchmarks.different_models import METHODS, MINILM, cut, run_cell
from benchmarks.simulation import SimulatedDevice
from benchmarks.tasks import DATA, DeviceRows
from edge_client.data import Example
from edge_client.session import Offer
from quantization.fingerprint import fingerprint, resolve_backbone


def test_a_cut_model_has_every_second_block_of_the_whole(tmp_path: Path) -> None:
    whole = load_file(resolve_backbone(MINILM) / "model.safetensors")
    short = load_file(cut(tmp_path) / "model.safetensors")
    name = "encoder.layer.{}.attention.self.query.weight"
    for block in range(3):
        assert (short[name.format(block)] == whole[name.format(2 * block)]).all()
    assert name.format(3) not in short
    assert fingerprint(tmp_path) != fingerprint(resolve_backbone(MINILM))


@pytest.mark.skipif(not DATA.exists(), reason=f"no data at {DATA}")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mix", different_models.MIXES)
def test_a_cell_is_a_federation_of_two_backbones(
    monkeypatch: pytest.MonkeyPatch, mix: str, method: str
) -> None:
    rows = [Example(f"a film {n}", None, n % 2) for n in range(8)]
    monkeypatch.setattr(different_models, "deal", lambda *_: [DeviceRows(rows, rows)] * 2)
    told: dict[str, int] = {}
    offer = SimulatedDevice.offer

    def listen(self: Any) -> Offer:
        told[self.name] = len(self.trainer.oracle.personal)
        return offer(self)

    monkeypatch.setattr(SimulatedDevice, "offer", listen)
    cell = {"mix": mix, "method": method, "set": ["training.local_steps=2"], "seed": 1}
    cell |= {"split": "dev", "rounds": 1, "learning_rate": 1e-3}
    record = run_cell(cell)
    assert record["cell"] == cell
    assert len(record["personal"]) == len(record["common"]) == 2
    assert len(set(told.values())) == 2  # models of different sizes
    # What is shared is of one size, whatever the model: 4 slots of 2 x 8 x 64 numbers, and talk.
    sent_bytes = record["sent_bytes"]
    assert 16384 < sent_bytes < 20000 if method == "pfedlora" else sent_bytes < 2000
