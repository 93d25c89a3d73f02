"""What two backbones' fingerprints say of each other.

A fingerprint's first 32 hex digits are of the weights, the last 32 of the tokenizer.
"""

from __future__ import annotations

from typing import Final

_WEIGHTS_END: Final = len("sha256:") + 32


def difference(found: str, wanted: str) -> str:
    """In words: what the backbone of one fingerprint has otherwise than the other's."""
    parts = []
    if found[:_WEIGHTS_END] != wanted[:_WEIGHTS_END]:
        parts.append("the weights differ")
    if found[_WEIGHTS_END:] != wanted[_WEIGHTS_END:]:
        parts.append("the tokenizer differs")
    return " and ".join(parts)
