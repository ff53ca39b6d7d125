"""A real local cluster for a benchmark, and moves made on it one by one or a few at once."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routing import control
from routing.address import ActorId, shard_of
from routing.client import Cluster
from routing.control import COORDINATOR
from routing.errors import Timeout, TransientError
from routing.settings import Settings
from workflows.context import StepContext, open_context
from workflows.local import EmbeddedServers, LocalCluster, LocalProcess
from workflows.records import TERMINAL, MigrationStatus, Move

WAIT_S = 60.0


@dataclass(slots=True)
class BenchCluster:
    local: LocalCluster
    context: StepContext
    client: Cluster

    async def migrate(self, what: int | ActorId, destination: str) -> Move:
        """Move a shard, or an actor, by hand and wait for its record to end.

        The map tells when there is something to read: to look for it all the time would take half a core from the move.
        """
        named = {"actor": str(what)} if isinstance(what, ActorId) else {"shard": what}
        asked = {**named, "destination": destination}
        answer = await control.ask(
            self.context.link, self.context.subjects, COORDINATOR, "migrate", asked, timeout_s=5.0
        )
        plan_id = answer["plan"]["id"]
        (move,) = await self.context.store.moves(plan_id=plan_id)
        await until(lambda: self._told(move), "the map to tell how the move ended")

        async def ended() -> Move | None:
            latest = await self.context.store.move(move.id)
            return latest if latest is not None and latest.status in TERMINAL else None

        found: Move = await until(ended, "the move to end", pause_s=0.002)
        return found

    async def _told(self, move: Move) -> bool | None:
        """True once the map names the move as the last of its unit, or its record has ended without the map."""
        entry = self.context.directory.get(move.unit)
        if entry is not None and entry.ownership.last is not None and entry.ownership.last.move == move.id:
            return True
        latest = await self.context.store.move(move.id)
        return True if latest is not None and latest.status in TERMINAL else None

    async def to_and_fro(
        self, actor: ActorId, moves: int, *, alone: bool = False, beside: Callable[[], Awaitable[None]] | None = None
    ) -> list[float]:
        """The blackouts of an idle actor's shard that goes between a and b, in milliseconds.

        `alone`: without the others of its shard, pinned. `beside` is awaited after each move that counts: what is to
        see the same machine.
        """
        what = actor if alone else shard_of(actor, self.context.directory.shards_total)
        blackouts: list[float] = []
        for number in range(moves + 2):
            here = await self.client.get_actor_node(actor)
            move = await self.migrate(what, "b" if here == "a" else "a")
            if move.status is MigrationStatus.CANCELLED and not number:
                continue  # the cluster has just come up, and its first plan took the place of this one
            if move.blackout_ms is None:
                raise RuntimeError(f"move {move.id} ended {move.status} without a blackout: {move.error}")
            if number >= 2:  # the first of each direction warms connections up
                blackouts.append(move.blackout_ms)
                if beside is not None:
                    await beside()
        return blackouts

    def start_noop_worker(self) -> LocalProcess:
        """A worker for the floor, with the settings of Ferry's own."""
        environment = self.local.environment()
        return LocalProcess(
            "noop-worker", [sys.executable, "-m", "celery", "-A", "bench.noop", "worker", "-n", "noop@%h"],
            env=environment, log_path=self.local.servers.data_dir / "logs" / "noop-worker.log",
        ).start()  # fmt: skip


@asynccontextmanager
async def bench_cluster(nodes: str = "ab", *, env: dict[str, str] | None = None) -> AsyncIterator[BenchCluster]:
    """Nodes, a coordinator and a worker over embedded servers in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="ferry-bench-") as folder:
        servers = EmbeddedServers(Path(folder))
        with LocalCluster(servers, cluster="bench", env=env) as local:
            os.environ |= {name: value for name, value in local.environment().items() if name.startswith("FERRY_")}
            for node in nodes:
                local.add_node(node, actors="bench.actors")
            local.add_coordinator()
            local.add_worker()
            context = await until(lambda: open_context(Settings.load()), "the cluster")
            try:
                await context.directory.start()
                await until(lambda: _owned(context), "every shard to be owned")
                async with Cluster.connect(servers.nats_url, cluster="bench") as client:
                    yield BenchCluster(local, context, client)
            finally:
                await context.directory.stop()
                await context.link.close()
                await context.store.close()


async def _owned(context: StepContext) -> bool | None:
    entries = context.directory.entries().values()
    bound = [entry for entry in entries if entry.ownership.incarnation is not None]
    return True if len(bound) == context.directory.shards_total else None


async def until(ask: Callable[[], Any], what: str, *, pause_s: float = 0.05) -> Any:
    """Await `ask()` until it answers something else than None. Raises Timeout naming `what`."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                answer = await ask()
            except TransientError:
                answer = None
            if answer is not None:
                return answer
            await asyncio.sleep(pause_s)
    raise Timeout(f"waited {WAIT_S:g} s for {what}")
