"""Who may say what when: the table, from both ends."""

from __future__ import annotations

import random

import pytest

from protocol import codec
from protocol.connection import TABLE, Connection, Role, State, default_hello
from protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from protocol.messages import Goodbye, Hello, Message, Refusal
from tests.protocol.samples import SAMPLES


def _pair() -> dict[Role, Connection]:
    return {role: Connection(role, default_hello(role.name)) for role in Role}


def _pass(pair: dict[Role, Connection], speaker: Role, message: Message) -> Message:
    return pair[speaker.other].receive(pair[speaker].send(message))


@pytest.mark.parametrize("seed", range(30))
def test_random_conversations_keep_both_ends_in_the_same_state(seed: int) -> None:
    print(f"seed {seed}")
    rng, pair = random.Random(seed), _pair()
    for _ in range(60):
        state = pair[Role.DEVICE].state
        options = [
            (who, kind) for (at, who), kinds in TABLE.items() if at is state for kind in kinds
        ]
        speaker, kind = rng.choice(options)
        message = SAMPLES[kind]
        assert _pass(pair, speaker, message) == message
        assert pair[Role.DEVICE].state is pair[Role.COORDINATOR].state


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("speaker", list(Role))
def test_what_the_table_does_not_allow_is_neither_sent_nor_taken(
    state: State, speaker: Role
) -> None:
    allowed = TABLE.get((state, speaker), {})
    for kind, message in SAMPLES.items():
        ends = kind in (Goodbye, Refusal) and state is not State.CLOSED
        if kind in allowed or ends:
            continue
        pair = _pair()
        for connection in pair.values():
            connection.state = state
        with pytest.raises(LocalProtocolError):
            pair[speaker].send(message)
        with pytest.raises(RemoteProtocolError) as refused:
            pair[speaker.other].receive(codec.encode(message))
        assert refused.value.code is ErrorCode.UNEXPECTED_MESSAGE


def _hello(*versions: int, chunk_bytes: int = 4096) -> Hello:
    return Hello(versions, "x", 1 << 20, chunk_bytes)


def test_the_highest_common_version_and_the_smaller_limit_are_in_force() -> None:
    device = Connection(Role.DEVICE, _hello(1, 2, 4, chunk_bytes=8192))
    coordinator = Connection(Role.COORDINATOR, _hello(1, 2, 3))
    coordinator.receive(device.send(_hello(1, 2, 4, chunk_bytes=8192)))
    device.receive(coordinator.send(_hello(1, 2, 3)))
    assert (device.version, coordinator.version) == (2, 2)
    assert (device.chunk_bytes, coordinator.chunk_bytes) == (4096, 4096)


def test_without_a_common_version_both_lists_are_named() -> None:
    coordinator = Connection(Role.COORDINATOR, _hello(1))
    with pytest.raises(RemoteProtocolError, match="coordinator speaks 1, device speaks 7, 8") as no:
        coordinator.receive(codec.encode(_hello(7, 8)))
    assert no.value.code is ErrorCode.VERSION
    assert not no.value.code.retryable


def test_a_message_larger_than_the_other_side_takes_is_not_sent() -> None:
    pair = _pair()
    pair[Role.COORDINATOR].receive(pair[Role.DEVICE].send(Hello((3,), "small", 2048, 1024)))
    with pytest.raises(RemoteProtocolError, match="takes 2048") as no:
        pair[Role.COORDINATOR].send(Goodbye("x" * 2048))
    assert no.value.code is ErrorCode.LIMIT
    assert pair[Role.COORDINATOR].state is State.GREETED
