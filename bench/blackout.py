"""`blackout`: how long one idle 1 KB actor stops when it moves, beside a no-op chain on the same worker settings.

Moves and no-op chains alternate, so that both see the same machine. Each run has workers of its own, of either kind:
how fast a process is differs a little from one start to the next.
"""

from __future__ import annotations

import asyncio
import secrets

from bench.cluster import BenchCluster, bench_cluster
from bench.results import Result, percentile
from routing.address import ActorId

RUNS, MOVES, TIMEOUT_S = 5, 16, 60.0
ACTOR = ActorId("blob", "one")


async def measure(*, runs: int = RUNS, moves: int = MOVES) -> list[Result]:
    blackouts: list[float] = []
    floors: list[float] = []
    async with bench_cluster("ab") as bench:
        await bench.client.send_message(ACTOR, "fill", {"text": secrets.token_hex(512)})
        for run in range(runs):
            if run:
                await asyncio.to_thread(bench.local.remove, "worker-1")
                bench.local.add_worker()
            blackouts_ms, floors_ms = await _side_by_side(bench, f"run-{run}", moves)
            blackouts += blackouts_ms
            floors += floors_ms
    return [
        Result(
            case=f"1 KB actor, idle, {name}", value=percentile(blackouts, share), unit="ms",
            floor=percentile(floors, share), runs=len(blackouts), p50=percentile(blackouts, 0.5),
            p99=percentile(blackouts, 0.99),
        )
        for name, share in (("p50", 0.5), ("p99", 0.99))
    ]  # fmt: skip


async def _side_by_side(bench: BenchCluster, run: str, moves: int) -> tuple[list[float], list[float]]:
    """(blackouts, pause to delete of no-op chains) in milliseconds, of as many moves and chains in between."""
    from bench import noop  # reads the cluster's settings when imported

    floors_ms: list[float] = []

    async def chain(name: str) -> list[float]:
        return await asyncio.to_thread(noop.run, [f"{run}-{name}"], window=1, timeout_s=TIMEOUT_S)

    async def beside() -> None:
        floors_ms.extend(await chain(str(len(floors_ms))))

    worker = bench.start_noop_worker()
    try:
        await chain("warm-up")
        return await bench.to_and_fro(ACTOR, moves, beside=beside), floors_ms
    finally:
        worker.terminate(10)
