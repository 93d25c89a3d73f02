"""How often something may happen, by whom: token buckets.

A bucket holds what may happen at once and fills at a rate. Of those who have been quiet long enough
for theirs to be full nothing is remembered.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

KEYS_MAX: Final = 100_000


class Buckets:
    """One bucket a key, of `burst` tokens, filling at `rate_s` tokens a second; 0: no limit."""

    def __init__(self, rate_s: float, burst: float, clock: Callable[[], float]) -> None:
        self._rate_s = rate_s
        self._burst = burst
        self._clock = clock
        # When a bucket will be full, the least recently used first. Says all there is to say.
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def take(self, key: str) -> float:
        """Take a token and give 0; where there is none, the seconds until there is."""
        wait_s = self._wait_s(key)
        if wait_s <= 0:
            self._use(key)
            return 0.0
        return wait_s

    def spend(self, key: str) -> float:
        """Take a token in any case; the seconds to wait before going on, for its being borrowed."""
        wait_s = self._wait_s(key)
        self._use(key)
        return max(0.0, wait_s)

    def _wait_s(self, key: str) -> float:
        if not self._rate_s:
            return 0.0
        missing_s = self._full_at.get(key, 0.0) - self._clock()
        return missing_s - (self._burst - 1) / self._rate_s

    def _use(self, key: str) -> None:
        if not self._rate_s:
            return
        now = self._clock()
        self._full_at[key] = max(now, self._full_at.get(key, now)) + 1 / self._rate_s
        self._full_at.move_to_end(key)
        if len(self._full_at) > KEYS_MAX:
            self._full_at.popitem(last=False)


def network_of(host: str) -> str:
    """What of an address one party has: all of an IPv4 address, the first half of an IPv6 one."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
