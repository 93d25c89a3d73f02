"""The digest of a tokenizer: of what it makes of text, not of its files. Standard library alone.

The same tokenizer may lie as `tokenizer.json`, or as `vocab.txt` and a configuration; libraries
rewrite the one and read the other each in their own way. So it is asked: which tokens it knows, and
what it makes of some texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, Protocol

# Case and accents, composed and not; letters of many scripts; numbers, white space of many kinds,
# what joins and what controls, emoji of one and of several characters, a private character.
_PROBES: Final = (
    "The QUICK brown fox can't jump over 3 lazy dogs, don't you think? I'M sure we'll see: "
    "McDonald unbelievably misunderstood antidisestablishmentarianism, re-tokenization & such.",
    "Caf\u00e9 cafe\u0301 na\u00efve \u00c5ngstr\u00f6m A\u030angstro\u0308m Stra\u00dfe "
    "STRASSE \u0130stanbul \u0131rmak \u0141\u00f3d\u017a \ufb01ne \uff26\uff35\uff2c\uff2c",
    "\u0411\u043e\u043b\u044c\u0448\u043e\u0439 \u043f\u0440\u0438\u0432\u0435\u0442 "
    "\u0395\u03bb\u03bb\u03ac\u03b4\u03b1 \u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2 "
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947 "
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u6771\u4eac\u90fd \u4f60\u597d\u4e16\u754c "
    "\u3053\u3093\u306b\u3061\u306f \u30ab\u30bf\u30ab\u30ca \ud55c\uad6d\uc5b4 "
    "\u1112\u1161\u11ab",
    "1234567890 3.14159 -7e+10 1,000,000 50% $9.99 x=y**2; 2026-11-21T18:45 \u0663\u0664 "
    "\u00bd \u2167 \u00b2",
    "  two  spaces\tand a tab\nlines\r\n\n  ends \u00a0\u2003\u3000\u200b\u00ad\ufeff\u2028 ",
    "\U0001f642 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7 \u2764\ufe0f "
    "\U0001d4d0 \ue000 \x01 \x7f \ufffd",
    "def f(self, *args): return {'a': [x for x in args if x != None]}  # <b>&amp;</b> "
    "https://example.org/?q=a+b#c @user #tag (c) \u2014 \u201cquoted\u201d \u2026 ``''",
)

# Of a fingerprint's digits the first half is of the weights: see fingerprint.py.
_WEIGHTS_END: Final = len("sha256:") + 32
_JOINED_MAX: Final = 500


class Encode(Protocol):
    """Token ids of a text, or of a pair, and the segment of each where the model takes any."""

    def __call__(
        self, text: str, pair: str | None = None, *, special: bool = True
    ) -> tuple[Sequence[int], Sequence[int] | None]: ...


def tokenizer_digest(
    vocabulary: Mapping[str, int],
    added: Collection[str],
    pad_id: int,
    end_id: int | None,
    encode: Encode,
) -> str:
    """64 hex digits: the SHA-256 of what a device's ids depend on.

    Digested are every token with its id, the ids that fill batches up and end texts, and the ids of
    some texts: each alone, with and without the tokens that the model wants around a text, and
    beside the next as a pair. Some texts are the same for all; two are made of the tokenizer's own
    tokens, so that its rules are asked in its own language. `added` are the tokens that are found
    in a text before all else.
    """
    digest = hashlib.sha256(b"pf2lora tokenizer 1\n")
    for token, number in sorted(vocabulary.items()):
        digest.update(f"{number} {token!a}\n".encode())
    digest.update(f"pad {pad_id} end {end_id}\n".encode())
    texts = [*_PROBES, _joined(sorted(vocabulary)), _amid(sorted(added))]
    for text, after in zip(texts, [*texts[1:], texts[0]], strict=True):
        for found in (encode(text), encode(text, special=False), encode(text, after)):
            digest.update(f"{_plain(found)}\n".encode())
    return digest.hexdigest()


def _joined(tokens: Sequence[str]) -> str:
    """Some tokens from all over a vocabulary, two to a word."""
    some = tokens[:: 1 + len(tokens) // _JOINED_MAX]
    return " ".join(map("".join, zip(some, reversed(some), strict=True)))


def _amid(tokens: Sequence[str]) -> str:
    """Tokens within a word, in other case, and between spaces."""
    return "".join(f"a{one}b {one.upper()} {one.lower()} c  {one}  d" for one in tokens)


def _plain(found: tuple[Sequence[int], Sequence[int] | None]) -> tuple[list[int], list[int] | None]:
    ids, types = found
    return list(ids), None if types is None else list(types)


def digest_of_tokenizers(
    tokenizer: Any, *, pad_id: int, end_id: int | None, with_types: bool
) -> str:
    """The same of a `tokenizers.Tokenizer` that neither cuts nor fills up.

    `with_types` says that the model takes segments.
    """

    def encode(
        text: str, pair: str | None = None, *, special: bool = True
    ) -> tuple[Sequence[int], Sequence[int] | None]:
        found = tokenizer.encode(text, pair, add_special_tokens=special)
        return found.ids, found.type_ids if with_types else None

    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    return tokenizer_digest(tokenizer.get_vocab(), added, pad_id, end_id, encode)


def with_tokenizer(fingerprint: str, tokenizer_digest: str) -> str:
    """The fingerprint of a backbone of the same weights, whose tokenizer has that digest."""
    return (fingerprint[:_WEIGHTS_END] + tokenizer_digest)[: len(fingerprint)]
