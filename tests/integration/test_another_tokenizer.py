"""A device that would train on other ids than the federation's is refused, and told why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from edge_client.client import EdgeClient
from edge_client.errors import RefusedError, StateError
from quantization.fingerprint import fingerprint
from quantization.folder_manifest import file_facts, read_manifest, write_manifest
from quantization.quantize import quantize
from tests.integration.test_federation import _coordinator, _run_all, _write_config, _write_data
from tests.quantization.forms import OTHER, SAME, as_vocabulary, cased


def _client(address: str, folder: Path, backbone: Path, scheme: str = "none") -> EdgeClient:
    data = _write_data(folder / "data.jsonl", 0.5)
    return EdgeClient(address, data, folder / "state", backbone=str(backbone), scheme=scheme)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> object:
    folder = tmp_path_factory.mktemp("federation")
    with _coordinator(_write_config(folder, count=1, cohort=2)) as found:
        yield found


@pytest.mark.parametrize("name", OTHER)
def test_equal_weights_with_another_tokenizer_are_refused(
    address: str, tmp_path: Path, name: str
) -> None:
    with (
        _client(address, tmp_path, OTHER[name](tmp_path / "model")) as client,
        pytest.raises(RefusedError, match=r"the federation's is sha256:\w{64}: the tokenizer diff"),
    ):
        client.run()
    assert client.worker.rounds_done == 0


def test_an_equal_tokenizer_with_other_weights_is_refused(address: str, tmp_path: Path) -> None:
    path = as_vocabulary(tmp_path / "model") / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    save_file(tensors | {"pooler.dense.bias": tensors["pooler.dense.bias"] + 1}, path)
    with (
        _client(address, tmp_path, path.parent) as client,
        pytest.raises(RefusedError, match=r": the weights differ$"),
    ):
        client.run()


def test_a_quantised_folder_whose_tokenizer_was_changed_is_refused(
    address: str, tmp_path: Path
) -> None:
    """Also if its manifest was made to say that all is well: the tokenizer itself is asked."""
    folder = tmp_path / "quantized"
    quantize(str(as_vocabulary(tmp_path / "model")), "int8", folder)
    config = cased(tmp_path / "cased") / "tokenizer_config.json"
    (folder / config.name).write_bytes(config.read_bytes())
    manifest = read_manifest(folder)
    texts = {**manifest.texts, config.name: file_facts(config)}
    write_manifest(folder, replace(manifest, texts=texts))
    assert fingerprint(folder) == fingerprint(tmp_path / "cased")
    with (
        _client(address, tmp_path, folder, "int8") as client,
        pytest.raises(RefusedError, match="the tokenizer differs"),
    ):
        client.run()


def test_one_tokenizer_in_two_forms_trains_together(tmp_path: Path) -> None:
    config = _write_config(tmp_path, count=1, cohort=2)
    with _coordinator(config) as address:
        clients = []
        for name, write in SAME.items():
            (tmp_path / name).mkdir()
            model = write(tmp_path / name / "model")
            clients.append(_client(address, tmp_path / name, model))
        _run_all(clients)
        assert [client.worker.rounds_done for client in clients] == [1, 1]
        for client in clients:
            client.close()
    # What was learned is not looked at with another tokenizer either.
    other = cased(tmp_path / "cased")
    with (
        _client("localhost:1", tmp_path / "json", other) as client,
        pytest.raises(StateError, match=r"not of sha256:.*: the tokenizer differs; give that"),
    ):
        client.evaluate()
