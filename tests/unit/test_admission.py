"""What becomes of planned moves that have not been launched when the cluster changes meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from tests.unit.cluster import SmallCluster, cluster
from tests.unit.shelf import Shelf
from tests.unit.virtual_time import clock, until, virtually, wall_clock
from workflows.coordinator import Coordinator
from workflows.planner import planned_move
from workflows.records import TERMINAL, MigrationStatus, Move, RebalanceRequest


@dataclass
class Leader:
    """A coordinator that leads, over a shelf; what it launches goes nowhere."""

    process: Coordinator
    shelf: Shelf
    launched: list[Move]

    async def plan(self, reason: str, destination: str, *shards: int, plan_id: str = "p1") -> None:
        """Queue moves of these shards from node a."""
        moves = [planned_move(f"shard.{n}", n, "a", destination, {}, reason=reason) for n in shards]
        await self.process.handle_rebalance_request(
            RebalanceRequest(plan_id=plan_id, reason=reason, moves=tuple(moves))
        )

    def of_plan(self, plan_id: str) -> list[Move]:
        return [move for move in self.shelf.stored.values() if move.plan_id == plan_id]

    def of_shard(self, shard: int) -> list[Move]:
        return [move for move in self.shelf.stored.values() if move.shard == shard]

    async def sees(self, node: str, state: str) -> None:
        await until(lambda: self.process.membership.alive()[node].state == state)


@contextlib.asynccontextmanager
async def leader(small: SmallCluster) -> AsyncIterator[Leader]:
    launched: list[Move] = []

    async def launch(*moves: Move) -> None:
        launched.extend(moves)

    shelf = Shelf()
    store: Any = shelf
    process = Coordinator(
        small.settings, name="c1", link=small.nats.link("c1"), store=store, launch=launch, clock=clock,
        wall_clock=wall_clock,
    )  # fmt: skip
    await process.start()
    stopping = asyncio.Event()
    serving = asyncio.create_task(process.serve(stopping))
    await until(lambda: process.leading)
    await asyncio.sleep(small.settings.debounce_s + 0.5)  # the plan of a new leader
    yield Leader(process, shelf, launched)
    stopping.set()
    await serving


async def drain(small: SmallCluster, node: str) -> None:
    await small.nodes[node].node._drain_asked(None)


@virtually
async def test_nothing_is_launched_to_a_node_that_has_just_begun_to_drain() -> None:
    """What it got it would have to give away again; the next plan comes only when membership is quiet."""
    async with cluster("a", "b", shards=4, debounce_s=5.0) as small, leader(small) as lead:
        lead.process.admission.forget_all()
        lead.launched.clear()
        await drain(small, "b")
        await lead.sees("b", "draining")

        await lead.plan("balance", "b", 1)
        await until(lambda: lead.of_plan("p1")[0].status in TERMINAL, within_s=3.0)

        assert lead.launched == []
        assert lead.of_plan("p1")[0].status is MigrationStatus.CANCELLED
        assert lead.of_plan("p1")[0].error == "node b takes nothing now: `ferry status` says why"
