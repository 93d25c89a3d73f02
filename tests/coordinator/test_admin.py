"""The admin port: what it answers, to whom, and what it refuses."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import socket
import ssl
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from coordinator import cli, config
from coordinator.admin.server import AdminServer
from coordinator.admin.settings import AdminSettings, read_token
from coordinator.errors import AddressError, ConfigurationError
from coordinator.events import CloseRound, OpenRound
from coordinator.happenings import Acted, Called, Connected, Disconnected, Heard, Said
from coordinator.store import views
from coordinator.store.devices import DeviceRecord, DeviceStatus
from coordinator.store.sql import SqlStore
from protocol.errors import ErrorCode
from protocol.messages import Goodbye, Joined, Receipt, ReceiptStatus, Refusal
from tests.coordinator.admin_port import AdminPort, admin_port
from tests.coordinator.busy_store import busy_settings, fill_store
from tests.coordinator.federation_file import write_federation

TOKEN = "a token of some length"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("admin") / "s.sqlite"
    fill_store(path, devices=40, rounds_done=30).close()
    return f"sqlite:///{path}"


@pytest.fixture(scope="module")
def admin(url: str) -> Iterator[AdminPort]:
    with admin_port(url) as port:
        yield port


def _json(admin: AdminPort, path: str, **query: object) -> dict[str, Any]:
    status, headers, body = admin.get(f"{path}?{urlencode(query)}")
    assert status == 200, body
    assert headers["content-type"] == "application/json"
    return dict(json.loads(body))


def test_federations_tell_where_they_stand(admin: AdminPort) -> None:
    (found,) = _json(admin, "/api/federations")["federations"]
    assert (found["name"], found["rounds_done"], found["rounds"]) == ("reviews", 30, 130)
    assert sum(found["devices"].values()) == 40
    assert found["open_round"]["round"] == 31
    assert (found["open_round"]["reports"], found["open_round"]["cohort"]) == (13, 24)
    assert found["open_round"]["goal"] == 20


def test_rounds_come_in_bounded_pages_oldest_first(admin: AdminPort) -> None:
    rounds = _json(admin, "/api/rounds", federation="reviews")["rounds"]
    assert [one["round"] for one in rounds] == list(range(1, 31))
    assert set(rounds[0]["metrics"]) == {"loss", "accuracy_common", "accuracy_personal"}
    assert rounds[0]["metrics"]["loss"]["low"] <= rounds[0]["metrics"]["loss"]["high"]
    page = _json(admin, "/api/rounds", federation="reviews", limit=5, before=11)["rounds"]
    assert [one["round"] for one in page] == [6, 7, 8, 9, 10]


def test_devices_come_in_pages_ordered_and_filtered(admin: AdminPort) -> None:
    page = _json(admin, "/api/devices", federation="reviews", limit=10, order="device")
    assert page["total"] == 40
    names = [one["device"] for one in page["devices"]]
    assert names == sorted(names, reverse=True)
    rest = _json(admin, "/api/devices", federation="reviews", limit=1000, offset=10)
    assert len(rest["devices"]) == 30
    (one,) = _json(admin, "/api/devices", federation="reviews", contains=names[0])["devices"]
    assert one["device"] == names[0]
    assert not _json(admin, "/api/devices", federation="reviews", contains="%")["devices"]
    away = _json(admin, "/api/devices", federation="reviews", state="away")
    assert {one["state"] for one in away["devices"]} == {"away"}
    told = _json(
        admin, "/api/devices", federation="reviews", order="accuracy_personal", direction="up"
    )["devices"]
    values = [one["accuracy_personal"] for one in told]
    known = [value for value in values if value is not None]
    assert known == sorted(known)
    assert values == known + [None] * (len(values) - len(known))  # the unknown come last


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/api/rounds", "federation: is missing"),
        ("/api/rounds?federation=reviews&limit=0", "limit: expected 1 to 1000, got '0'"),
        ("/api/rounds?federation=reviews&limit=1001", "limit: expected 1 to 1000"),
        ("/api/rounds?federation=reviews&before=x", "before: expected 1 to"),
        ("/api/rounds?federation=reviews&last=3", "last: is unknown"),
        ("/api/devices?federation=reviews&order=key", "order: expected one of"),
        ("/api/devices?federation=reviews&state=lost", "state: expected one of"),
        ("/api/devices?federation=reviews&direction=left", "direction: expected one of"),
        ("/api/devices?federation=reviews&offset=-1", "offset: expected 0 to"),
        (f"/api/devices?federation=reviews&offset={'0' * 20}{'9' * 30}", "offset: expected 0 to"),
        (f"/api/devices?federation=reviews&offset={'9' * 5000}", "offset: expected 0 to"),
        ("/api/devices?federation=reviews&limit=ten", "limit: expected 1 to 1000, got 'ten'"),
        ("/api/devices?federation=reviews&limit=1&limit=2", "limit: is given more than once"),
        (f"/api/devices?federation=reviews&contains={'a' * 65}", "contains: expected 64 char"),
        ("/api/federations?name=reviews", "name: is unknown; there are none here"),
        ("/api/live?federation=reviews", "federation: is unknown; there are none here"),
    ],
)
def test_a_wrong_parameter_is_named(admin: AdminPort, path: str, problem: str) -> None:
    status, _, body = admin.get(path)
    assert status == 400
    assert json.loads(body)["error"].startswith(problem)


@pytest.mark.parametrize("path", ["/api/rounds", "/api/devices"])
@pytest.mark.parametrize("name", ["no such", "", "a" * 1000, "review%"])
def test_an_unknown_federation_is_404_and_the_known_ones_are_named(
    admin: AdminPort, path: str, name: str
) -> None:
    status, _, body = admin.get(f"{path}?{urlencode({'federation': name})}")
    assert status == 404
    assert json.loads(body) == {"error": f"federation: there is no {name[:40]!r}, but ['reviews']"}


def test_what_is_not_there_is_404_and_nothing_can_be_written(admin: AdminPort) -> None:
    assert admin.get("/api/secrets")[0] == 404
    assert admin.get("/page/../app.py")[0] == 404
    connection = http.client.HTTPConnection("127.0.0.1", admin.port, timeout=30)
    for method in ("POST", "PUT", "DELETE"):
        connection.request(method, "/api/federations")
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 405
    connection.close()


def test_the_page_and_its_parts_are_served_under_a_strict_policy(admin: AdminPort) -> None:
    for path, kind in (
        ("/", "text/html"),
        ("/page/style.css", "text/css"),
        ("/page/dashboard.js", "text/javascript"),
        ("/page/chart.js", "text/javascript"),
        ("/page/format.js", "text/javascript"),
        ("/page/icon.svg", "image/svg+xml"),
    ):
        status, headers, body = admin.get(path)
        assert status == 200
        assert headers["content-type"].startswith(kind)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        outside = body.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in outside
        assert "https://" not in outside


def test_events_begin_with_where_the_federations_stand(admin: AdminPort) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", admin.port, timeout=30)
    connection.request("GET", "/api/live")
    answer = connection.getresponse()
    assert answer.headers["content-type"].startswith("text/event-stream")
    line = answer.readline().decode()
    assert line.startswith("data: ")
    assert (
        json.loads(line.removeprefix("data: ")) == (_json(admin, "/api/federations")["federations"])
    )
    connection.close()


def test_who_connects_and_asks_nothing_does_not_keep_health_checks_out(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.admin.server.REQUEST_TIMEOUT_S", 0.2)
    monkeypatch.setattr("coordinator.admin.server.CONNECTIONS_MAX", 8)
    with admin_port(url) as admin, contextlib.ExitStack() as opened:
        listening = http.client.HTTPConnection("127.0.0.1", admin.port, timeout=30)
        listening.request("GET", "/api/live")
        events = listening.getresponse()
        silent = [
            opened.enter_context(socket.create_connection(("127.0.0.1", admin.port), 30))
            for _ in range(8)
        ]
        for one in silent[::2]:
            one.sendall(b"GET /livez HT")
        assert [one.recv(1) for one in silent] == [b""] * 8
        assert admin.get("/livez")[0] == 200
        assert not events.isclosed()
        assert events.readline().startswith(b"data: ")
        listening.close()


def test_health_tells_what_is_wrong(url: str) -> None:
    problems: list[str] = []
    with admin_port(url, problem=lambda: problems[0] if problems else None) as admin:
        assert admin.get("/livez")[::2] == (200, "alive\n")
        assert admin.get("/readyz")[::2] == (200, "ready\n")
        problems.append("the coordinator is stopping")
        assert admin.get("/livez")[0] == 200
        assert admin.get("/readyz")[::2] == (503, "the coordinator is stopping\n")


def test_a_store_that_is_gone_is_unready_and_unavailable(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    with admin_port(f"sqlite:///{path}") as admin:
        path.unlink()
        status, _, body = admin.get("/readyz")
        assert (status, "the store does not answer" in body) == (503, True)
        status, _, body = admin.get("/api/federations")
        assert status == 503
        assert "no such file" in json.loads(body)["error"]


def test_metrics_follow_what_happens(url: str) -> None:
    with admin_port(url) as admin:
        settings = busy_settings(30)
        joined = Joined(settings)
        accepted = Receipt("a", ReceiptStatus.ACCEPTED, "")
        admin.tell(
            Connected(),
            Connected(),
            Said("reviews", "d1", joined, 100),
            Heard("reviews", "d1", Goodbye(""), 7),
            Acted("reviews", OpenRound(1, 1, 9.0, (("d1", "a"),)), 0.01),
            Said("reviews", "d1", accepted, 10),
            Acted("reviews", CloseRound(1, 1, True, 3), 0.02),
            Said("", "", Refusal(ErrorCode.TIMEOUT, "", 1.0), 5),
            Disconnected("", ""),
            Called("keep_report", 0.003),
        )
        status, headers, body = admin.get("/metrics")
        assert status == 200
        assert headers["content-type"].startswith("text/plain")
        lines = body.splitlines()
        for line in (
            'pf2lora_rounds_total{federation="reviews",outcome="aggregated"} 1.0',
            'pf2lora_reports_total{federation="reviews",status="accepted"} 1.0',
            'pf2lora_message_bytes_total{direction="sent"} 115.0',
            'pf2lora_message_bytes_total{direction="received"} 7.0',
            'pf2lora_messages_total{direction="sent",type="Joined"} 1.0',
            'pf2lora_refusals_total{code="timeout"} 1.0',
            "pf2lora_connections 1.0",
            "pf2lora_connections_taken_total 2.0",
            'pf2lora_devices{federation="reviews",state="waiting"} 1.0',
            'pf2lora_action_seconds_count{action="OpenRound"} 1.0',
            'pf2lora_store_seconds_count{call="keep_report"} 1.0',
            'pf2lora_round_seconds_count{federation="reviews"} 1.0',
        ):
            assert line in lines
        assert any(line.startswith("process_resident_memory_bytes ") for line in lines)
        assert any(line.startswith("pf2lora_event_loop_lag_seconds_count ") for line in lines)


def test_with_a_token_nothing_but_health_is_told_without_it(url: str) -> None:
    with admin_port(url, TOKEN) as admin:
        for path in ("/", "/metrics", "/api/federations", "/api/live", "/page/style.css"):
            status, headers, body = admin.get(path)
            assert status == 401
            assert headers["www-authenticate"].startswith("Basic ")
            assert "reviews" not in body
        assert admin.get("/livez")[0] == admin.get("/readyz")[0] == 200
        password = base64.b64encode(f"anyone:{TOKEN}".encode()).decode()
        for good in (f"Bearer {TOKEN}", f"bearer {TOKEN}", f"Basic {password}"):
            assert admin.get("/api/federations", Authorization=good)[0] == 200
        for wrong in (f"Bearer {TOKEN}x", "Bearer", f"Basic {TOKEN}", "Basic !", f"Token {TOKEN}"):
            assert admin.get("/api/federations", Authorization=wrong)[0] == 401
        # With it the port may go by any name.
        assert admin.get("/", Host="pf2lora.example", Authorization=f"Bearer {TOKEN}")[0] == 200


def test_without_a_token_only_local_names_are_answered(admin: AdminPort) -> None:
    for local in ("localhost:1", "127.0.0.1", "[::1]:8766"):
        assert admin.get("/api/federations", Host=local)[0] == 200
    for other in ("pf2lora.example", "127.0.0.1.example:80", "[::1", "10.0.0.7"):
        assert admin.get("/api/federations", Host=other)[0] == 403


def test_a_token_is_needed_off_loopback_and_must_be_long(tmp_path: Path) -> None:
    everywhere = AdminSettings(host="0.0.0.0")
    with pytest.raises(ConfigurationError, match=r"admin\.host: 0\.0\.0\.0 can be reached"):
        read_token(everywhere, "")
    assert read_token(everywhere, TOKEN) == TOKEN
    assert read_token(AdminSettings(), "") == ""
    with pytest.raises(ConfigurationError, match="PF2LORA_ADMIN_TOKEN: holds no token: one line"):
        read_token(everywhere, "short")
    file = tmp_path / "token"
    from_file = AdminSettings(token_file=str(file))
    with pytest.raises(ConfigurationError, match=r"admin\.token_file: .*token"):
        read_token(from_file, "")
    file.write_text(TOKEN + "\n")
    assert read_token(from_file, "another token there") == TOKEN
    for wrong in ("\n", f"{TOKEN}\n{TOKEN}\n"):  # of two lines neither is what a header says
        file.write_text(wrong)
        with pytest.raises(ConfigurationError, match=r"admin\.token_file: holds no token"):
            read_token(from_file, TOKEN)


def test_off_loopback_the_token_travels_by_tls_unless_the_operator_says_so(
    tmp_path: Path,
) -> None:
    path = write_federation(tmp_path)
    environ = {"PF2LORA_ADMIN_TOKEN": TOKEN}
    everywhere = {"admin.host": "0.0.0.0"}
    with pytest.raises(ConfigurationError, match=r"admin\.host: .* travel in the clear"):
        config.load(path, everywhere, environ)
    insecure = config.load(path, {**everywhere, "server.insecure": "true"}, environ)
    assert insecure.admin_certificate == ("", "")
    files = {"server.certificate": "c.pem", "server.key": "k.pem"}
    safe = config.load(path, {**everywhere, **files}, environ)
    assert safe.admin_certificate == (str(tmp_path / "c.pem"), str(tmp_path / "k.pem"))
    assert config.load(path, files, environ).admin_certificate == ("", "")  # on loopback


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tls = tmp_path_factory.mktemp("tls")
    assert cli.main(["certs", "--out", str(tls), "--host", "127.0.0.1"]) == 0
    return tls


def test_who_sends_no_http_gets_an_answer_and_no_line_of_the_log(
    admin: AdminPort, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_connection(("127.0.0.1", admin.port), 30) as other:
        other.sendall(b"\x16\x03\x01 is no request\r\n\r\n")
        assert other.recv(100).startswith(b"HTTP/1.1 400 ")
    assert caplog.messages == []


@pytest.mark.parametrize("secure", [False, True])
def test_connections_that_say_nothing_are_dropped_beyond_a_number(
    url: str, tls: Path, monkeypatch: pytest.MonkeyPatch, secure: bool
) -> None:
    monkeypatch.setattr("coordinator.admin.server.REQUEST_TIMEOUT_S", 3600.0)
    monkeypatch.setattr("coordinator.admin.server.CONNECTIONS_MAX", 2)
    certificate = (str(tls / "server.pem"), str(tls / "server.key")) if secure else ("", "")
    with admin_port(url, certificate=certificate) as admin, contextlib.ExitStack() as opened:
        *_, last = [
            opened.enter_context(socket.create_connection(("127.0.0.1", admin.port), 30))
            for _ in range(5)
        ]
        assert last.recv(1) == b""


def test_with_a_certificate_the_admin_port_speaks_tls(url: str, tls: Path) -> None:
    certificate = (str(tls / "server.pem"), str(tls / "server.key"))
    with admin_port(url, certificate=certificate) as admin:
        assert str(admin.watch.address).startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=str(tls / "ca.pem"))
        with urllib.request.urlopen(f"{admin.watch.address}livez", context=trusting) as answer:
            assert answer.read() == b"alive\n"


def test_a_device_that_was_shut_out_is_shown_so(tmp_path: Path) -> None:
    store_url = f"sqlite:///{tmp_path}/s.sqlite"
    with contextlib.closing(fill_store(tmp_path / "s.sqlite", 30, 1)) as store:
        with store.database.begin() as db:
            name = views.some_devices(db, "reviews", limit=1).devices[0].device
        store.devices.add(DeviceRecord(name, bytes(32), DeviceStatus.REVOKED, 0.0))
    with admin_port(store_url) as admin:
        (found,) = _json(admin, "/api/devices", federation="reviews", contains=name)["devices"]
        assert found["standing"] == "revoked"
        everyone = _json(admin, "/api/devices", federation="reviews")["devices"]
        assert sum(one["standing"] is None for one in everyone) == 29


def test_the_admin_port_is_the_one_after_the_server_s_unless_said(tmp_path: Path) -> None:
    path = write_federation(tmp_path)
    assert config.load(path, {"server.port": "9000"}, {}).admin.port == 9001
    assert config.load(path, {"server.port": "0"}, {}).admin.port == 0
    assert config.load(path, {"admin.port": "7000"}, {}).admin.port == 7000
    assert config.load(path, {}, {"PF2LORA_ADMIN_TOKEN": TOKEN}).admin_token == TOKEN
    (tmp_path / "token").write_text(TOKEN)
    assert config.load(path, {"admin.token_file": "token"}, {}).admin_token == TOKEN


def test_an_address_in_use_is_named() -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            AddressError, match=rf"admin\.host, admin\.port: .*:{port}: Add.*another port$"
        ):
            AdminServer(lambda *_: None, "127.0.0.1", port)  # type: ignore[arg-type]


def test_a_new_store_has_nothing_to_show(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.sqlite"
    SqlStore(url).close()
    with admin_port(url) as admin:
        assert _json(admin, "/api/federations") == {"federations": []}
