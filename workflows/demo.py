"""`ferry demo`: a month of flights replayed against a cluster that grows, shrinks and breaks meanwhile; then verified.

Every process is real: embedded NATS and Redis, node processes, a coordinator, a Celery worker, Flower. Each aircraft
is an actor, each flight one command with a message id. The truth is a group-by over the file.
"""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.flight_file import Flight, january, read_flights, totals_by_aircraft
from routing.address import ActorId
from routing.client import Cluster
from routing.directory import Directory
from routing.errors import FerryError, InvalidInput, Timeout
from routing.settings import DEFAULT_DATA_DIR, Settings
from workflows.context import StepContext, open_context
from workflows.local import EmbeddedServers, LocalCluster
from workflows.records import ActorMigration, MigrationStatus

SENDERS = 48  # each awaits its reply before it sends its next; an aircraft always has the same sender
RESEND_EVERY = 25  # every so many commands are sent twice under the same message id
DEFAULT_RATE = 800.0  # flights a second, so that a month takes half a minute
START_S, SETTLE_S, ANSWER_S = 30.0, 40.0, 30.0


@dataclass(slots=True)
class Report:
    """What the demo found; the fields of `ferry demo --json`."""

    flights: int
    aircraft: int
    acknowledged: int = 0
    rejected: int = 0
    rejected_reasons: dict[str, int] = field(default_factory=dict)
    sent_twice: int = 0
    lost: int = 0
    duplicated: int = 0
    mismatched: int = 0
    moves: int = 0
    rolled_back: int = 0
    rolled_back_reasons: dict[str, int] = field(default_factory=dict)
    migrations: int = 0
    migrations_per_s: float = 0.0
    blackout_ms: dict[str, float | None] = field(default_factory=dict)
    unfinished: int = 0
    seconds: float = 0.0
    events: list[dict[str, Any]] = field(default_factory=list)
    verified: bool = False


def run(flights: Path | None, rate: float | None, as_json: bool) -> int:
    """Run the demo; 0 when every aircraft's totals are right and every record is terminal, else 1.

    Raises InvalidInput for an unreadable file and a rate that is none, Unavailable when a process does not start.
    """
    if rate is not None and not 0 < rate < math.inf:
        raise InvalidInput(f"rate {rate:g}: must be finite and more than 0 flights a second")
    rows = read_flights(flights or january())
    data_dir = Path(DEFAULT_DATA_DIR) / f"demo-{time.time_ns():x}"
    console = Console(stderr=as_json)
    cluster = LocalCluster(EmbeddedServers(data_dir), cluster="demo")
    try:
        with cluster:
            report = asyncio.run(_Demo(cluster, rows, rate or DEFAULT_RATE, console).run())
    except BaseException:
        console.print(f"logs of all processes: {data_dir / 'logs'}")
        raise
    if as_json:
        json.dump(asdict(report), sys.stdout)
        sys.stdout.write("\n")
    else:
        _print(report, console)
    if report.verified:
        shutil.rmtree(data_dir)
        return 0
    console.print(f"[red]not verified[/]; logs of all processes: {data_dir / 'logs'}")
    return 1


