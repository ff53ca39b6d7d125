"""`chain`: a bare six-step no-op Celery chain on Ferry's worker settings. It is the floor of a move, so it has none."""

from __future__ import annotations

import asyncio
import time

from bench.cluster import bench_cluster
from bench.results import Result, percentile

CHAINS, WINDOWS, TIMEOUT_S = 200, (1, 4, 8), 60.0


async def measure() -> list[Result]:
    async with bench_cluster() as bench:
        from bench import noop  # reads the cluster's settings when imported

        worker = bench.start_noop_worker()
        try:
            await asyncio.to_thread(noop.run, ["warm-up"], window=1, timeout_s=TIMEOUT_S)
            results = []
            for window in WINDOWS:
                began_s = time.perf_counter()
                ids = [f"{window}-{n}" for n in range(CHAINS)]
                took = await asyncio.to_thread(noop.run, ids, window=window, timeout_s=TIMEOUT_S)
                elapsed_s = time.perf_counter() - began_s
                results += [
                    Result(
                        case=f"window {window}, pause to delete", value=percentile(took, 0.5), unit="ms",
                        runs=CHAINS, p50=percentile(took, 0.5), p99=percentile(took, 0.99),
                    ),
                    Result(case=f"window {window}, rate", value=CHAINS / elapsed_s, unit="chains/s", runs=CHAINS),
                ]  # fmt: skip
            return results
        finally:
            worker.terminate(10)
