"""Where the coordinator may listen, TLS, and signatures: all by OpenSSL, through two libraries."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding

from coordinator.errors import ConfigurationError
from protocol.link import is_loopback
from protocol.signing import channel_of

if TYPE_CHECKING:
    from coordinator.config import ServerSettings

log = logging.getLogger("pf2lora.coordinator")


EXPIRES_SOON: Final = timedelta(days=14)


class Enrolment(Enum):
    """Whether a key must be enrolled before it may take part.

    AUTO requires it wherever another machine could connect: all but loopback without TLS.
    """

    AUTO = "auto"
    OPEN = "open"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class ServerTls:
    """What the listening socket needs, and the channel's name that devices will have signed."""

    context: ssl.SSLContext
    channel: bytes
    expires_at: datetime


def check_exposure(server: ServerSettings) -> None:
    """Refuse to be reached by others without TLS, unless the operator says so.

    Raises:
        ConfigurationError: naming the setting.
    """
    if bool(server.certificate) != bool(server.key):
        given, missing = ("certificate", "key") if server.certificate else ("key", "certificate")
        raise ConfigurationError(f"server.{missing}", f"is missing, where server.{given} is given")
    if server.client_ca and not server.certificate:
        raise ConfigurationError("server.client_ca", "needs server.certificate and server.key")
    if not (server.certificate or server.insecure or is_loopback(server.host)):
        raise ConfigurationError(
            "server.host",
            f"{server.host} can be reached by other machines, and there is no server.certificate: "
            "give one (pf2lora-coordinator certs makes one for trials), listen on 127.0.0.1, or "
            "say --insecure",
        )


def is_open(server: ServerSettings) -> bool:
    """Whether keys that nobody has enrolled may take part."""
    if server.enrolment is Enrolment.AUTO:
        return is_loopback(server.host) and not server.certificate
    return server.enrolment is Enrolment.OPEN


def server_tls(server: ServerSettings) -> ServerTls | None:
    """TLS 1.2 or newer with the configured certificate; None without one.

    Raises:
        ConfigurationError: a file cannot be used.
    """
    if not server.certificate:
        return None
    for name in ("certificate", "key", "client_ca"):  # OpenSSL does not say which is missing
        _check_readable(f"server.{name}", getattr(server, name))
    try:
        context = tls_with(server.certificate, server.key)
        own = x509.load_pem_x509_certificates(Path(server.certificate).read_bytes())[0]
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            "server.certificate", f"{server.certificate} with {server.key}: {_problem(error)}"
        ) from error
    if server.client_ca:
        try:
            context.load_verify_locations(server.client_ca)
        except OSError as error:
            raise ConfigurationError(
                "server.client_ca", f"{server.client_ca}: {_problem(error)}"
            ) from error
        context.verify_mode = ssl.CERT_REQUIRED
    return ServerTls(context, channel_of(own.public_bytes(Encoding.DER)), own.not_valid_after_utc)


def tls_with(certificate: str, key: str) -> ssl.SSLContext:
    """TLS 1.2 or newer with the PEM files of a certificate and its key.

    Raises:
        OSError, ValueError: a file cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # An encrypted key would otherwise be asked for on the terminal, where a daemon has none.
    context.load_cert_chain(certificate, key, password="")
    return context


def _check_readable(key: str, path: str) -> None:
    try:
        if path:
            Path(path).read_bytes()
    except OSError as error:
        raise ConfigurationError(key, f"{path}: {error.strerror}") from error


def log_exposure(server: ServerSettings, tls: ServerTls | None) -> None:
    """Say what an operator should know of how others can reach this coordinator."""
    if tls:
        log.info("TLS with a certificate that is good until %s", tls.expires_at.isoformat())
        left = tls.expires_at - datetime.now(UTC)
        if left < timedelta(0):
            log.error("the certificate has expired: devices will refuse it")
        elif left < EXPIRES_SOON:
            log.warning("the certificate expires in %d days: start again with a new one", left.days)
    elif not is_loopback(server.host):
        log.warning("insecure: whoever is on the way reads and can change what devices send")
    if is_open(server) and not is_loopback(server.host):
        log.warning("enrolment is open: any device that can connect takes part")


def is_signed(key: bytes, signature: bytes, statement: bytes) -> bool:
    """Whether the Ed25519 public key's owner has signed this statement.

    It takes less than a tenth of a millisecond: no reason to leave the event loop for it.
    """
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, statement)
    except (InvalidSignature, ValueError):
        return False
    return True


# What OpenSSL calls the commonest mistakes.
_PLAINLY: Final = {
    "KEY_VALUES_MISMATCH": "the key is another certificate's",
    "NO_CERTIFICATE_OR_CRL_FOUND": "holds no certificate in PEM",
}


def _problem(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        reason = error.reason or ""
        return _PLAINLY.get(reason, reason) or "is no certificate with its key, in PEM"
    return getattr(error, "strerror", None) or str(error)
