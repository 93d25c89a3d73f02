"""A real daemon with real devices, watched over its admin port while it runs and after."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any, cast

import pytest

from coordinator import cli
from edge_client.client import EdgeClient
from edge_client.transport import websocket_dial
from protocol.link import LinkClosedError
from tests.integration.test_federation import _run_all, _write_config, _write_data


def _ports(log: Any) -> tuple[int, int]:
    """The device port and the admin port, as the daemon tells them."""
    found = {}
    for line in log:
        for word in ("listening on ", "dashboard at http://"):
            if word in line:
                found[word] = int(line.split(word)[1].strip().rstrip("/").rsplit(":", 1)[1])
        if len(found) == 2:
            return found["listening on "], found["dashboard at http://"]
    raise AssertionError("the daemon ended without telling its ports")


def _read(port: int, path: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        return json.load(answer)


def test_a_federation_is_watched_and_only_devices_that_choose_to_tell_do(
    tmp_path: Path, capsys: Any
) -> None:
    path = _write_config(tmp_path)
    data = [_write_data(tmp_path / f"{i}.jsonl", 0.25 + i / 2) for i in range(2)]
    command = [sys.executable, "-m", "coordinator.cli", "serve", "--config", str(path)]
    command += ["--port", "0", "--admin-enabled", "true", "--log-format", "json"]
    daemon = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert daemon.stderr is not None
    port, admin = _ports(json.loads(line)["message"] for line in daemon.stderr)
    with pytest.raises(LinkClosedError, match="HTTP 200; is this the coordinator's own port"):
        asyncio.run(cast(Any, websocket_dial(f"127.0.0.1:{admin}")()))
    clients = [
        EdgeClient(
            f"ws://127.0.0.1:{port}",
            file,
            tmp_path / file.stem,
            scheme="none",
            seed=i,
            tell_accuracy=i == 0,
        )
        for i, file in enumerate(data)
    ]
    _run_all(clients)
    with urllib.request.urlopen(f"http://127.0.0.1:{admin}/metrics") as answer:
        metrics = answer.read().decode()
    assert 'pf2lora_reports_total{federation="test",status="accepted"} 4.0' in metrics
    assert 'pf2lora_rounds_total{federation="test",outcome="aggregated"} 2.0' in metrics
    daemon.send_signal(signal.SIGTERM)
    log = [json.loads(line) for line in daemon.communicate()[1].splitlines()]
    assert daemon.returncode == 0
    reports = [line for line in log if "report of" in line["message"]]
    names = {client.device for client in clients}
    assert {(line["federation"], line["device"]) for line in reports} == {
        ("test", n) for n in names
    }

    # What was seen is in the store: another coordinator on it shows the same.
    daemon = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert daemon.stderr is not None
    port, admin = _ports(json.loads(line)["message"] for line in daemon.stderr)
    found = {one["device"]: one for one in _read(admin, "/api/devices?federation=test")["devices"]}
    rounds = _read(admin, "/api/rounds?federation=test")["rounds"]
    daemon.send_signal(signal.SIGTERM)
    daemon.communicate()
    telling, silent = (found[client.device] for client in clients)
    held_out = len(clients[0].worker.held_out_rows)
    right = telling["accuracy_personal"] * held_out
    assert abs(right - round(right)) < 1e-6  # a share of the held-out rows
    assert 0 <= telling["accuracy_common"] <= 1
    assert 1 <= telling["rank_min"] <= telling["rank_max"] <= 3
    assert silent["accuracy_personal"] is silent["accuracy_common"] is silent["rank_max"] is None
    for one, client in zip((telling, silent), clients, strict=True):
        assert (one["state"], one["kept"], one["round"]) == ("finished", 2, 2)
        # All but the greeting, which came before the device had a name.
        assert 0 < client._traffic.sent_bytes - one["sent_bytes"] < 200
        assert 0 < client._traffic.received_bytes - one["received_bytes"] < 200
        assert one["examples"] == len(client.worker.training_rows)
        assert one["loss"] > 0
    assert [one["metrics"]["accuracy_common"]["devices"] for one in rounds] == [1, 1]
    assert [one["metrics"]["loss"]["devices"] for one in rounds] == [2, 2]
    for client in clients:
        client.close()
    assert cli.main(["status", "--store", f"sqlite:///{tmp_path}/pf2lora.sqlite"]) == 0
    assert "all are done" in capsys.readouterr().out
