"""The device's key: made on first start, kept with its private state, never sent.

The key is Ed25519 and lies as PKCS #8 in PEM; the device's id follows from its public half.
"""

from __future__ import annotations

import hashlib

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from edge_client.errors import StateError
from protocol.signing import device_id


class Identity:
    """A device's key pair."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.key = private.public_key().public_bytes_raw()
        self.device = device_id(self.key)

    @classmethod
    def from_pem(cls, data: bytes) -> Identity:
        """The key pair of a file.

        Raises:
            StateError: it holds no Ed25519 key.
        """
        try:
            private = load_pem_private_key(data, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise StateError(
                f"the device key is damaged: {str(error).partition(' See ')[0]}; put device.key "
                "back as it was or remove it, and the device is a new one to its coordinators"
            ) from None
        if not isinstance(private, Ed25519PrivateKey):
            raise StateError(f"the device key is no Ed25519 key: {type(private).__name__}")
        return cls(private)

    @classmethod
    def named(cls, name: str) -> Identity:
        """The key pair that follows from a name: for simulations; anyone can make it."""
        seed = hashlib.sha256(name.encode()).digest()
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    def sign(self, statement: bytes) -> bytes:
        """64 bytes that only this key can make for this statement."""
        return self._private.sign(statement)


def new_key() -> bytes:
    """A fresh private key, as its file holds it."""
    return Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
