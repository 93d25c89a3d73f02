"""Who can reach the coordinator: TLS by default, loopback without, and the commands around it."""

from __future__ import annotations

import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from coordinator import cli, config
from coordinator.certificates import Authority
from coordinator.errors import ConfigurationError
from coordinator.security import is_open, log_exposure, server_tls
from protocol.signing import channel_of
from tests.coordinator.federation_file import TOML, write_federation


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_federation(tmp_path)


@pytest.fixture
def certified(path: Path) -> Path:
    Authority(path.parent).issue_server(["127.0.0.1", "coordinator.test"], 1.0)
    path.write_text(TOML + '[server]\ncertificate = "server.pem"\nkey = "server.key"\n')
    return path


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "203.0.113.7", "coordinator.test"])
def test_without_tls_only_loopback_is_listened_on(path: Path, host: str) -> None:
    with pytest.raises(ConfigurationError, match=r"server\.host: .* --insecure"):
        config.load(path, {"server.host": host}, {})
    assert config.load(path, {"server.host": host, "server.insecure": "true"}, {})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_loopback_needs_no_tls(path: Path, host: str) -> None:
    assert config.load(path, {"server.host": host}, {}).server.host == host


@pytest.mark.parametrize(
    ("flags", "is_it"),
    [
        ({}, True),
        ({"host": "0.0.0.0", "insecure": "true"}, False),
        ({"certificate": "server.pem", "key": "server.key"}, False),
        ({"enrolment": "required"}, False),
        ({"host": "0.0.0.0", "insecure": "true", "enrolment": "open"}, True),
        ({"certificate": "server.pem", "key": "server.key", "enrolment": "open"}, True),
    ],
)
def test_enrolment_is_required_where_others_can_connect(
    path: Path, flags: dict[str, str], is_it: bool
) -> None:
    loaded = config.load(path, {f"server.{key}": value for key, value in flags.items()}, {})
    assert is_open(loaded.server) is is_it


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"key": ""}, r"server\.key: is missing"),
        ({"certificate": ""}, r"server\.certificate: is missing"),
        ({"certificate": "", "key": "", "client_ca": "ca.pem"}, r"server\.client_ca: needs"),
        ({"enrolment": "opne"}, r"enrolment: expected one of 'auto', 'open', 'required'"),
    ],
)
def test_settings_that_do_not_go_together_are_named(
    certified: Path, flags: dict[str, str], problem: str
) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        config.load(certified, {f"server.{key}": value for key, value in flags.items()}, {})


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("server.pem", None, r"server\.pem.*No such file"),
        ("server.key", b"rubbish", r"server\.certificate: "),
        ("server.pem", b"", r"server\.certificate: "),
        ("ca.pem", b"rubbish", r"server\.client_ca: .*ca\.pem: holds no certificate in PEM"),
    ],
)
def test_files_that_cannot_be_used_are_named(
    certified: Path, file: str, content: bytes | None, problem: str
) -> None:
    target = certified.parent / file
    target.unlink() if content is None else target.write_bytes(content)
    loaded = config.load(certified, {"server.client_ca": "ca.pem"}, {})
    with pytest.raises(ConfigurationError, match=problem):
        server_tls(loaded.server)


def test_a_key_of_another_certificate_is_named(certified: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert cli.main(["certs", "--out", str(other), "--host", "127.0.0.1"]) == 0
    (certified.parent / "server.key").write_bytes((other / "server.key").read_bytes())
    with pytest.raises(ConfigurationError, match=r"server\.pem with .*: the key is another"):
        server_tls(config.load(certified, {}, {}).server)


@pytest.mark.parametrize(
    ("days", "told"),
    [(-0.001, "has expired: devices will refuse it"), (3.5, "expires in 3 days"), (80.0, None)],
)
def test_a_certificate_that_ends_soon_is_told_when_the_coordinator_starts(
    certified: Path, days: float, told: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("server.pem", "server.key"):
        (certified.parent / name).unlink()
    Authority(certified.parent).issue_server(["127.0.0.1"], days)
    server = config.load(certified, {}, {}).server
    log_exposure(server, server_tls(server))
    assert [told in line for line in caplog.messages if told] == ([True] if told else [])


def test_an_encrypted_key_is_refused_and_not_asked_for(certified: Path) -> None:
    key = certified.parent / "server.key"
    private = load_pem_private_key(key.read_bytes(), None)
    secret = BestAvailableEncryption(b"secret")
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, secret))
    with pytest.raises(ConfigurationError, match=r"server\.key"):
        server_tls(config.load(certified, {}, {}).server)


def test_the_channel_is_the_certificates_digest(certified: Path) -> None:
    tls = server_tls(config.load(certified, {}, {}).server)
    assert tls is not None
    der = (certified.parent / "server.pem").read_text()
    assert tls.channel == channel_of(ssl.PEM_cert_to_DER_cert(der))


def test_certs_makes_an_authority_once_and_overwrites_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tls"
    make = ["certs", "--out", str(out)]
    assert cli.main([*make, "--host", "coordinator.test", "10.0.0.1", "--client", "ward-3"]) == 0
    assert capsys.readouterr().out.split() == [
        str(out / name)
        for name in (
            "ca.pem",
            "ca.key",
            "server.pem",
            "server.key",
            "client-ward-3.pem",
            "client-ward-3.key",
        )
    ]
    for key in out.glob("*.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    server = x509.load_pem_x509_certificate((out / "server.pem").read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["coordinator.test"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1"]
    authority = (out / "ca.pem").read_bytes()
    assert cli.main([*make, "--client", "ward-4"]) == 0
    assert (out / "ca.pem").read_bytes() == authority
    before = (out / "server.key").read_bytes()
    assert cli.main([*make, "--host", "other.test"]) == 2
    assert "server.pem exists already" in capsys.readouterr().err
    assert (out / "server.key").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "--host: is missing"),
        (["--host", "a", "--days", "0"], "--days: expected over 0"),
        (["--client", "../x"], "--client: '../x'"),
        (["--host", "a" * 300], "neither a host name nor an address"),
        (["--host", ""], "'' is neither a host name nor an address"),
        (["--host", "two words"], "'two words' is neither a host name nor an address"),
        (["--host", "[::1]"], "'[::1]' is neither a host name nor an address"),
    ],
)
def test_certs_names_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    assert cli.main(["certs", "--out", str(tmp_path), *arguments]) == 2
    assert problem in capsys.readouterr().err
