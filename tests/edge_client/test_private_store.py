"""The state folder holds the old state or the new, whatever happens, and only for its owner."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from edge_client import private_store
from edge_client.errors import StateError
from edge_client.identity import Identity, new_key
from edge_client.private_store import STATE_FILE, DeviceState, PrivateStore


def _state(steps: int, size: int = 100) -> DeviceState:
    value = np.full((size,), steps, np.float32)
    groups = {"personal": {"x.C": value, "x.D": value[:0]}, "report": {}}
    return DeviceState("fed", "sha256:1", steps, 2, groups, {"a": None, "b": 1.5, "c": "x"})


def test_a_state_comes_back_whole(tmp_path: Path) -> None:
    store = PrivateStore(tmp_path / "state")
    assert store.load() is None
    store.save(_state(7))
    loaded = PrivateStore(tmp_path / "state").load()
    assert loaded is not None
    assert (loaded.steps_done, loaded.facts) == (7, {"a": None, "b": 1.5, "c": "x"})
    assert list(loaded.groups["personal"]) == ["x.C", "x.D"]
    assert loaded.groups["personal"]["x.C"].tobytes() == np.full(100, 7, np.float32).tobytes()
    assert loaded.groups["report"] == {}


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    store = PrivateStore(tmp_path / "state")
    store.save(_state(1))
    store.secret("device.key", new_key)
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    for file in store.folder.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def _identity(folder: Path) -> Identity:
    return Identity.from_pem(PrivateStore(folder).secret("device.key", new_key))


def test_the_device_key_is_made_once_and_gives_the_device_its_id(tmp_path: Path) -> None:
    first, again, other = (_identity(tmp_path / name) for name in ("a", "a", "b"))
    assert first.key == again.key != other.key
    assert first.device == again.device == hashlib.sha256(first.key).hexdigest()[:32]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o622])
def test_a_key_that_others_could_have_read_is_refused(tmp_path: Path, mode: int) -> None:
    _identity(tmp_path)
    (tmp_path / "device.key").chmod(mode)
    with pytest.raises(StateError, match=rf"device\.key has mode {mode:o}: others could"):
        _identity(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "damaged"),
        (b"rubbish", "damaged"),
        (
            ec.generate_private_key(ec.SECP256R1()).private_bytes(
                Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
            ),
            "no Ed25519 key",
        ),
    ],
)
def test_a_key_that_is_none_is_refused_and_not_replaced(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    store = PrivateStore(tmp_path)
    store.secret("device.key", lambda: content)
    with pytest.raises(StateError, match=problem):
        _identity(tmp_path)
    assert (tmp_path / "device.key").read_bytes() == content


@pytest.mark.parametrize("keep", [0, 4, 40, 300])
def test_a_damaged_file_is_refused_and_not_replaced(tmp_path: Path, keep: int) -> None:
    store = PrivateStore(tmp_path)
    store.save(_state(1))
    path = tmp_path / STATE_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StateError, match="damaged"):
        store.load()
    assert len(path.read_bytes()) == keep


def test_a_flipped_bit_anywhere_is_damage(tmp_path: Path) -> None:
    store = PrivateStore(tmp_path)
    store.save(_state(1))
    path = tmp_path / STATE_FILE
    whole = path.read_bytes()
    for seed in range(200):
        rng, data = random.Random(seed), bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            store.load()
        except StateError:
            continue
        pytest.fail(f"nothing was noticed: seed {seed}")
    path.write_bytes(whole)
    assert store.load() is not None


@pytest.mark.parametrize(("number", "version"), [(1, "an older"), (3, "a newer")])
def test_a_state_of_another_version_is_refused_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, version: str
) -> None:
    store = PrivateStore(tmp_path)
    with monkeypatch.context() as other:
        other.setattr(private_store, "FORMAT", number)
        store.save(_state(1))
    said = rf"by {version} version \(format {number}; this one reads 2\): use that version, or ano"
    with pytest.raises(StateError, match=said):
        store.load()


def test_another_federations_state_is_refused_with_both_named(tmp_path: Path) -> None:
    store = PrivateStore(tmp_path)
    with pytest.raises(StateError, match="federation fed, not of other"):
        store.check(_state(1), "other", "sha256:1")
    with pytest.raises(StateError, match="fingerprint sha256:1, not of sha256:2"):
        store.check(_state(1), "fed", "sha256:2")


SAVE_BIG = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from edge_client.errors import StorageFullError
from edge_client.private_store import DeviceState, PrivateStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
big = {"personal": {"x": np.ones(50_000, np.float32)}}
try:
    PrivateStore(Path(sys.argv[1])).save(DeviceState("fed", "f", 9, 9, big))
except StorageFullError as error:
    print(error)
    sys.exit(7)
"""


def test_a_full_disk_leaves_the_old_state_intact(tmp_path: Path) -> None:
    store = PrivateStore(tmp_path)
    store.save(_state(3))
    before = (tmp_path / STATE_FILE).read_bytes()
    ended = subprocess.run(
        [sys.executable, "-c", SAVE_BIG, str(tmp_path)], capture_output=True, text=True
    )
    assert ended.returncode == 7, ended.stderr
    assert "cannot be written" in ended.stdout
    assert (tmp_path / STATE_FILE).read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))
    assert not list(tmp_path.glob(".*.tmp"))


SAVE_ON_AND_ON = """
import sys
from pathlib import Path
import numpy as np
from edge_client.private_store import DeviceState, PrivateStore
store, steps = PrivateStore(Path(sys.argv[1])), 0
while True:
    steps += 1
    arrays = {"x": np.full(20_000, steps, np.float32)}
    store.save(DeviceState("fed", "f", steps, 0, {"personal": arrays}))
    print(steps, flush=True)
"""


def test_killed_at_any_moment_the_state_is_one_that_was_saved(tmp_path: Path) -> None:
    rng = random.Random(4)
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_ON_AND_ON, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first == "1\n"
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        said = [1, *(int(line) for line in process.stdout if line.endswith("\n"))]
        process.stdout.close()
        process.wait()
        loaded = PrivateStore(tmp_path).load()
        assert loaded is not None
        assert loaded.steps_done >= said[-1]
        assert set(loaded.groups["personal"]["x"].tolist()) == {float(loaded.steps_done)}


def test_a_fork_neither_keeps_the_folder_nor_lets_it_go(tmp_path: Path) -> None:
    """A fork has the lock of its parent, though nothing of what goes on there."""
    store, (asked, ask) = PrivateStore(tmp_path), os.pipe()
    with contextlib.ExitStack() as held:
        held.enter_context(store.lock())
        leaving = os.fork()
        if not leaving:
            held.close()
            os._exit(0)
        assert os.waitpid(leaving, 0)[1] == 0
        with pytest.raises(StateError, match="is in use by another process, or by a client of"):
            store.lock().__enter__()
        staying = os.fork()
        if not staying:
            os.close(ask)
            os.read(asked, 1)  # as long as the parent lives
            os._exit(0)
    with store.lock():
        pass
    os.close(ask)
    assert os.waitpid(staying, 0)[1] == 0


def test_a_folder_that_cannot_be_locked_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with (
        pytest.raises(StateError, match="lock cannot be opened: Is a directory"),
        PrivateStore(tmp_path).lock(),
    ):
        pass
