"""`failover`: from kill -9 of a node to the first answer of one of its actors, beside the node's lease.

One node of several is killed after the other, and at once somebody asks one of its actors until that answers. The
first to be killed holds thousands of live actors and nobody asks them: what its end writes into the map and the logs
is what a failover costs before anybody uses the actors.
"""

from __future__ import annotations

import asyncio
import time

import nats

from bench.cluster import BenchCluster, bench_cluster, until
from bench.rebalance import fill
from bench.results import Result, percentile
from routing.address import ActorId
from routing.subjects import kv_stream, shard_key

NODES, ACTORS, TIMEOUT_S = "abcdefg", 10_000, 60.0
ALLOWANCE_S = 1.5  # the bar: lease plus this


async def measure(nodes: str = NODES, actors: int = ACTORS, env: dict[str, str] | None = None) -> list[Result]:
    async with bench_cluster(nodes, env=env) as bench:
        first, *others = nodes[:-1]  # the last one is left to take everything
        owned = await _fill_one_node(bench, first, actors)
        map_writes, appends = await _kill_and_count(bench, first)
        took_s = [await _kill_and_ask(bench, node) for node in others]
        lease_s = bench.context.settings.node_lease_s
    return [
        Result(
            case="kill -9 to first answer", value=percentile(took_s, 0.5), unit="s", floor=lease_s, runs=len(took_s),
            p50=percentile(took_s, 0.5), p99=percentile(took_s, 0.99),
        ),
        Result(
            case=f"slowest, beyond lease + {ALLOWANCE_S:g} s", value=max(took_s) - lease_s - ALLOWANCE_S, unit="s",
            runs=len(took_s),
        ),
        Result(case=f"{actors:,} actors unused: map writes", value=map_writes, unit="writes", floor=owned),
        Result(case=f"{actors:,} actors unused: appends", value=appends, unit="appends"),
    ]  # fmt: skip


async def _fill_one_node(bench: BenchCluster, node: str, actors: int) -> int:
    """Bring so many actors of one node to life; returns how many shards it owns."""
    directory = bench.context.directory
    names = (f"blob/{number}" for number in range(10**9))
    its_own = (name for name in names if directory.get_actor_node(ActorId.parse(name)) == node)
    await fill(bench, [next(its_own) for _ in range(actors)])
    return len(_shards_of(bench, node))


async def _kill_and_count(bench: BenchCluster, node: str) -> tuple[int, int]:
    """Kill a node whose actors nobody asks; returns the writes to the map and to the logs until others serve them."""
    shards = _shards_of(bench, node)
    before = await _written(bench)
    bench.local.processes[f"node-{node}"].kill9()

    async def taken_over() -> bool | None:
        entries = [bench.context.directory.get(shard_key(shard)) for shard in shards]
        owners = [entry.ownership for entry in entries if entry is not None]
        return True if all(o.owner != node and o.incarnation is not None for o in owners) else None

    await until(taken_over, f"the shards of {node} to be served by others")
    after = await _written(bench)
    return after[0] - before[0], after[1] - before[1]


async def _kill_and_ask(bench: BenchCluster, node: str) -> float:
    """Seconds from the kill to the first answer of an actor of that node."""
    shards = set(_shards_of(bench, node))
    names = (f"blob/asked-{node}-{number}" for number in range(10**9))
    actor = next(name for name in names if bench.context.directory.get_actor_node(ActorId.parse(name)) == node)
    assert shards
    await bench.client.send_message(actor, "touch")
    process = bench.local.processes[f"node-{node}"]
    began_s = time.perf_counter()
    process.send_signal(9)
    answer = await bench.client.send_message(actor, "touch", timeout=TIMEOUT_S)
    took_s = time.perf_counter() - began_s
    await asyncio.to_thread(process.kill9)
    if answer != 2:
        raise RuntimeError(f"{actor} counts {answer} of 2 commands after its node was killed")

    async def settled() -> bool | None:
        return True if not _shards_of(bench, node) else None

    await until(settled, f"every shard of {node} to be another's")
    return took_s


def _shards_of(bench: BenchCluster, node: str) -> list[int]:
    directory = bench.context.directory
    entries = {shard: directory.get(shard_key(shard)) for shard in range(directory.shards_total)}
    return [shard for shard, entry in entries.items() if entry is not None and entry.ownership.owner == node]


async def _written(bench: BenchCluster) -> tuple[int, int]:
    """Messages ever written to the map, and to the logs."""
    subjects = bench.context.subjects
    link = await nats.connect(bench.local.servers.nats_url)
    try:
        jetstream = link.jetstream()
        written = [
            (await jetstream.stream_info(name)).state.last_seq
            for name in (kv_stream(subjects.map_bucket), *(name for name, _ in subjects.log_streams()))
        ]
    finally:
        await link.close()
    return written[0], sum(written[1:])
