"""The token bucket: an even rate, a bounded burst, first come first served."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from runtime.throttle import TokenBucket
from tests.unit.virtual_time import clock, run_virtually, virtually


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.integers(1, 1000), st.integers(0, 500))
def test_no_more_than_rate_and_burst_ever_passes(sizes: list[int], bytes_per_s: int, burst_bytes: int) -> None:
    """By any moment at most the burst, one more amount, and what the rate allows since the beginning has passed."""

    async def check() -> None:
        bucket, began_s, passed = TokenBucket(bytes_per_s, burst_bytes, clock=clock), clock(), 0
        for size in sizes:
            await bucket.take(size)
            passed += size
            assert passed <= burst_bytes + (clock() - began_s) * bytes_per_s + 1e-3
        assert clock() - began_s <= sum(sizes) / bytes_per_s + 1e-6

    run_virtually(check())


@virtually
async def test_rest_is_saved_up_to_the_burst_only() -> None:
    """A long silence does not allow a flood."""
    bucket = TokenBucket(100, 50, clock=clock)
    await asyncio.sleep(1000)
    began_s = clock()

    await bucket.take(50)
    at_once_s = clock() - began_s
    await bucket.take(100)

    assert at_once_s == 0
    assert abs(clock() - began_s - 1.0) < 1e-6


@virtually
async def test_who_comes_first_goes_first() -> None:
    """Several transfers share a bucket; a small amount does not overtake a large one, and none starves."""
    bucket, order = TokenBucket(100, 10, clock=clock), []

    async def take(name: str, size: int) -> None:
        await bucket.take(size)
        order.append(name)

    await asyncio.gather(take("large", 500), take("small", 1), take("next", 100))

    assert order == ["large", "small", "next"]
