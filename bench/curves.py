"""`curves`: how blackout and throughput change with size. Each point of a curve is a result named `<curve>: <x>`."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from itertools import islice

from bench import rebalance
from bench.cluster import BenchCluster, bench_cluster
from bench.results import Result, percentile
from routing.address import ActorId, shard_of

ACTORS_PER_SHARD, STATE_BYTES, ACTORS = (1, 10, 100, 1_000), (2**10, 2**16, 2**20, 2**24), (1_000, 3_000, 10_000)
MOVES = 6

BLACKOUT_BY_ACTORS = "blackout over actors per shard"
BLACKOUT_BY_BYTES = "blackout over bytes of state"
RATE_BY_ACTORS = "actors/s over actors in the cluster"


async def measure(
    per_shard: Sequence[int] = ACTORS_PER_SHARD, state_bytes: Sequence[int] = STATE_BYTES,
    actors: Sequence[int] = ACTORS, moves: int = MOVES,
) -> list[Result]:  # fmt: skip
    results = []
    async with bench_cluster("ab") as bench:
        for shard, count in enumerate(per_shard):
            await rebalance.fill(bench, [str(actor) for actor in islice(_actors_of(bench, "blob", shard), count)])
            results.append(_point(BLACKOUT_BY_ACTORS, count, await _blackouts(bench, shard, moves)))
        for shard, size in enumerate(state_bytes, start=len(per_shard)):
            actor = next(_actors_of(bench, "large", shard))
            await bench.client.send_message(
                actor, "grow", {"size_bytes": size, "seed": secrets.randbelow(2**32)}, timeout=60.0
            )
            results.append(_point(BLACKOUT_BY_BYTES, size, await _blackouts(bench, shard, moves)))
    for count in actors:
        async with bench_cluster("ab") as bench:
            await rebalance.fill(bench, [rebalance.actor_name(number) for number in range(count)])
            found = await rebalance.join(bench, count, rate=rebalance.RATE)
        results.append(
            Result(
                case=f"{RATE_BY_ACTORS}: {count:,}", value=found.actors / found.took_s, unit="actors/s",
                runs=len(found.moves),
            )
        )  # fmt: skip
    return results


def _actors_of(bench: BenchCluster, actor_type: str, shard: int) -> Iterator[ActorId]:
    """Actors of that type which live in that shard, without end."""
    number = 0
    while True:
        number += 1
        actor = ActorId(actor_type, str(number))
        if shard_of(actor, bench.context.directory.shards_total) == shard:
            yield actor


async def _blackouts(bench: BenchCluster, shard: int, moves: int) -> list[float]:
    """Of the shard going to and fro, idle, in milliseconds."""
    return await bench.to_and_fro(next(_actors_of(bench, "blob", shard)), moves)


def _point(curve: str, x: int, took_ms: list[float]) -> Result:
    return Result(
        case=f"{curve}: {x:,}", value=percentile(took_ms, 0.5), unit="ms", runs=len(took_ms),
        p50=percentile(took_ms, 0.5), p99=percentile(took_ms, 0.99),
    )  # fmt: skip