class _Demo:
    def __init__(self, cluster: LocalCluster, flights: list[Flight], rate: float, console: Console) -> None:
        self._cluster, self._flights, self._rate, self._console = cluster, flights, rate, console
        self._truth = totals_by_aircraft(flights)
        self._report = Report(flights=len(flights), aircraft=len(self._truth))
        self._began_s = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description:>12}"), BarColumn(bar_width=40), MofNCompleteColumn(),
            TimeElapsedColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._bar = self._progress.add_task("flights", total=len(flights))
        self._done = 0

    async def run(self) -> Report:
        for node in "abc":
            self._cluster.add_node(node)
        self._cluster.add_coordinator("1")
        self._cluster.add_worker("1")
        self._cluster.add_flower()
        servers = self._cluster.servers
        settings = Settings(nats_url=servers.nats_url, redis_url=servers.redis_url, cluster="demo")
        context = await self._until("the cluster is up", START_S, lambda: _try(lambda: open_context(settings)))
        try:
            await context.directory.start()
            await self._until("every shard is owned", START_S, lambda: _true(_owners(context.directory) == set("abc")))
            self._happened(f"nodes a, b, c own {context.directory.shards_total} shards")
            self._happened(f"Flower: {self._cluster.flower_url}/migrations")
            with self._progress:
                async with Cluster.connect(servers.nats_url, cluster="demo") as client:
                    async with asyncio.TaskGroup() as group:
                        group.create_task(self._send_all(client))
                        group.create_task(self._meanwhile(context, client))
                    await self._until("every move has ended", SETTLE_S, lambda: self._settled(context))
                    await self._verify(client)
            await self._account(context)
        finally:
            await context.directory.stop()
            await context.link.close()
            await context.store.close()
        report = self._report
        report.seconds = round(time.monotonic() - self._began_s, 1)
        report.verified = not (report.lost or report.duplicated or report.mismatched or report.unfinished)
        return report

    # -- the load --------------------------------------------------------------------------------------------------
    async def _send_all(self, client: Cluster) -> None:
        """Send every flight at the wished rate; the flights of one aircraft one after the other."""
        queues: list[asyncio.Queue[Flight | None]] = [asyncio.Queue(maxsize=64) for _ in range(SENDERS)]
        async with asyncio.TaskGroup() as group:
            for queue in queues:
                group.create_task(self._sender(client, queue))
            began_s = time.monotonic()
            for count, flight in enumerate(self._flights):
                ahead_s = count / self._rate - (time.monotonic() - began_s)
                if ahead_s > 0.01:
                    await asyncio.sleep(ahead_s)
                await queues[hash(flight.tail_number) % SENDERS].put(flight)
            for queue in queues:
                await queue.put(None)

    async def _sender(self, client: Cluster, queue: asyncio.Queue[Flight | None]) -> None:
        while (flight := await queue.get()) is not None:
            try:
                await self._send(client, flight)
                self._report.acknowledged += 1
            except InvalidInput as error:
                self._report.rejected += 1
                reason = "no tail number" if not flight.tail_number else str(error)
                self._report.rejected_reasons[reason] = self._report.rejected_reasons.get(reason, 0) + 1
            self._done += 1
            self._progress.update(self._bar, completed=self._done)

    async def _send(self, client: Cluster, flight: Flight) -> None:
        """Send one flight, now and then twice: the second answer must be the first one's."""
        actor = f"aircraft/{flight.tail_number}"
        times = 2 if self._done % RESEND_EVERY == 0 and flight.tail_number else 1
        answers = [
            await client.send_message(
                actor, "fly", flight.arguments, message_id=flight.message_id, timeout=ANSWER_S
            )
            for _ in range(times)
        ]  # fmt: skip
        if times == 2:
            self._report.sent_twice += 1
            self._report.duplicated += answers[0] != answers[1]

    # -- what happens meanwhile ------------------------------------------------------------------------------------
    async def _meanwhile(self, context: StepContext, client: Cluster) -> None:
        directory, cluster = context.directory, self._cluster
        await self._reach(0.15)
        # Node d refuses the first move that reaches it, ahead and once more: it rolls back, and a later plan moves it.
        cluster.add_node("d", env={"FERRY_FAILPOINTS": "stage_ahead=error*1,stage=error*1"})
        self._happened("node d joins; it will refuse the first move that reaches it")
        began_s = time.monotonic()
        share = directory.shards_total // 4
        await self._until("node d owns its share", SETTLE_S, lambda: _true(_count(directory, "d") >= share))
        self._happened(f"node d owns {_count(directory, 'd')} shards after {time.monotonic() - began_s:.1f} s")
        await self._reach(0.45)
        began_s = time.monotonic()
        self._happened("node b is told to stop (SIGTERM): it drains")
        status = await asyncio.to_thread(cluster.remove, "node-b", grace_s=SETTLE_S)
        took_s, left = time.monotonic() - began_s, _count(directory, "b")
        self._happened(f"node b left with status {status} after {took_s:.1f} s; it owns {left} shards")
        await self._reach(0.7)
        orphan = next(tail for tail in self._truth if directory.get_actor_node(ActorId("aircraft", tail)) == "c")
        shards = _count(directory, "c")
        cluster.processes["node-c"].kill9()
        cluster.remove("node-c")
        began_s = time.monotonic()
        self._happened(f"node c is killed (SIGKILL) with {shards} shards")
        await client.send_message(f"aircraft/{orphan}", "totals", timeout=ANSWER_S)
        self._happened(f"an actor of node c answers again after {time.monotonic() - began_s:.1f} s, from its journal")

    async def _reach(self, share: float) -> None:
        while self._done < share * len(self._flights):
            self._cluster.check_alive()
            await asyncio.sleep(0.05)

    async def _settled(self, context: StepContext) -> bool | None:
        self._cluster.check_alive()
        unfinished = await context.store.unfinished_moves()
        plans = await context.store.running_plans()
        return True if not unfinished and not plans else None

    # -- the truth -------------------------------------------------------------------------------------------------
    async def _verify(self, client: Cluster) -> None:
        """Ask every aircraft for its totals and compare them with the group-by."""
        bar = self._progress.add_task("verifying", total=len(self._truth))
        limit = asyncio.Semaphore(SENDERS)

        async def check(tail: str, expected: dict[str, Any]) -> None:
            async with limit:
                actual = await client.send_message(f"aircraft/{tail}", "totals", timeout=ANSWER_S)
            self._report.lost += max(0, expected["flights"] - actual["flights"])
            self._report.duplicated += max(0, actual["flights"] - expected["flights"])
            self._report.mismatched += actual != expected
            self._progress.advance(bar)

        async with asyncio.TaskGroup() as group:
            for tail, expected in self._truth.items():
                group.create_task(check(tail, expected))

    async def _account(self, context: StepContext) -> None:
        """Read from the records what the moves did."""
        report = self._report
        moves = await context.store.moves(limit=100_000)
        migrations = await context.store.migrations(limit=1_000_000)
        completed = [m for m in migrations if m.status is MigrationStatus.COMPLETED]
        plans = [p for p in await context.store.plans(limit=1_000) if p.started_at and p.finished_at]
        moving_s = sum(p.finished_at - p.started_at for p in plans if p.finished_at and p.started_at)
        report.moves, report.migrations = len(moves), len(completed)
        reasons = Counter(m.error or "unknown" for m in moves if m.status is MigrationStatus.ROLLED_BACK)
        report.rolled_back, report.rolled_back_reasons = reasons.total(), dict(reasons)
        report.unfinished = len(await context.store.unfinished_moves())
        report.migrations_per_s = round(len(completed) / moving_s, 1) if moving_s else 0.0
        report.blackout_ms = _percentiles(completed)

    # -- telling ---------------------------------------------------------------------------------------------------
    def _happened(self, what: str) -> None:
        at_s = round(time.monotonic() - self._began_s, 2)
        self._report.events.append({"t": at_s, "what": what})
        self._console.print(f"[dim]{at_s:7.2f} s[/]  {what}", highlight=False)

    async def _until(self, what: str, timeout_s: float, ask: Callable[[], Awaitable[Any]]) -> Any:
        """Ask until the answer is not None. Raises Timeout naming what did not come about."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            answer = await ask()
            if answer is not None:
                return answer
            self._cluster.check_alive()
            await asyncio.sleep(0.05)
        logs = self._cluster.servers.data_dir / "logs"
        raise Timeout(f"waited {timeout_s:g} s, but not so: {what}; look into {logs}")


async def _try(act: Callable[[], Awaitable[Any]]) -> Any:
    """What `act` returns, or None while a part of the cluster is not there yet."""
    try:
        return await act()
    except FerryError:
        return None


async def _true(condition: bool) -> bool | None:
    return True if condition else None


def _owners(directory: Directory) -> set[str]:
    entries = directory.entries().values()
    if len(entries) < directory.shards_total or any(e.ownership.incarnation is None for e in entries):
        return set()
    return {entry.ownership.owner for entry in entries}


def _count(directory: Directory, node: str) -> int:
    return sum(1 for entry in directory.entries().values() if entry.ownership.owner == node)


def _percentiles(migrations: list[ActorMigration]) -> dict[str, float | None]:
    """How long actors stopped, over all that were moved."""
    known = sorted(m.blackout_ms for m in migrations if m.blackout_ms is not None)
    if not known:
        return {"p50": None, "p99": None, "max": None}
    return {"p50": known[len(known) // 2], "p99": known[int(len(known) * 0.99)], "max": known[-1]}


def _print(report: Report, console: Console) -> None:
    reasons = ", ".join(f"{count} {reason}" for reason, count in report.rejected_reasons.items())
    blackout = report.blackout_ms
    lines = [
        f"flights        {report.flights:>8,}   of {report.aircraft:,} aircraft, in {report.seconds:g} s",
        f"acknowledged   {report.acknowledged:>8,}   {report.sent_twice:,} of them sent twice",
        f"rejected       {report.rejected:>8,}   {reasons}",
        f"lost           {report.lost:>8,}",
        f"duplicated     {report.duplicated:>8,}",
        f"mismatched     {report.mismatched:>8,}   totals compared with a group-by over the file",
        f"moves          {report.moves:>8,}   of shards; {report.rolled_back} rolled back,"
        f" {report.unfinished} unfinished",
        *(f"               {count:>8,}   {reason}" for reason, count in report.rolled_back_reasons.items()),
        f"migrations     {report.migrations:>8,}   live actors, {report.migrations_per_s:,} a second",
        f"blackout       {blackout.get('p50')!s:>8}   ms p50,"
        f" {blackout.get('p99')} ms p99, {blackout.get('max')} ms max",
    ]
    console.print("\n" + "\n".join(lines), highlight=False)
    if report.verified:
        console.print("[green]verified[/]: nothing lost, nothing applied twice, every record terminal", highlight=False)
