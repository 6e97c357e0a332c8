"""How often one address may ask: a token bucket for each."""

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from fastapi.responses import JSONResponse

UNLIMITED_PATHS = ("/health", "/metrics")  # what operators read is never refused
SECOND = 1_000_000_000  # nanoseconds
BURST = 2  # seconds: a bucket holds the requests of so many
MOST_ADDRESSES = 1 << 16  # whose buckets are kept: some 10 MB


class RateLimit:
    """The buckets of all addresses. A full one is not kept: it is that of an address that has never asked.

    In any window of t seconds an address gets at most rate * t + burst requests. Times are whole nanoseconds, so this
    is exact. Where more than `most` buckets are not full, the one that was longest without a request is forgotten.

    Args:
        rate: Tokens that each bucket gets a second.
        most: Number of buckets kept.
    """

    def __init__(self, rate: float, most: int = MOST_ADDRESSES) -> None:
        self.rate = rate
        self.interval = math.ceil(SECOND / rate)  # nanoseconds in which a bucket gets a token
        self.burst = max(1, round(BURST * rate))  # tokens of a full bucket
        self.most = most
        self.full_at: OrderedDict[str, int] = OrderedDict()  # {address: when its bucket is full again}

    def take(self, address: str, now: int) -> int:
        """Takes a token from the bucket of an address.

        Args:
            address: The address.
            now: Nanoseconds of a clock that never goes back.

        Returns:
            0: there was one. Else nanoseconds until there is one; a request that is refused costs nothing.
        """
        full_at = max(self.full_at.get(address, now), now) + self.interval
        wait = full_at - now - self.burst * self.interval
        if wait > 0:
            return wait
        self.full_at[address] = full_at
        self.full_at.move_to_end(address)
        while len(self.full_at) > self.most or next(iter(self.full_at.values())) <= now:
            self.full_at.popitem(last=False)
        return 0


def check_rate(rate: float) -> None:
    """Raises ValueError if the rate is negative, not a number, or too small or too large to count in nanoseconds."""
    if not 0 <= rate <= SECOND or 0 < rate < 1 / SECOND:
        raise ValueError(f"--rate is {rate:g}: it must be a number of requests a second, such as 100; 0: no limit")


def find_bucket_address(address: str) -> str:
    """Whose bucket an address takes from: its own; all IPv6 addresses of a network (/64) share one, since a single
    machine has all of them."""
    try:
        parsed = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    return str(parsed.ipv4_mapped or ipaddress.IPv6Address(parsed.packed[:8] + bytes(8)))


def guard_request_rate(app: Any, limit: RateLimit, clock: Callable[[], int] = time.monotonic_ns) -> Any:
    """Wraps an ASGI app: answers 429 to an address that asks too often.

    Args:
        app: The app.
        limit: The buckets of all addresses.
        clock: Nanoseconds, never going back.

    Returns:
        The wrapped app.
    """

    async def guarded(scope, receive, send):
        if scope["type"] == "http" and scope["path"] not in UNLIMITED_PATHS:
            address = find_bucket_address(scope["client"][0] if scope.get("client") else "")
            if wait := limit.take(address, clock()):
                seconds = math.ceil(wait / SECOND)
                reason = f"more than {limit.rate:g} requests a second from one address: ask again in {seconds} s"
                refusal = JSONResponse({"detail": reason}, 429, {"retry-after": str(seconds)})
                return await refusal(scope, receive, send)
        return await app(scope, receive, send)

    return guarded
