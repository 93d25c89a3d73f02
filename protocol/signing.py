"""What a device signs, as bytes; who signs and verifies them has the keys (Ed25519, RFC 8032).

A statement is a prefix that says what it is for, what the message does not carry itself, and the
message's own bytes with the signature left empty. So a signature for one purpose, connection,
device or federation is none for another, and no field of the message can be changed under it.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Final

from protocol import codec, limits
from protocol.messages import Join, Report

UNSIGNED: Final = bytes(limits.SIGNATURE_BYTES)


def device_id(key: bytes) -> str:
    """The device's name: the first half of its public key's SHA-256, in hexadecimal."""
    return hashlib.sha256(key).hexdigest()[:32]


def channel_of(certificate: bytes) -> bytes:
    """What names a TLS channel: SHA-256 of the coordinator's certificate in DER.

    As "tls-server-end-point" of RFC 5929, which a program can know at both ends.
    """
    return hashlib.sha256(certificate).digest()


def join_statement(join: Join, nonce: bytes, version: int) -> bytes:
    """What proves, on the connection of this nonce alone, that the device has its key."""
    message = codec.encode(replace(join, signature=UNSIGNED))
    return b"pf2lora join\0" + version.to_bytes(2, "big") + nonce + message


def report_statement(report: Report, federation: str, device: str) -> bytes:
    """What binds a report to its device and federation, wherever it is kept later.

    The message has the update's digest, round, base version, assignment, examples and metrics.
    """
    message = codec.encode(replace(report, signature=UNSIGNED))
    return b"pf2lora report\0" + f"{federation}\0{device}\0".encode() + message
