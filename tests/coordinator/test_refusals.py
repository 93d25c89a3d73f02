"""What the log says of refusals, on a virtual clock."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.refusals import LINES_MAX, SUMMED_UP_S, Refusals
from protocol.errors import ErrorCode
from protocol.virtual_time import simulate


def test_of_a_crowd_the_first_have_lines_and_the_others_a_number(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        refusals = Refusals()
        for number in range(1000):
            refusals.tell("reviews", f"d{number}", ErrorCode.REVOKED, "lost")
        refusals.tell("", "", ErrorCode.BUSY, "too many connections")
        assert caplog.messages == [
            *(f"refused d{number}: revoked: lost" for number in range(LINES_MAX)),
            "refused a device: busy: too many connections",
        ]
        assert (caplog.records[0].federation, caplog.records[0].device) == ("reviews", "d0")  # type: ignore[attr-defined]
        caplog.clear()
        await asyncio.sleep(SUMMED_UP_S)
        assert caplog.messages == [f"refused {1000 - LINES_MAX} more within 60 s: revoked"]
        assert caplog.records[0].code == "revoked"  # type: ignore[attr-defined]
        refusals.tell("reviews", "d1", ErrorCode.REVOKED, "lost")
        await asyncio.sleep(10 * SUMMED_UP_S)
        assert caplog.messages[1:] == ["refused d1: revoked: lost"]

    simulate(scenario)
