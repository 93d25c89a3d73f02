"""A private certificate authority for trials: enough TLS to try a federation out with.

Keys are ECDSA on P-256. Nothing is ever overwritten: an authority that is there is used again, so
that certificates can be added later.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from coordinator.errors import CertificateError

CA_DAYS: Final = 3650
HOST_NAME: Final = re.compile(r"(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
# Clocks differ: a certificate made now must be good on a device that is a little behind.
BACKDATED: Final = timedelta(minutes=10)

_NOTHING: Final = {
    "digital_signature": False,
    "content_commitment": False,
    "key_encipherment": False,
    "data_encipherment": False,
    "key_agreement": False,
    "key_cert_sign": False,
    "crl_sign": False,
    "encipher_only": False,
    "decipher_only": False,
}


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


class Authority:
    """A folder's certificate authority: `ca.pem`, and `ca.key` for its owner only."""

    def __init__(self, folder: Path) -> None:
        """Use the folder's authority, or make one.

        Raises:
            CertificateError: the folder holds half of one or a damaged one, or cannot be written.
        """
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CertificateError(f"{folder}: {error.strerror}") from error
        self._issued = self._load() if (folder / "ca.pem").exists() else self._make()

    def issue_server(self, hosts: Sequence[str], days: float) -> list[Path]:
        """Write `server.pem` and `server.key` for these host names and addresses."""
        names = [_name_of(host) for host in hosts]
        issued = self._issue(hosts[0], days, ExtendedKeyUsageOID.SERVER_AUTH, names)
        return self._write("server", issued)

    def issue_client(self, name: str, days: float) -> list[Path]:
        """Write a certificate with which a device of this name connects where TLS is mutual."""
        issued = self._issue(name, days, ExtendedKeyUsageOID.CLIENT_AUTH, [])
        return self._write(f"client-{name}", issued)

    def _issue(
        self,
        name: str,
        days: float,
        usage: x509.ObjectIdentifier,
        names: list[x509.GeneralName],
    ) -> Issued:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(name, key, self._issued.certificate.subject, days)
        builder = builder.add_extension(x509.BasicConstraints(False, None), critical=True)
        builder = builder.add_extension(
            x509.KeyUsage(**{**_NOTHING, "digital_signature": True}), critical=True
        )
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._issued.key.public_key())
        builder = builder.add_extension(issuer, critical=False)
        return Issued(builder.sign(self._issued.key, hashes.SHA256()), key)

    def _load(self) -> Issued:
        try:
            certificate = x509.load_pem_x509_certificate((self.folder / "ca.pem").read_bytes())
            key = load_pem_private_key((self.folder / "ca.key").read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            raise CertificateError(f"the authority in {self.folder}: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise CertificateError(f"the authority in {self.folder} was not made by this command")
        return Issued(certificate, key)

    def _make(self) -> Issued:
        key = ec.generate_private_key(ec.SECP256R1())
        name = f"pf2lora private CA {os.urandom(4).hex()}"
        builder = _builder(name, key, _subject(name), CA_DAYS)
        builder = builder.add_extension(x509.BasicConstraints(True, 0), critical=True)
        builder = builder.add_extension(
            x509.KeyUsage(**{**_NOTHING, "key_cert_sign": True, "crl_sign": True}), critical=True
        )
        issued = Issued(builder.sign(key, hashes.SHA256()), key)
        self._write("ca", issued)
        return issued

    def _write(self, name: str, issued: Issued) -> list[Path]:
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        for path in (certificate, key):
            if path.exists():
                raise CertificateError(f"{path} exists already; move it away first")
        private = issued.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        _create(key, private, 0o600)
        _create(certificate, issued.certificate.public_bytes(Encoding.PEM), 0o644)
        return [certificate, key]


def _builder(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: x509.Name, days: float
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_subject(name))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _name_of(host: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    with contextlib.suppress(UnicodeError):
        name = host.encode("idna").decode()
        if HOST_NAME.fullmatch(name):
            return x509.DNSName(name)
    raise CertificateError(f"--host: {host!r} is neither a host name nor an address")


def _create(path: Path, data: bytes, mode: int) -> None:
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
    except OSError as error:
        raise CertificateError(f"{path}: {error.strerror}") from error
