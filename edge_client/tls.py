"""How a device makes sure that it talks to its coordinator, and says what is wrong if not."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Final

from websockets.exceptions import InvalidMessage, InvalidStatus

from edge_client.errors import ConfigurationError

# OpenSSL's verify codes.
_EXPIRED: Final = 10
_NOT_YET_VALID: Final = 9
_WRONG_HOST: Final = (62, 64)  # name, address
_UNKNOWN_CA: Final = (18, 19, 20, 21)
# What a proxy says that cannot reach the coordinator, or has bounds of its own.
_NOBODY_BEHIND: Final = (HTTPStatus.BAD_GATEWAY, HTTPStatus.GATEWAY_TIMEOUT)
_TOO_MANY: Final = (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Whom to trust, where that is not what the system trusts; and who this device is, where TLS
    is mutual. All PEM."""

    ca_file: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """TLS that checks the coordinator's certificate and host name.

    Raises:
        ConfigurationError: a file cannot be used.
    """
    if bool(files.certificate) != bool(files.key):
        raise ConfigurationError("client_key", "comes with client_certificate only", "both")
    field, path = "ca_file", files.ca_file
    try:
        context = ssl.create_default_context(cafile=files.ca_file)
        if files.certificate and files.key:
            field, path = "client_certificate", files.certificate
            context.load_cert_chain(files.certificate, files.key, password="")
    except OSError as error:
        problem = error.strerror if not isinstance(error, ssl.SSLError) else error.reason
        problem = problem or "holds no certificate"
        raise ConfigurationError(field, f"{path}: {problem}", "certificates in PEM") from error
    return context


def is_untrusted(error: BaseException) -> bool:
    """Whether the coordinator showed a certificate that this device does not take."""
    return isinstance(error, ssl.SSLCertVerificationError)


def explained(error: Exception, *, encrypted: bool) -> str:
    """What went wrong with a connection, and what is likely to be right."""
    match error:
        case ssl.SSLCertVerificationError():
            return _mistrust(error)
        case ssl.SSLError() | ConnectionResetError() if encrypted:
            return "no TLS could be had there; does this coordinator want ws://?"
        case InvalidMessage() if encrypted:
            return (
                "it hung up once TLS was there; does it want a client_certificate, or another one "
                "than this?"
            )
        case InvalidMessage():
            return "it hung up without an answer; does this coordinator want wss://?"
        case InvalidStatus() if error.response.status_code in _NOBODY_BEHIND:
            return f"{error}; a proxy answers there, and no coordinator behind it"
        case InvalidStatus() if error.response.status_code in _TOO_MANY:
            return f"{error}; a proxy on the way takes no more for now"
        case InvalidStatus() if error.response.status_code == HTTPStatus.UPGRADE_REQUIRED:
            return f"{error}; does a proxy on the way not pass on Upgrade and Connection?"
        case InvalidStatus():
            return f"{error}; is this the coordinator's own port, and not its dashboard's?"
    return str(error) or type(error).__name__


def _mistrust(error: ssl.SSLCertVerificationError) -> str:
    code = error.verify_code
    if code == _EXPIRED:
        return "the coordinator's certificate has expired, or this device's clock is fast"
    if code == _NOT_YET_VALID:
        return "the coordinator's certificate is not valid yet; is this device's clock right?"
    if code in _WRONG_HOST:
        return f"the coordinator's certificate is for another host: {error.verify_message}"
    if code in _UNKNOWN_CA:
        return (
            "the coordinator's certificate comes from an authority that this device does not "
            "know; give its ca_file"
        )
    return f"the coordinator's certificate is not trusted: {error.verify_message}"
