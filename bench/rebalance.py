"""`rebalance`: a node joins a cluster whose actors are all in use, and gets its share of them.

floor of actors/s    one bare six-step chain for each actor, on the same worker settings, measured in the same run
floor of blackout    p50 of one idle 1 KB actor, measured beside each join before the load
commands             from an own process at a steady rate, to all actors in turn, while the shards move
"""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from bench.cluster import BenchCluster, bench_cluster, until
from bench.results import Result, percentile
from bench.sender import Sent, actor_name, read
from routing.address import ActorId
from workflows.local import LocalProcess
from workflows.records import MigrationPlan, MigrationStatus, Move

ACTORS, STATE_BYTES = 10_000, 1024
RATE = 200.0  # commands a second: a tenth of what sender, server and nodes can do together on two cores
RUNS, IDLE_MOVES, CHAINS, WINDOWS = 5, 8, 100, (4, 8)
FILLING, TIMEOUT_S, SETTLE_S = 256, 60.0, 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebalanced:
    """One join: the moves of its plan, the commands sent meanwhile, the memory it took (bytes, by process)."""

    moves: list[Move]
    sent: list[float]
    failed: list[str]
    before_ms: list[float]
    grown_bytes: dict[str, int]

    @property
    def actors(self) -> int:
        return sum(move.actors_total for move in self.moves)

    @property
    def took_s(self) -> float:
        """From the first launch to the last record's end."""
        return max(move.finished_at or 0.0 for move in self.moves) - min(move.started_at or 0.0 for move in self.moves)

    @property
    def blackouts_ms(self) -> list[float]:
        return [move.blackout_ms for move in self.moves if move.blackout_ms is not None]


async def measure(
    actors: int = ACTORS, *, runs: int = RUNS, rate: float = RATE, idle_moves: int = IDLE_MOVES, chains: int = CHAINS,
    env: dict[str, str] | None = None,
) -> list[Result]:  # fmt: skip
    """The node joins and leaves `runs` times, after so many idle moves and bare chains each time.

    `env` are further settings of the cluster, FERRY_SHARDS for instance.
    """
    joins, floors_per_s, idle_ms = [], [], list[float]()
    async with bench_cluster("ab", env=env) as bench:
        await fill(bench, [actor_name(number) for number in range(actors)])
        for run in range(runs):
            if run:
                await asyncio.to_thread(bench.local.remove, "node-c", grace_s=TIMEOUT_S)  # it drains itself
            # Both beside each join: the machine is not always alike.
            idle_ms += await idle_blackouts(bench, idle_moves)
            floors_per_s.append(await chain_rate(bench, chains))
            joins.append(await join(bench, actors, rate=rate))
    failed = [error for found in joins for error in found.failed]
    if failed:
        raise RuntimeError(f"{len(failed)} commands failed during the moves, the first: {failed[0]}")
    floor_per_s = percentile(floors_per_s, 0.5)
    return _results(f"{actors:,} actors", joins, floor_per_s=floor_per_s, idle_ms=percentile(idle_ms, 0.5))


def _results(case: str, joins: Sequence[Rebalanced], *, floor_per_s: float, idle_ms: float) -> list[Result]:
    blackouts = [found.blackouts_ms for found in joins]
    together = [blackout_ms for of_join in blackouts for blackout_ms in of_join]
    sent, before = ([ms for found in joins for ms in getattr(found, name)] for name in ("sent", "before_ms"))
    common: dict[str, Any] = {
        "unit": "ms", "floor": idle_ms, "p50": percentile(together, 0.5), "p99": percentile(together, 0.99),
    }  # fmt: skip
    rates = [found.actors / found.took_s for found in joins]
    return [
        Result(
            case=f"{case}, moved", value=percentile(rates, 0.5), unit="actors/s", floor=floor_per_s, runs=len(joins)
        ),
        *(
            Result(
                case=f"{case}, blackout {name}", runs=len(joins), **common,
                value=percentile([percentile(of_join, share) for of_join in blackouts], 0.5),
            )
            for name, share in (("p50", 0.5), ("p99", 0.99))
        ),
        Result(
            case=f"{case}, blackout p99, all joins together", value=common["p99"], runs=len(together), **common
        ),
        Result(
            case=f"{case}, slowest command", value=max(sent), unit="ms", floor=max(before), runs=len(sent),
            p50=percentile(sent, 0.5), p99=percentile(sent, 0.99),
        ),
        *(
            Result(
                case=f"{case}, memory of {name}, join {number}", value=found.grown_bytes[name] / 2**20, unit="MiB more"
            )
            for name in joins[0].grown_bytes
            for number, found in enumerate(joins, start=1) if number in (1, len(joins))
        ),
    ]  # fmt: skip


