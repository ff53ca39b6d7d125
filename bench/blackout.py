"""`blackout`: how long one idle 1 KB actor stops when it moves, beside a no-op chain on the same worker settings.

Moves and no-op chains alternate, so that both see the same machine. Each run has workers of its own, of either kind:
how fast a process is differs a little from one start to the next.
"""

from __future__ import annotations

import asyncio
import secrets

from bench.cluster import BenchCluster, bench_cluster
from bench.results import Result, percentile
from routing.address import ActorId, shard_of

RUNS, MOVES, WARM_UP, TIMEOUT_S = 5, 16, 2, 60.0
ACTOR = ActorId("blob", "one")


async def measure(*, runs: int = RUNS, moves: int = MOVES) -> list[Result]:
    blackouts, floors = [], []
    async with bench_cluster("ab") as bench:
        await bench.client.send_message(ACTOR, "fill", {"text": secrets.token_hex(512)})
        for run in range(runs):
            if run:
                await asyncio.to_thread(bench.local.remove, "worker-1")
                bench.local.add_worker()
            for blackout_ms, floor_ms in await _side_by_side(bench, f"run-{run}", moves):
                blackouts.append(blackout_ms)
                floors.append(floor_ms)
    return [
        Result(
            case=f"1 KB actor, idle, {name}", value=percentile(blackouts, share), unit="ms",
            floor=percentile(floors, share), runs=len(blackouts), p50=percentile(blackouts, 0.5),
            p99=percentile(blackouts, 0.99),
        )
        for name, share in (("p50", 0.5), ("p99", 0.99))
    ]  # fmt: skip


async def _side_by_side(bench: BenchCluster, run: str, moves: int) -> list[tuple[float, float]]:
    """(blackout, pause to delete of a no-op chain) in milliseconds, of moves to and fro and chains in between."""
    from bench import noop  # reads the cluster's settings when imported

    worker = bench.start_noop_worker()
    try:
        shard, measured = shard_of(ACTOR, bench.context.directory.shards_total), []
        for number in range(WARM_UP + moves):
            here = await bench.client.get_actor_node(ACTOR)
            move = await bench.migrate(shard, "b" if here == "a" else "a")
            if move.blackout_ms is None:
                raise RuntimeError(f"move {move.id} ended {move.status} without a blackout: {move.error}")
            (floor_ms,) = await asyncio.to_thread(noop.run, [f"{run}-{number}"], window=1, timeout_s=TIMEOUT_S)
            measured.append((move.blackout_ms, floor_ms))
        return measured[WARM_UP:]
    finally:
        worker.terminate(10)
