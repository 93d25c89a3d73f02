"""Message <-> bytes: one msgpack array `[code, field, field, ...]` a message.

Strict and closed: the codes of messages.py and nothing else, every field of its declared kind and
within its bounds, no maps, no extension types, no trailing bytes. Whatever the bytes, `decode`
returns a message or raises RemoteProtocolError.
"""

from __future__ import annotations

import typing
from typing import Any, Final

import msgpack

from protocol import limits
from protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from protocol.messages import Message
from protocol.scalars import SchemaError
from protocol.schema import Record, record_of

_RECORDS: Final[dict[int, Record]] = {cls.CODE: record_of(cls) for cls in typing.get_args(Message)}


def encode(message: Message) -> bytes:
    """Bytes of a message.

    Raises:
        LocalProtocolError: a field is outside its bounds.
    """
    name = type(message).__name__
    try:
        fields = _RECORDS[message.CODE].encode(message, name)
    except SchemaError as error:
        raise LocalProtocolError(f"cannot send {error}") from None
    packed: bytes = msgpack.packb([message.CODE, *fields], use_bin_type=True)
    return packed


def decode(data: bytes | memoryview, bytes_max: int = limits.MESSAGE_BYTES_MAX) -> Message:
    """The message that the bytes hold.

    Raises:
        RemoteProtocolError: they hold none, or one that is out of bounds.
    """
    if len(data) > bytes_max:
        raise RemoteProtocolError(
            f"a message of {len(data)} bytes; the limit is {bytes_max}", ErrorCode.LIMIT
        )
    code, fields = _unpacked(data)
    record = _RECORDS.get(code)
    if record is None:
        raise RemoteProtocolError(f"unknown message code {code}")
    try:
        message: Message = record.decode(fields, record.cls.__name__)
    except SchemaError as error:
        raise RemoteProtocolError(f"bad message: {error}") from None
    return message


def _unpacked(data: bytes | memoryview) -> tuple[int, list[Any]]:
    try:
        plain = msgpack.unpackb(
            data,
            raw=False,
            use_list=True,
            strict_map_key=True,
            max_map_len=0,
            max_ext_len=0,
            max_array_len=limits.TENSORS_MAX,
            max_bin_len=limits.CHUNK_BYTES_MAX,
            max_str_len=limits.TEXT_BYTES_MAX,
        )
    except Exception as error:
        # msgpack raises its own errors, ValueError, UnicodeDecodeError and RecursionError alike.
        raise RemoteProtocolError(f"not a msgpack message: {type(error).__name__}") from None
    if not isinstance(plain, list) or not plain or type(plain[0]) is not int:
        raise RemoteProtocolError("not an array that begins with a message code")
    return plain[0], plain[1:]
