"""Who may read the admin port, and what a browser may do with its pages."""

from __future__ import annotations

import base64
import binascii
from hmac import compare_digest
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protocol.link import is_loopback

# Probes come from the machine that runs the process, and learn nothing but yes or no.
OPEN_PATHS: Final = ("/livez", "/readyz")
HEADERS: Final = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Guard:
    """Asks for the token, as `Authorization: Bearer` or as the password a browser asks for."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # a device that was given this port instead of the other
            await send({"type": "websocket.close"})
        if scope["type"] != "http":
            return
        response: ASGIApp = self._app
        if not self._token and not _is_local(scope):
            response = PlainTextResponse("Without a token: by a local name only.\n", 403)
        elif not self._admits(scope):
            response = PlainTextResponse(
                "This needs the admin token: as Authorization: Bearer TOKEN, or as the password.\n",
                401,
                {"www-authenticate": 'Basic realm="pf2lora", charset="UTF-8"'},
            )
        await response(scope, receive, _with_headers(send))

    def _admits(self, scope: Scope) -> bool:
        if not self._token or scope["path"] in OPEN_PATHS:
            return True
        given = Headers(scope=scope).get("authorization", "")
        kind, _, value = given.partition(" ")
        match kind.lower():
            case "bearer":
                return compare_digest(value.strip().encode(), self._token)
            case "basic":
                return compare_digest(_password(value), self._token)
            case _:
                return False


def _is_local(scope: Scope) -> bool:
    """Whether this machine was called by one of its local names.

    A page of another site may reach a port without a token through a name that it has pointed at
    this machine (DNS rebinding): the name gives it away.
    """
    try:
        name = urlsplit("//" + Headers(scope=scope).get("host", "")).hostname
    except ValueError:
        return False
    return name is not None and is_loopback(name)


def _password(value: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("cache-control", "no-store")
        await send(message)

    return send_with_headers
