"""What becomes of planned moves that have not been launched when the cluster changes meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from routing.shard_map import abort, lock
from tests.unit.cluster import SmallCluster, cluster
from tests.unit.office import coordinator
from tests.unit.shelf import Shelf
from tests.unit.virtual_time import until, virtually
from workflows.coordinator import Coordinator
from workflows.planner import planned_move
from workflows.records import TERMINAL, ClusterEvent, MigrationStatus, Move, RebalanceRequest


class Noting(Shelf):
    """A shelf that keeps what happened to the cluster."""

    def __init__(self) -> None:
        super().__init__()
        self.happened: list[str] = []

    async def note(self, event: ClusterEvent) -> None:
        self.happened.append(event.what)


@dataclass
class Leader:
    """A coordinator that leads, over a shelf; what it launches goes nowhere."""

    process: Coordinator
    shelf: Noting
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
    shelf, launched = Noting(), list[Move]()
    process, serving, stopping = await coordinator(small, shelf=shelf, launched=launched)
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


@virtually
async def test_a_move_by_hand_that_waits_survives_a_new_plan_which_leaves_its_shard_alone() -> None:
    """Who asked for it waits for it; what else was planned is decided anew."""
    async with cluster("a", "b", shards=6) as small:
        await small.directory.decide("shard.1", lambda view: lock(view, move="earlier", destination="b"))
        async with leader(small) as lead:
            lead.process.admission.forget_all()
            lead.shelf.stored.clear()
            await small.directory.decide("shard.2", lambda view: lock(view, move="earlier-2", destination="b"))
            await lead.plan("balance", "b", 2)
            await lead.plan("shard/1 by hand", "b", 1, plan_id="p2")

            await small.add("c")
            await until(lambda: any(move.destination == "c" for move in lead.shelf.stored.values()))

            (superseded,), (by_hand,) = lead.of_plan("p1"), lead.of_plan("p2")
            assert superseded.status is MigrationStatus.CANCELLED
            assert by_hand.status is MigrationStatus.PLANNED
            assert lead.of_shard(1) == [by_hand]

            await small.directory.decide("shard.1", lambda view: abort(view, move="earlier"))
            await until(lambda: by_hand.id in [move.id for move in lead.launched], within_s=3.0)


@virtually
async def test_a_move_by_hand_that_has_become_impossible_says_why() -> None:
    """Its destination drains."""
    async with cluster("a", "b", "c", shards=3) as small:
        await small.directory.decide("shard.1", lambda view: lock(view, move="earlier", destination="b"))
        async with leader(small) as lead:
            await lead.plan("shard/1 by hand", "b", 1, plan_id="p2")

            await drain(small, "b")
            await until(lambda: lead.of_plan("p2")[0].status in TERMINAL)

            assert lead.of_plan("p2")[0].error == "node b takes nothing now: `ferry status` says why"


@virtually
async def test_a_move_by_hand_survives_a_time_without_nats() -> None:
    """All leases ran out meanwhile; a leader that is back before the nodes are has not heard of its destination yet."""
    async with cluster("a", "b", shards=6) as small:
        await small.directory.decide("shard.1", lambda view: lock(view, move="earlier", destination="b"))
        async with leader(small) as lead:
            lead.process.suspended = True
            lead.process.admission.forget_all()
            lead.shelf.stored.clear()
            await lead.plan("shard/1 by hand", "b", 1, plan_id="p2")
            link: Any = lead.process._link
            for cut in (link.disconnect, *(running.cut for running in small.everyone)):
                cut()
            await asyncio.sleep(2 * small.settings.node_lease_s)

            link.reconnect()
            await until(lambda: lead.process._may_lead)
            assert lead.process.takers() == set()
            await asyncio.sleep(1.0)
            for running in small.everyone:
                running.heal()

            (by_hand,) = lead.of_plan("p2")
            assert by_hand.status is MigrationStatus.PLANNED
            await until(lambda: by_hand.id in [move.id for move in lead.launched])


@virtually
async def test_a_rebalance_that_is_asked_for_does_not_plan_again_what_waits() -> None:
    """It counts where it is going, as what is locked does."""
    async with cluster("a", "b", shards=4) as small:
        for shard in range(2):
            await small.directory.decide(
                f"shard.{shard}", lambda view: lock(view, move=f"m{view.epoch}", destination="b")
            )
        async with leader(small) as lead:
            lead.process.admission.forget_all()
            lead.process.suspended = True
            await small.directory.decide("shard.0", lambda view: abort(view, move=str(view.move)))
            await small.directory.decide("shard.1", lambda view: abort(view, move=str(view.move)))
            lead.process.admission._moves_at_once = 0
            await lead.plan("balance", "b", 0, 1)

            request = await lead.process.make_plan("asked for")

            assert request.moves == ()


@virtually
async def test_what_happens_is_told_in_the_right_number() -> None:
    """Events are read by people."""
    async with cluster("a", "b", shards=4) as small, leader(small) as lead:
        await lead.plan("balance", "b", 0)
        await lead.plan("drain", "b", 1, 2, plan_id="p2")

        await until(lambda: "plan p1, because balance: 1 move, 0 actors" in lead.shelf.happened)
        await until(lambda: "plan p2, because drain: 2 moves, 0 actors" in lead.shelf.happened)
