"""`blackout`: how long one idle 1 KB actor stops when it moves, beside a no-op chain on the same worker settings.

Moves and no-op chains alternate, so that both see the same machine.
"""

from __future__ import annotations

import asyncio
import secrets

from bench.cluster import bench_cluster
from bench.results import Result, percentile
from routing.address import ActorId, shard_of

MOVES, TIMEOUT_S = 40, 60.0


async def measure() -> list[Result]:
    async with bench_cluster("ab") as bench:
        from bench import noop  # reads the cluster's settings when imported

        worker = bench.start_noop_worker()
        try:
            actor = ActorId("blob", "one")
            await bench.client.send_message(actor, "fill", {"text": secrets.token_hex(512)})
            shard = shard_of(actor, bench.context.directory.shards_total)
            await asyncio.to_thread(noop.run, ["warm-up"], window=1, timeout_s=TIMEOUT_S)
            blackouts, floors = [], []
            for number in range(MOVES + 1):
                here = await bench.client.get_actor_node(actor)
                move = await bench.migrate(shard, "b" if here == "a" else "a")
                if move.blackout_ms is None:
                    raise RuntimeError(f"move {move.id} ended {move.status} without a blackout: {move.error}")
                floor = await asyncio.to_thread(noop.run, [f"m{number}"], window=1, timeout_s=TIMEOUT_S)
                if number:  # the first of each warms connections up
                    blackouts.append(move.blackout_ms)
                    floors += floor
            return [
                Result(
                    case=f"1 KB actor, idle, {name}", value=percentile(blackouts, share), unit="ms",
                    floor=percentile(floors, share), runs=MOVES, p50=percentile(blackouts, 0.5),
                    p99=percentile(blackouts, 0.99),
                )
                for name, share in (("p50", 0.5), ("p99", 0.99))
            ]  # fmt: skip
        finally:
            worker.terminate(10)