async def chain_rate(bench: BenchCluster, chains: int) -> float:
    """Bare chains a second at the best of a few windows: what one chain for each actor would allow."""
    from bench import noop  # reads the cluster's settings when imported

    worker = bench.start_noop_worker()
    try:
        await asyncio.to_thread(noop.run, ["warm-up"], window=1, timeout_s=TIMEOUT_S)
        rates = []
        for window in WINDOWS:
            began_s = time.perf_counter()
            ids = [f"rate-{window}-{n}" for n in range(chains)]
            await asyncio.to_thread(noop.run, ids, window=window, timeout_s=TIMEOUT_S)
            rates.append(chains / (time.perf_counter() - began_s))
        return max(rates)
    finally:
        worker.terminate(10)


async def idle_blackouts(bench: BenchCluster, moves: int) -> list[float]:
    """Of one idle 1 KB actor that goes to and fro by itself, in milliseconds."""
    actor = ActorId("blob", "idle")
    await bench.client.send_message(actor, "fill", {"text": secrets.token_hex(STATE_BYTES // 2)})
    return await bench.to_and_fro(actor, moves, alone=True)


async def fill(bench: BenchCluster, actors: Sequence[str]) -> None:
    """Bring every actor to life with its state."""
    names = iter(actors)

    async def one_after_the_other() -> None:
        for name in names:
            text = secrets.token_hex(STATE_BYTES // 2)
            await bench.client.send_message(name, "fill", {"text": text}, timeout=TIMEOUT_S)

    async with asyncio.TaskGroup() as group:
        for _ in range(FILLING):
            group.create_task(one_after_the_other())


async def join(bench: BenchCluster, actors: int, *, rate: float) -> Rebalanced:
    """Send commands, start node c, and wait until the plan that this makes has ended."""
    path = bench.local.servers.data_dir / "sent.json"
    sender = LocalProcess(
        "sender", [sys.executable, "-m", "bench.sender", str(actors), str(rate), str(path)],
        env=bench.local.environment(), log_path=bench.local.servers.data_dir / "logs" / "sender.log",
    ).start()  # fmt: skip
    try:
        await asyncio.sleep(SETTLE_S)
        before, joined_at = resident(bench), time.time()
        bench.local.add_node("c", actors="bench.actors")

        async def ended() -> MigrationPlan | None:
            plan = await bench.context.store.latest_plan()
            return plan if plan is not None and plan.created_at > joined_at and plan.finished_at is not None else None

        plan = await until(ended, "the plan after the join to end")
        moves = await bench.context.store.moves(plan_id=plan.id, limit=plan.total)
        after = resident(bench)
    finally:
        if sender.terminate(30) != 0:
            raise RuntimeError(f"the sender failed: {sender.log_tail()}")
    failed = [move for move in moves if move.status is not MigrationStatus.COMPLETED]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(moves)} moves ended {failed[0].status}: {failed[0].error}")
    return _rebalanced(moves, read(path), joined_at, {name: after[name] - size for name, size in before.items()})


def _rebalanced(moves: list[Move], sent: Sent, joined_at: float, grown_bytes: dict[str, int]) -> Rebalanced:
    began_at = min(move.started_at or 0.0 for move in moves)
    ended_at = max(move.finished_at or 0.0 for move in moves)
    return Rebalanced(
        moves=moves, sent=sent.during(began_at, ended_at), failed=sent.failed,
        before_ms=sent.during(0, joined_at), grown_bytes=grown_bytes,
    )  # fmt: skip


def resident(bench: BenchCluster) -> dict[str, int]:
    """Bytes of memory that the coordinator and the worker hold."""
    names = ("coordinator-1", "worker-1")
    return {name: psutil.Process(bench.local.processes[name].pid).memory_info().rss for name in names}
