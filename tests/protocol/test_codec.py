"""Messages survive the wire; nothing else gets through, whatever the bytes."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol import codec, limits
from protocol.errors import ErrorCode, LocalProtocolError, ProtocolError, RemoteProtocolError
from protocol.messages import Chunk, Fetch, Goodbye, Hello, Message, Metric, Receipt
from tests.protocol.strategies import messages

steady = settings(
    derandomize=True,
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def _decodes_or_refuses(data: bytes) -> None:
    try:
        message = codec.decode(data)
    except ProtocolError:
        return
    assert codec.decode(codec.encode(message)) == message


@steady
@given(messages)
def test_every_message_survives_the_wire(message: Message) -> None:
    assert codec.decode(codec.encode(message)) == message


@steady
@given(st.binary(max_size=400))
def test_arbitrary_bytes_give_a_message_or_a_protocol_error(data: bytes) -> None:
    _decodes_or_refuses(data)


@steady
@given(messages, st.data())
def test_mutated_messages_give_a_message_or_a_protocol_error(
    message: Message, data: st.DataObject
) -> None:
    good = bytearray(codec.encode(message))
    draw = data.draw
    for _ in range(draw(st.integers(1, 4))):
        match draw(st.sampled_from(["flip", "cut", "grow"])):
            case "flip" if good:
                good[draw(st.integers(0, len(good) - 1))] = draw(st.integers(0, 255))
            case "cut":
                good = good[: draw(st.integers(0, len(good)))]
            case _:
                good += draw(st.binary(min_size=1, max_size=4))
    _decodes_or_refuses(bytes(good))


@pytest.mark.parametrize(
    "plain",
    [
        None,
        [],
        {},
        [99],
        ["1"],
        [True, 0],
        [1, [1], "x", 4096, 4096, "too many"],
        [1, [1], "x", 4096],
        [1, [], "x", 4096, 4096],
        [1, [True], "x", 4096, 4096],
        [1, [1], b"x", 4096, 4096],
        [8, b"short", 0],
        [8, bytes(32), -1],
        [8, bytes(32), 1.0],
        [9, 0, 1, b""],
        [12, "a", "unheard of", ""],
        [12, "a b", "late", ""],
        [14, {"a": 1}],
        [14, msgpack.ExtType(1, b"x")],
        [6, float("nan"), 0.0, ""],
        [6, float("inf"), 0.0, ""],
        [6, -1.0, 0.0, ""],
    ],
)
def test_what_is_no_message_is_refused(plain: object) -> None:
    with pytest.raises(RemoteProtocolError):
        codec.decode(msgpack.packb(plain))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xdd\xff\xff\xff\xff",  # an array of 2**32 - 1 items
        b"\xc6\xff\xff\xff\xff",  # as many bytes
        b"\xdf\xff\xff\xff\xff",  # a map of as many
        b"\x91" * 10_000,  # nested without end
        b"\x92\x0e\xa2\xc3\x28",  # no UTF-8
        codec.encode(Goodbye("")) + b"\x00",
        b"\xc1",
    ],
)
def test_hostile_bytes_are_refused_at_once(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        codec.decode(data)


def test_a_message_over_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(RemoteProtocolError) as refused:
        codec.decode(bytes(limits.MESSAGE_BYTES_MAX + 1))
    assert refused.value.code is ErrorCode.LIMIT


@pytest.mark.parametrize(
    "message",
    [
        Chunk(0, True, bytes(limits.CHUNK_BYTES_MAX + 1)),
        Fetch(bytes(31), 0),
        Fetch(bytes(32), limits.PAYLOAD_BYTES_MAX + 1),
        Goodbye("x" * (limits.TEXT_BYTES_MAX + 1)),
        Hello((), "x", 4096, 4096),
        Hello((1,), "\ud800", 4096, 4096),
        Receipt("a", "accepted", ""),  # type: ignore[arg-type]
    ],
)
def test_a_field_out_of_bounds_is_not_sent(message: Message) -> None:
    with pytest.raises(LocalProtocolError, match=type(message).__name__):
        codec.encode(message)


def test_an_error_names_the_field() -> None:
    data = msgpack.packb([8, bytes(32), -5])
    with pytest.raises(RemoteProtocolError, match=r"Fetch\.offset: expected 0 to .*, got -5"):
        codec.decode(data)
    assert Metric("loss", 1.0).value == 1.0
