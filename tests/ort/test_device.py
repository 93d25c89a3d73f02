"""EdgeClient(backend="ort") in a real federation: every method, restarts, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from edge_client.backends import ort
from edge_client.backends.base import Level
from edge_client.client import EdgeClient
from edge_client.errors import BackboneError, ConfigurationError
from protocol.federation import Adapter, Backbone, Task, TaskKind, Training
from protocol.methods import Hypergradient, PF2LoRA, PFedLoRA
from quantization.artifact import load_artifact, write_manifest
from quantization.errors import ArtifactError
from tests.integration.test_federation import _coordinator, _run_all, _write_data
from tests.integration.test_questions import _write_questions
from tests.ort.cases import CASES, PERSONAL_SEED, rows_of

ROUNDS = 3


def _federation(artifacts: Path, folder: Path, name: str = "federation") -> Path:
    return Path(shutil.copytree(artifacts / name, folder / name)) / "federation.toml"


def _client(address: str, folder: Path, number: int, artifact: Path, **more: Any) -> EdgeClient:
    return EdgeClient(
        address,
        folder / f"{number}.jsonl",
        folder / f"device-{number}",
        backend="ort",
        artifact=artifact,
        seed=number,
        **more,
    )


def test_a_federation_of_two_and_every_method_of_the_client(
    artifacts: Path, tmp_path: Path
) -> None:
    config = _federation(artifacts, tmp_path)
    for number in range(2):
        _write_data(tmp_path / f"{number}.jsonl", 0.25 + number / 2)
    of = [artifacts / f"mixed-{scheme}" for scheme in ("int8", "int4")]
    with _coordinator(config) as address:
        clients = [_client(address, tmp_path, i, artifact) for i, artifact in enumerate(of)]
        _run_all(clients)
        assert {client.worker.state.rounds_done for client in clients} == {ROUNDS}
        assert len({client.worker.trainer.common().digest() for client in clients}) == 1
        personal = [client.worker.trainer.personal() for client in clients]
        for client in clients:
            client.close()
    # Offline and in a new client, what was learned is there, byte for byte.
    with _client("ws://127.0.0.1:9", tmp_path, 0, of[0]) as again:
        found = again.predict(["a fine film", "a dull and tired film that goes on and on"])
        assert [len(one.probabilities) for one in found] == [2, 2]
        assert sum(found[0].probabilities) == pytest.approx(1.0, abs=1e-5)
        for name, array in again.worker.trainer.personal().items():
            assert array.tobytes() == personal[0][name].tobytes()
        losses = {level: again.evaluate(level=level).loss for level in Level}
        assert len(set(losses.values())) == 3
        ranks = again.rank_report()
        assert ranks
        assert all(1 <= report.numerical_rank <= 3 for report in ranks.values())
        whole = again.save_pretrained(tmp_path / "peft")
        assert whole.written == whole.full == again.evaluate()
        small = again.save_pretrained(tmp_path / "auto", rank="auto", energy=0.9)
        assert sum(small.ranks.values()) < sum(whole.ranks.values())
        assert small.written is not None
        assert whole.full == small.full == again.evaluate()  # nothing stays cut here
        tensors = load_file(tmp_path / "auto" / "adapter_model.safetensors")
        layer = "base_model.model." + next(iter(small.ranks))
        product = tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]
        assert np.linalg.matrix_rank(product) == next(iter(small.ranks.values()))
        assert "base_model.model.classifier.weight" in tensors


def test_devices_learn_to_answer_and_are_asked_in_another_process(
    artifacts: Path, tmp_path: Path
) -> None:
    config = _federation(artifacts, tmp_path, "questions")
    for number, place in enumerate(("Oslo", "Cape Town")):
        _write_questions(tmp_path / f"{number}.jsonl", place)
    artifact = artifacts / "answers-none"
    with _coordinator(config) as address:
        clients = [_client(address, tmp_path, i, artifact) for i in range(2)]
        _run_all(clients)
        assert {client.worker.rounds_done for client in clients} == {ROUNDS}
        context = "Later Anna moved to Oslo again. " * 6  # several windows
        asked = [{"question": "Where to?", "context": context}]
        (found,) = clients[0].predict(asked)
        assert context[found.start : found.end] == found.text != ""
        assert 0 < found.probability <= 1
        for client in clients:
            client.close()
    with _client("ws://127.0.0.1:9", tmp_path, 0, artifact) as again:
        assert again.predict(asked) == [found]
    command = [sys.executable, "-m", "edge_client.cli", "evaluate", "--json", "--backend", "ort"]
    command += ["--artifact", str(artifact), "--data", str(tmp_path / "0.jsonl")]
    command += ["--state-dir", str(tmp_path / "device-0")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    levels = [json.loads(line) for line in done.stdout.splitlines() if "level" in line]
    assert [one["rows"] for one in levels] == [2, 2, 2]
    assert levels[2]["loss"] < levels[0]["loss"]


def test_a_device_killed_while_it_trains_comes_back_and_finishes(
    artifacts: Path, tmp_path: Path
) -> None:
    config = _federation(artifacts, tmp_path)
    for number in range(2):
        _write_data(tmp_path / f"{number}.jsonl", 0.5)
    with _coordinator(config) as address:
        other = _client(address, tmp_path, 1, artifacts / "mixed-int4")
        runner = threading.Thread(target=_run_all, args=([other],))
        runner.start()
        command = [sys.executable, "-m", "edge_client.cli", "run", "--coordinator", address]
        command += ["--data", str(tmp_path / "0.jsonl"), "--state-dir", str(tmp_path / "device-0")]
        command += ["--backend", "ort", "--artifact", str(artifacts / "mixed-int8")]
        first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert first.stdout is not None
        assert any(re.search("round 2: training", line) for line in first.stdout)
        first.kill()
        first.communicate()
        second = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert f"trained {ROUNDS} rounds" in second.stdout
        runner.join(120)
    assert not runner.is_alive()
    with _client("ws://127.0.0.1:9", tmp_path, 0, artifacts / "mixed-int8") as client:
        client.evaluate()
        mine = client.worker.trainer.common().digest()
    assert mine == other.worker.trainer.common().digest()
    other.close()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"backend": "tensorflow"}, "backend"),
        ({"backend": "ort"}, "artifact"),
        ({"artifact": "a"}, "artifact"),
        ({"artifact_digest": "sha256:" + "0" * 64}, "artifact"),
        ({"backend": "ort", "artifact": "a", "scheme": "nf4"}, "scheme"),
        ({"backend": "ort", "artifact": "a", "backbone": "b"}, "backbone"),
        ({"backend": "ort", "artifact": "a", "device": "cuda"}, "device"),
        ({"backend": "ort", "artifact": "a", "compute_dtype": "bfloat16"}, "compute_dtype"),
    ],
    ids=str,
)
def test_arguments_that_do_not_go_together_are_refused_by_name(
    tmp_path: Path, arguments: dict[str, Any], field: str
) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{field}: .*; (use |leave it out)"):
        EdgeClient("ws://127.0.0.1:9", [{"text": "a"}], tmp_path / "state", **arguments)
    assert not (tmp_path / "state").exists()


def test_a_method_that_projects_a_shared_adapter_is_refused(artifacts: Path) -> None:
    settings = replace(
        CASES["minilm"].settings,
        backbone=None,
        adapter=Adapter(),
        training=Training(),
        algorithm=PFedLoRA(),
    )
    with pytest.raises(ConfigurationError, match=r"backend: ort does not do pfedlora.*use torch"):
        ort.load_trainer(settings, artifact=artifacts / "minilm-none", personal_seed=1)


def test_an_artifact_of_another_federation_is_refused(artifacts: Path) -> None:
    manifest = load_artifact(artifacts / "minilm-none").manifest
    settings = CASES["minilm"].settings
    backbone = Backbone("package:", manifest.fingerprint)
    settings = replace(settings, backbone=backbone)
    folder = artifacts / "minilm-none"
    assert ort.load_trainer(settings, artifact=folder, personal_seed=PERSONAL_SEED)
    three = replace(settings.task, labels=("a", "b", "c"))
    for changes, what in (
        ({"backbone": CASES["minilm"].settings.backbone}, "its backbone: sha256"),
        ({"task": Task(TaskKind.CAUSAL_LM)}, "its task: sequence-classification"),
        ({"task": three}, "its number of labels: 2; the federation's: 3"),
        ({"task": replace(settings.task, max_length=513)}, "max_length: .* 513 tokens; use 512"),
        ({"adapter": replace(settings.adapter, target_modules="query-value")}, "target modules"),
        ({"algorithm": PF2LoRA(Hypergradient.EXACT)}, "hypergradient: exact .* secant"),
    ):
        with pytest.raises(ConfigurationError, match=what):
            ort.load_trainer(
                replace(settings, **changes), artifact=folder, personal_seed=PERSONAL_SEED
            )


def test_an_artifact_whose_tokenizer_was_changed_is_refused(
    artifacts: Path, tmp_path: Path
) -> None:
    """Also if its manifest was made to say that all is well: the tokenizer itself is asked."""
    config = _federation(artifacts, tmp_path)
    _write_data(tmp_path / "0.jsonl", 0.5)
    folder = Path(shutil.copytree(artifacts / "mixed-int8", tmp_path / "artifact"))
    table = json.loads((folder / "tokenizer.json").read_text())
    table["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(table))
    write_manifest(folder, load_artifact(artifacts / "mixed-int8").manifest)
    with (
        _coordinator(config) as address,
        _client(address, tmp_path, 0, folder) as client,
        pytest.raises(ConfigurationError, match=r"its backbone: .*: the tokenizer differs; use"),
    ):
        client.run()


def test_an_artifact_that_is_not_the_pinned_one_is_refused(artifacts: Path, tmp_path: Path) -> None:
    config = _federation(artifacts, tmp_path)
    _write_data(tmp_path / "0.jsonl", 0.5)
    pinned = load_artifact(artifacts / "mixed-int8").digest
    with (
        _coordinator(config) as address,
        _client(address, tmp_path, 0, artifacts / "mixed-int4", artifact_digest=pinned) as client,
        pytest.raises(BackboneError, match="another artifact"),
    ):
        client.run()


def test_a_damaged_artifact_is_refused_before_it_is_loaded(artifacts: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifacts / "minilm-int8", tmp_path / "artifact"))
    weights = bytearray((folder / "weights.bin").read_bytes())
    weights[len(weights) // 2] ^= 1
    (folder / "weights.bin").write_bytes(weights)
    with pytest.raises(ArtifactError, match=r"weights\.bin: its digest"):
        ort.load_trainer(CASES["minilm"].settings, artifact=folder, personal_seed=PERSONAL_SEED)


def test_the_same_seed_gives_the_same_bytes_and_a_cut_run_goes_on(artifacts: Path) -> None:
    case = CASES["minilm"]

    def trainer() -> ort.OrtTrainer:
        artifact = load_artifact(artifacts / "minilm-int8")
        return ort.OrtTrainer(
            case.settings, artifact, ort.tokenizer_of(artifact), personal_seed=PERSONAL_SEED
        )

    whole, first, second = trainer(), trainer(), trainer()
    rows = whole.encode(rows_of(case))
    for step in range(2):
        whole.train(rows, step, 1)
    first.train(rows, 0, 1)
    second.set_common(first.common())
    second.set_personal(first.personal())
    second.set_optimizer_state(first.optimizer_state())
    second.train(rows, 1, 1)
    assert second.common().digest() == whole.common().digest()
