"""Exact match and F1 of an answer, as SQuAD's own evaluation has them (Rajpurkar et al. 2016)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable
from typing import Final

_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)


def exact_match(said: str, wanted: Iterable[str]) -> bool:
    """Whether it is one of the wanted answers, but for case, punctuation, articles and spaces."""
    return any(_words(said) == _words(one) for one in wanted)


def f1(said: str, wanted: Iterable[str]) -> float:
    """The harmonic mean of precision and recall in words, of the wanted answer that fits best."""
    return max(_overlap(_words(said), _words(one)) for one in wanted)


def _overlap(said: list[str], wanted: list[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    shared = (Counter(said) & Counter(wanted)).total()
    return 2 * shared / (len(said) + len(wanted))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()
