"""Faults of the coordinator, and the exit codes of its commands.

CoordinatorError            exit code 1
├── ConfigurationError      2   a key, flag or variable is wrong; named
├── StoreError              3   the store is damaged, full, unwritable, or holds something else
├── AddressError            4   the address cannot be listened on
└── CertificateError        2   a certificate could not be made of what was given

RefusedError is none of these: it ends one device's session, and the daemon goes on.
"""

from __future__ import annotations

import errno
import os
from typing import ClassVar

from protocol.errors import ErrorCode
from protocol.link import authority


class CoordinatorError(Exception):
    """Base of what the coordinator raises on purpose."""

    exit_code: ClassVar[int] = 1


class ConfigurationError(CoordinatorError):
    """A setting that cannot be used: `key` is what the user calls it, `problem` what is wrong."""

    exit_code = 2

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key = key
        self.problem = problem


class StoreError(CoordinatorError):
    """The store cannot be used as it is."""

    exit_code = 3


class AddressError(CoordinatorError):
    """The address is in use, or not this machine's; `section` has its host and port."""

    exit_code = 4

    def __init__(self, section: str, host: str, port: int, error: OSError) -> None:
        # asyncio puts the system's words in a sentence of its own.
        number = error.errno or 0
        problem = os.strerror(number) if number > 0 else error.strerror
        # Of the admin port 0 is the one after the server's.
        more = ", or 0 for any" if section == "server" else ""
        hint = f"; use another port{more}" if number == errno.EADDRINUSE else ""
        super().__init__(
            f"{section}.host, {section}.port: cannot listen on {authority(host, port)}: "
            f"{problem}{hint}"
        )


class CertificateError(CoordinatorError):
    """A certificate authority that cannot be used, or a file that must not be overwritten."""

    exit_code = 2


class RefusedError(Exception):
    """A device's session ends here, with a reason for the device."""

    def __init__(self, code: ErrorCode, reason: str, retry_after_s: float = 1.0) -> None:
        super().__init__(reason)
        self.code = code
        self.retry_after_s = retry_after_s
