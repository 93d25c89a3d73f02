"""The admin port speaks HTTP alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.coordinator.admin_port import admin_port


def test_who_asks_for_a_websocket_gets_http_and_is_counted_out_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.admin.server.CONNECTIONS_MAX", 4)
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    with admin_port(f"sqlite:///{tmp_path}/s.sqlite") as admin:
        for _ in range(8):
            assert admin.get("/livez", **upgrade)[::2] == (200, "alive\n")
