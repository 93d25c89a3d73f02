"""What never leaves the device: the state folder, mode 0700, its files 0600.

One state file is replaced whole: written beside the old one, flushed to the disk, and renamed over
it. Whatever happens on the way (a kill, a full disk), the folder holds the old state or the new.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from edge_client.errors import StateError, StorageFullError
from protocol.fingerprints import difference

FORMAT: Final = 2
STATE_FILE: Final = "state.safetensors"
_DAMAGE: Final = (
    AttributeError,
    KeyError,
    SafetensorError,
    TypeError,
    ValueError,
    struct.error,
)
FULL: Final = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}

Fact = str | int | float | bool | None
Group = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, slots=True)
class DeviceState:
    """Named groups of arrays (personal adapter, optimizer, ...) and small facts about them."""

    federation: str
    fingerprint: str
    steps_done: int
    rounds_done: int
    groups: Mapping[str, Group]
    facts: Mapping[str, Fact] = field(default_factory=dict)


class PrivateStore:
    """The state folder of one device."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StateError(f"{folder} cannot be made: {error.strerror}") from error

    def load(self) -> DeviceState | None:
        """The state; None where nothing was ever saved.

        Raises:
            StateError: the file is damaged, or of another version of this package.
        """
        path = self.folder / STATE_FILE
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateError(f"{path} cannot be read: {error.strerror}") from error
        try:
            return _parsed(data, path)
        except _DAMAGE as error:
            raise StateError(
                f"{path} is damaged ({error}); move it away to begin anew without its personal "
                "adapter"
            ) from error

    def save(self, state: DeviceState) -> None:
        """Replace the state; it is on the disk when this returns.

        Raises:
            StorageFullError: there is no room; the state before is intact.
            StateError: it cannot be written for another reason; likewise.
        """
        tensors = {
            f"{group}/{name}": np.ascontiguousarray(array)
            for group, arrays in state.groups.items()
            for name, array in arrays.items()
        }
        header = {
            "format": FORMAT,
            "federation": state.federation,
            "fingerprint": state.fingerprint,
            "steps_done": state.steps_done,
            "rounds_done": state.rounds_done,
            "groups": {group: list(arrays) for group, arrays in state.groups.items()},
            "facts": dict(state.facts),
        }
        text = json.dumps(header)
        metadata = {"pf2lora": text, "sha256": _digest(text, tensors)}
        self._write(STATE_FILE, save_tensors(tensors, metadata))

    def check(self, state: DeviceState, federation: str, fingerprint: str) -> None:
        """Refuse a state of another federation or backbone.

        Raises:
            StateError: naming both.
        """
        holds = f"{self.folder} holds the state of"
        if state.federation != federation:
            raise StateError(
                f"{holds} federation {state.federation}, not of {federation}; "
                "use another state folder"
            )
        if state.fingerprint != fingerprint:
            raise StateError(
                f"{holds} backbone fingerprint {state.fingerprint}, not of {fingerprint}: "
                f"{difference(state.fingerprint, fingerprint)}; give that backbone, or use another "
                "state folder"
            )

    def secret(self, name: str, make: Callable[[], bytes]) -> bytes:
        """A small file that only its owner may read: made once, kept for good.

        Raises:
            StateError: it cannot be read, or others than its owner could have read it.
        """
        path = self.folder / name
        if not path.exists():
            self._write(name, make())
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
            data = path.read_bytes()
        except OSError as error:
            raise StateError(f"{path} cannot be read: {error.strerror}") from error
        if mode & 0o077:
            raise StateError(
                f"{path} has mode {mode:03o}: others could have read it; if nobody has, chmod 600 "
                "it, otherwise remove it, and the device is a new one to its coordinators"
            )
        return data

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes off this folder while the context lasts.

        Raises:
            StateError: one has it already, or the folder cannot be written.
        """
        path = self.folder / "lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StateError(f"{path} cannot be opened: {error.strerror}") from error
        with os.fdopen(descriptor, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StateError(
                    f"{self.folder} is in use by another process, or by a client of this one that "
                    "is not closed"
                ) from None
            locked_by = os.getpid()
            try:
                yield
            finally:
                # A fork of this process has the same lock: that it lives on must not keep it, nor
                # its end let it go.
                if os.getpid() == locked_by:
                    fcntl.flock(file, fcntl.LOCK_UN)

    def _write(self, name: str, data: bytes) -> None:
        temporary = self.folder / f".{name}.{os.getpid()}.tmp"
        try:
            temporary.unlink(missing_ok=True)
            with os.fdopen(
                os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb"
            ) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.folder / name)
            _sync_folder(self.folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            kind = StorageFullError if error.errno in FULL else StateError
            raise kind(
                f"{self.folder / name} cannot be written: {error.strerror}; what it held before "
                "is intact"
            ) from error


def _sync_folder(folder: Path) -> None:
    # The rename itself must reach the disk, not only the bytes.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parsed(data: bytes, path: Path) -> DeviceState:
    size = struct.unpack_from("<Q", data)[0]
    metadata = json.loads(data[8 : 8 + size])["__metadata__"]
    header = json.loads(metadata["pf2lora"])
    if header["format"] != FORMAT:
        version = "a newer" if header["format"] > FORMAT else "an older"
        raise StateError(
            f"{path} was written by {version} version (format {header['format']}; this one reads "
            f"{FORMAT}): use that version, or another state folder"
        )
    tensors = load_tensors(data)
    if metadata["sha256"] != _digest(metadata["pf2lora"], tensors):
        raise ValueError("it is not what was written")
    groups = {
        group: {name: tensors[f"{group}/{name}"] for name in names}
        for group, names in header["groups"].items()
    }
    return DeviceState(
        header["federation"],
        header["fingerprint"],
        header["steps_done"],
        header["rounds_done"],
        groups,
        header["facts"],
    )


def _digest(header: str, tensors: Group) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
