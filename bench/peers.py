"""Actor calls of peers between two processes.

`python -m bench.peers xoscar|ray SECONDS WINDOW` prints calls a second and the p50 in microseconds.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable

from bench.results import percentile
from bench.solo import per_second

LATENCIES = 500


async def _measure(call: Callable[[int], Awaitable[object]], seconds: float, window: int) -> None:
    await per_second(call, window=window, seconds=seconds / 4)
    rate = await per_second(call, window=window, seconds=seconds)
    took_us = []
    for _ in range(LATENCIES):
        began_s = time.perf_counter()
        await call(0)
        took_us.append((time.perf_counter() - began_s) * 1e6)
    print(rate, percentile(took_us, 0.5))


async def xoscar(seconds: float, window: int) -> None:
    import xoscar as xo

    class Counter(xo.Actor):
        def count(self) -> int:
            return 0

    pool = await xo.create_actor_pool("127.0.0.1:0", n_process=1)
    async with pool:
        address = pool.sub_processes and next(iter(pool.sub_processes))
        counter = await xo.create_actor(Counter, uid="counter", address=address)
        await _measure(lambda _: counter.count(), seconds, window)


async def ray(seconds: float, window: int) -> None:
    import ray as peer

    peer.init(log_to_driver=False, include_dashboard=False)

    @peer.remote
    class Counter:
        def count(self) -> int:
            return 0

    counter = Counter.remote()

    async def call(_: int) -> object:
        return await counter.count.remote()

    await _measure(call, seconds, window)
    peer.shutdown()


if __name__ == "__main__":
    asyncio.run({"xoscar": xoscar, "ray": ray}[sys.argv[1]](float(sys.argv[2]), int(sys.argv[3])))
