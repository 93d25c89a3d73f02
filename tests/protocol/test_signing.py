"""What is signed: every field of the message, and what it does not carry itself."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from protocol.messages import Join, Report
from protocol.signing import device_id, join_statement, report_statement
from tests.protocol.samples import sample
from tests.protocol.strategies import of_class

JOIN, REPORT = sample(Join), sample(Report)
NONCE = bytes(32)
joins, reports = of_class(Join), of_class(Report)


def test_the_statements_have_not_changed() -> None:
    assert device_id(b"\x01" * 32) == "72cd6e8422c407fb6d098690f1130b7d"
    assert join_statement(JOIN, NONCE, 2) == (
        b"pf2lora join\0\0\2"
        + NONCE
        + bytes.fromhex("9602a464656d6fc420" + "01" * 32 + "c420" + "02" * 32)
        + b"\xa5token\xc4\x40"
        + bytes(64)
    )
    statement = report_statement(REPORT, "demo", "0123")
    assert statement.startswith(b"pf2lora report\0demo\x000123\0\x98\x0a\xa2a1\x03")
    assert statement.endswith(b"\xc4\x40" + bytes(64))


def _unsigned_fields_equal(one: Any, two: Any) -> bool:
    names = [field.name for field in fields(one) if field.name != "signature"]
    return all(getattr(one, name) == getattr(two, name) for name in names)


@given(joins, joins, st.binary(min_size=32, max_size=32), st.sampled_from([1, 2, 300]))
def test_a_join_statement_is_of_one_join_nonce_and_version(
    one: Join, two: Join, nonce: bytes, version: int
) -> None:
    statement = join_statement(one, NONCE, 2)
    same = join_statement(two, NONCE, 2) == statement
    assert same == _unsigned_fields_equal(one, two)
    unchanged = (nonce, version) == (NONCE, 2)
    assert (join_statement(one, nonce, version) == statement) == unchanged
    assert join_statement(replace(one, signature=bytes(64)), NONCE, 2) == statement


@given(reports, reports)
def test_a_report_statement_is_of_one_report(one: Report, two: Report) -> None:
    same = report_statement(one, "fed", "d") == report_statement(two, "fed", "d")
    assert same == _unsigned_fields_equal(one, two)


def test_a_report_statement_is_of_one_federation_and_device() -> None:
    names = [("a", "bc"), ("ab", "c"), ("a", "b"), ("b", "a")]
    assert len({report_statement(REPORT, *pair) for pair in names}) == len(names)
