"""A token bucket: how fast bytes may leave while others need the same network and the same event loops."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class TokenBucket:
    """Lets `bytes_per_s` pass, and at most `burst_bytes` at once after a rest. Whoever comes first goes first.

    Callers reserve their time and sleep until then, so nobody polls and none starves.
    """

    def __init__(self, bytes_per_s: float, burst_bytes: float, *, clock: Callable[[], float]) -> None:
        self._bytes_per_s, self._burst_s, self._clock = bytes_per_s, burst_bytes / bytes_per_s, clock
        self._paid_until_s = 0.0  # when everything let through so far would have been sent at the even rate

    async def take(self, size_bytes: int) -> None:
        """Return when `size_bytes` may leave. An amount over the burst passes too, late enough."""
        now_s = self._clock()
        self._paid_until_s = max(self._paid_until_s, now_s) + size_bytes / self._bytes_per_s
        wait_s = self._paid_until_s - self._burst_s - now_s
        if wait_s > 0:
            await asyncio.sleep(wait_s)
