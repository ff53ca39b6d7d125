"""`large`: a 64 MiB actor beside a 1 KB one: its blackout, its bytes per second, and what its move costs others.

pre-copied     the blackout of the 64 MiB actor, at rest and getting commands; its floor is the blackout of a 1 KB actor
cold           bytes per second of the `send` step when nothing was copied before the pause; its floor is raw NATS
               chunks with an acknowledgement window between two processes like the nodes
ask            latency of a query to another actor while the 64 MiB actor moves; its floor is the same, idle
"""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any

from bench import raw_chunks
from bench.cluster import BenchCluster, bench_cluster
from bench.results import Result, percentile
from routing.address import ActorId, shard_of
from routing.settings import Settings
from workflows.records import MigrationStatus, Move

STATE_BYTES, RUNS, ASKING_S = 64 * 2**20, 7, 1.5
ASK_EVERY_S, TOUCH_EVERY_S = 0.003, 0.05
MORE_RUNS = 5
NO_PRECOPY = {"FERRY_PRECOPY_FROM_BYTES": str(2**40)}
LARGE = ActorId("large", "one")


async def measure(state_bytes: int = STATE_BYTES, runs: int = RUNS, asking_s: float = ASKING_S) -> list[Result]:
    results = []
    async with bench_cluster("ab") as bench:
        await bench.client.send_message(LARGE, "grow", {"size_bytes": state_bytes, "seed": 1}, timeout=30)
        results += await _blackouts(bench, runs)
        results += await _asks(bench, runs, asking_s)
    async with bench_cluster("ab", env=NO_PRECOPY) as bench:
        await bench.client.send_message(LARGE, "grow", {"size_bytes": state_bytes, "seed": 1}, timeout=30)
        results += await _cold(bench, state_bytes, runs)
    return results


async def _blackouts(bench: BenchCluster, runs: int) -> list[Result]:
    """Moves of the small and of the large actor alternate, so that all see the same machine."""
    small = await _small_actor(bench, "small")
    of_small, at_rest, in_use = [], [], []
    for _ in range(runs + 1):
        of_small.append(_blackout_ms(await _move(bench, small)))
        at_rest.append(_blackout_ms(await _move(bench, LARGE)))
        touching = asyncio.create_task(_touch(bench))
        in_use.append(_blackout_ms(await _move(bench, LARGE)))
        touching.cancel()
    return [  # the first of each warms connections up
        _beside("pre-copied, blackout", at_rest[1:], of_small[1:], "ms"),
        _beside("pre-copied, in use, blackout", in_use[1:], of_small[1:], "ms"),
    ]


async def _touch(bench: BenchCluster) -> None:
    """Commands to the large actor, one at a time: what was copied ahead is never its latest state."""
    while True:
        await bench.client.send_message(LARGE, "touch", {}, timeout=30)
        await asyncio.sleep(TOUCH_EVERY_S)


async def _asks(bench: BenchCluster, runs: int, asking_s: float) -> list[Result]:
    """Queries to an actor beside the large one, on a schedule: at rest, and from the launch of a move to its end."""
    results = []
    for kind in ("destination", "source"):
        idle, moving = [], []
        for run in range(runs + MORE_RUNS):
            if run >= runs and moving:
                break  # else a small state has always moved before anything was asked: once more
            source = await bench.client.get_actor_node(LARGE)
            asked = await _small_actor(bench, "asked", on=source if kind == "source" else _other(source))
            at_rest = await _ask_while(bench, asked, asyncio.create_task(asyncio.sleep(asking_s)))
            going_on = asyncio.create_task(_move(bench, LARGE))
            asks = await _ask_while(bench, asked, going_on)
            move = going_on.result()
            assert move.started_at is not None
            assert move.finished_at is not None
            idle += [took_ms for _, took_ms in at_rest]
            moving += [took_ms for at, took_ms in asks if move.started_at <= at <= move.finished_at]
        results.append(_beside(f"ask at the {kind} meanwhile", moving, idle, "ms", runs=runs))
    return results


async def _cold(bench: BenchCluster, state_bytes: int, runs: int) -> list[Result]:
    settings = Settings.load()
    rates, floors, blackouts = [], [], []
    for _ in range(runs + 1):
        move = await _move(bench, LARGE)
        assert move.sent_at is not None
        assert move.serialized_at is not None
        rates.append(state_bytes / (move.sent_at - move.serialized_at) / 1e6)
        blackouts.append(_blackout_ms(move))
        [took_s] = await asyncio.to_thread(
            raw_chunks.measure, bench.local.servers.nats_url, state_bytes, settings.chunk_bytes,
            settings.transfer_window_bytes,
        )  # fmt: skip
        floors.append(state_bytes / took_s / 1e6)
    raw_s = [state_bytes / rate / 1e3 for rate in floors]  # in ms
    return [
        _beside("cold, rate of the send step", rates[1:], floors[1:], "MB/s"),
        _beside("cold, blackout", blackouts[1:], raw_s[1:], "ms"),
    ]


async def _ask_while(bench: BenchCluster, actor: ActorId, going_on: asyncio.Task[Any]) -> list[tuple[float, float]]:
    """(when, milliseconds) of one query every few, until `going_on` is done.

    On a schedule, whether the ones before were answered or not: else there would be few queries in slow times.
    """
    took: list[tuple[float, float]] = []

    async def ask() -> None:
        at, began_s = time.time(), time.perf_counter()
        await bench.client.send_message(actor, "count", {})
        took.append((at, (time.perf_counter() - began_s) * 1000))

    async with asyncio.TaskGroup() as asking:
        while not going_on.done():
            asking.create_task(ask())
            await asyncio.sleep(ASK_EVERY_S)
    return took


async def _small_actor(bench: BenchCluster, key: str, *, on: str | None = None) -> ActorId:
    """A 1 KB actor in another shard than the large one's; `on` a certain node when that is given."""
    shards = bench.context.directory.shards_total
    taken = shard_of(LARGE, shards)
    for number in range(100 * shards):
        actor = ActorId("blob", f"{key}-{number}")
        if shard_of(actor, shards) != taken and on in (None, await bench.client.get_actor_node(actor)):
            await bench.client.send_message(actor, "fill", {"text": secrets.token_hex(512)})
            return actor
    raise RuntimeError(f"no shard is on node {on}")


async def _move(bench: BenchCluster, actor: ActorId) -> Move:
    here = await bench.client.get_actor_node(actor)
    shard = shard_of(actor, bench.context.directory.shards_total)
    move = await bench.migrate(shard, _other(here))
    if move.status is not MigrationStatus.COMPLETED:
        raise RuntimeError(f"move {move.id} ended {move.status}: {move.error}")
    return move


def _other(node: str | None) -> str:
    return "b" if node == "a" else "a"


def _blackout_ms(move: Move) -> float:
    if move.blackout_ms is None:
        raise RuntimeError(f"move {move.id} ended without a blackout: {move.error}")
    return move.blackout_ms


def _beside(case: str, values: list[float], floors: list[float], unit: str, *, runs: int = 0) -> Result:
    return Result(
        case=case, value=percentile(values, 0.5), unit=unit, floor=percentile(floors, 0.5), runs=runs or len(values),
        p50=percentile(values, 0.5), p99=percentile(values, 0.99),
    )  # fmt: skip
