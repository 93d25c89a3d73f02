"""What the tests of this folder share."""

from __future__ import annotations

import pytest

from coordinator.service import FederationService


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices of which a federation has heard anything, in order."""
    heard: list[str] = []
    for name in ("joined", "check_in", "offer", "take"):
        original = getattr(FederationService, name)

        def listen(self: object, device: str, *rest: object, _do: object = original) -> object:
            heard.append(device)
            return _do(self, device, *rest)  # type: ignore[operator]

        monkeypatch.setattr(FederationService, name, listen)
    return heard
