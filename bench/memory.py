"""`memory`: what an idle live actor costs its node beyond its state, and what a million known ids cost the cluster.

floor of an actor     its own instance with its state, made by hand in a bare Python process
floor of the ids      one map entry for each shard
"""

from __future__ import annotations

import asyncio
import gc
import secrets
import subprocess
import sys

import nats
import psutil

from bench.cluster import BenchCluster, bench_cluster
from bench.rebalance import fill
from bench.results import Result
from routing.address import ActorId
from routing.subjects import kv_stream

ACTORS, IDS, STATE_BYTES, SETTLE_S, ASKED = 20_000, 1_000_000, 1024, 1.0, 2_000


async def measure(actors: int = ACTORS, ids: int = IDS) -> list[Result]:
    async with bench_cluster("a") as bench:
        await fill(
            bench, [f"blob/warm-{number}" for number in range(max(actors // 10, 1))]
        )  # buffers and code, not actors
        before = await _resident(bench)
        await fill(bench, [f"blob/{number}" for number in range(actors)])
        per_actor = (await _resident(bench) - before) / actors
        entries = await _map_entries(bench)
        router_entries = await _ask_for(bench, ids)
        results = [
            Result(case="map entries after that", value=await _map_entries(bench), unit="entries", floor=entries),
            Result(case="router's map entries after that", value=router_entries, unit="entries", floor=entries),
        ]
    state = bare_bytes(actors)
    return [
        Result(case="idle live actor of 1 KB", value=per_actor, unit="B", floor=state, runs=actors),
        Result(case="idle live actor beyond its state", value=per_actor - state, unit="B", runs=actors),
        Result(case=f"{ids:,} actor ids asked for", value=ids, unit="ids"),
        *results,
    ]


async def _resident(bench: BenchCluster) -> int:
    await asyncio.sleep(SETTLE_S)  # answers on their way, and what the allocator gives back
    return int(psutil.Process(bench.local.processes["node-a"].pid).memory_info().rss)


async def _map_entries(bench: BenchCluster) -> int:
    """Shards' keys in the map, without what the cluster was born with."""
    link = await nats.connect(bench.local.servers.nats_url)
    try:
        bucket = kv_stream(bench.context.subjects.map_bucket)
        state = (await link.jetstream().stream_info(bucket, subjects_filter="$KV.*.shard.>")).state
        return len(state.subjects or ())
    finally:
        await link.close()


async def _ask_for(bench: BenchCluster, ids: int) -> int:
    """Route that many distinct actors, and query some of them; returns how many entries the client's map has then."""
    directory = bench.context.directory
    for number in range(ids):
        directory.get_actor_node(ActorId("blob", f"known-{number}"))
    names = iter(range(min(ids, ASKED)))

    async def query() -> None:
        for number in names:
            await bench.client.send_message(f"blob/known-{number}", "count")

    async with asyncio.TaskGroup() as group:
        for _ in range(64):
            group.create_task(query())
    return len(directory.entries())


def bare_bytes(actors: int) -> float:
    """Bytes of memory of one bare instance, in a process that does nothing else."""
    found = subprocess.run(
        [sys.executable, "-m", "bench.memory", str(actors)], stdout=subprocess.PIPE, check=True, text=True
    )
    return float(found.stdout)


def main(actors: int) -> None:
    from bench.actors import Blob

    gc.collect()
    before = psutil.Process().memory_info().rss
    kept = []
    for _ in range(actors):
        instance = Blob()
        instance.text = secrets.token_hex(STATE_BYTES // 2)
        kept.append(instance)
    print((psutil.Process().memory_info().rss - before) / len(kept))


if __name__ == "__main__":
    main(int(sys.argv[1]))
