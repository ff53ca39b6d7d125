"""Redis as far as workflows/store.py uses it: compare-and-set saves whose answers may be lost, and outages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from contextvars import Context
from dataclasses import replace
from random import Random
from typing import Any, TypeVar

from routing.errors import NotApplicable, Unavailable, WrongSequence
from workflows.records import TERMINAL, ActorRow, ClusterEvent, MigrationPlan, MigrationStatus, Move

T = TypeVar("T")

TIMEOUT_S = 0.5


class Shelf:
    """What `RecordStore` promises, with its semantics, in memory. `trouble` is the chance of each kind of fault."""

    def __init__(self, chance: Random) -> None:
        self.away, self.trouble, self.faults = False, 0.0, 0
        self.moves_by_id: dict[str, Move] = {}
        self.plans_by_id: dict[str, MigrationPlan] = {}
        self.listed: dict[str, None] = {}
        self.rows: dict[str, dict[int, ActorRow]] = {}
        self.saved: list[Move] = []
        self._chance = chance
        self._outside = Context()

    # -- the way there and back --------------------------------------------------------------------------------------
    async def _trip(self, operation: Callable[[], T]) -> T:
        loop, chance = asyncio.get_running_loop(), self._chance
        future: asyncio.Future[T] = loop.create_future()
        lost = chance.random() if self.trouble else 1.0
        lost_on_the_way, lost_on_the_way_back = lost < self.trouble, lost < 2 * self.trouble
        self.faults += lost_on_the_way_back

        def arrive() -> None:
            if self.away:
                return
            try:
                answer, failed = operation(), None
            except (WrongSequence, NotApplicable) as error:
                answer, failed = None, error
            if not lost_on_the_way_back and not self.away:
                loop.call_later(chance.uniform(0.0002, 0.002), _settle, future, answer, failed, context=self._outside)

        if not lost_on_the_way:
            loop.call_later(chance.uniform(0.0002, 0.002), arrive, context=self._outside)
        gone = Unavailable("Redis does not serve")
        timer = loop.call_later(TIMEOUT_S, _settle, future, None, gone)
        try:
            return await future
        finally:
            timer.cancel()

    # -- plans -------------------------------------------------------------------------------------------------------
    async def create_plan(
        self, plan: MigrationPlan, moves: Sequence[Move], actors: Mapping[str, Sequence[ActorRow]]
    ) -> list[Move]:
        def begin() -> None:
            self.plans_by_id.setdefault(plan.id, replace(plan, total=0, completed=0, failed=0))

        await self._trip(begin)
        stored = []
        for move in moves:
            stored.append(await self.save(move, actors=actors.get(move.id, ())))
        await self._trip(lambda: self.listed.setdefault(plan.id))
        return stored

    async def save_plan(self, plan: MigrationPlan) -> MigrationPlan:
        def save() -> MigrationPlan:
            stored = self.plans_by_id.get(plan.id)
            if stored is None:
                raise NotApplicable(f"plan {plan.id} is not stored")
            stored = self.plans_by_id[plan.id] = replace(
                stored,
                started_at=stored.started_at or plan.started_at,
                finished_at=stored.finished_at or plan.finished_at,
                cancelled=stored.cancelled or plan.cancelled,
            )
            return stored

        return await self._trip(save)

    async def plan(self, plan_id: str) -> MigrationPlan | None:
        return await self._trip(lambda: self.plans_by_id.get(plan_id))

    async def running_plans(self) -> list[MigrationPlan]:
        return await self._trip(self.running_now)

    def running_now(self) -> list[MigrationPlan]:
        return [self.plans_by_id[plan_id] for plan_id in self.listed if not self.plans_by_id[plan_id].finished_at]

    # -- moves -------------------------------------------------------------------------------------------------------
    async def save(self, move: Move, *, actors: Sequence[ActorRow] = (), through: Sequence[Move] = ()) -> Move:
        return await self._trip(lambda: self._save(move, actors, through))

    def _save(self, move: Move, actors: Sequence[ActorRow], through: Sequence[Move]) -> Move:
        stored, after = self.moves_by_id.get(move.id), replace(move, revision=move.revision + 1)
        if (stored.revision if stored else 0) != move.revision:
            if move.revision == 0 and stored == after:
                return after  # a creation repeated word for word
            raise WrongSequence(f"move {move.id} is stored at another revision: read it again")
        self.moves_by_id[move.id] = after
        rows = self.rows.setdefault(move.id, {})
        rows.update({row.index: row for row in actors})
        if MigrationStatus.CAPTURED in [step.status for step in (*through, move)]:
            self.rows[move.id] = {index: row for index, row in rows.items() if index < move.actors_total}
        self.saved.append(after)
        self._count(stored, after)
        return after

    def _count(self, before: Move | None, after: Move) -> None:
        plan = self.plans_by_id.get(after.plan_id)
        if plan is None:
            return
        if before is None:
            plan = replace(plan, total=plan.total + 1)
        if after.status in TERMINAL and (before is None or before.status not in TERMINAL):
            if after.status is MigrationStatus.COMPLETED:
                plan = replace(plan, completed=plan.completed + 1)
            else:
                plan = replace(plan, failed=plan.failed + 1)
        self.plans_by_id[plan.id] = plan

    async def move(self, move_id: str) -> Move | None:
        return await self._trip(lambda: self.moves_by_id.get(move_id))

    async def moves_named(self, ids: Sequence[str]) -> list[Move]:
        return await self._trip(lambda: [self.moves_by_id[name] for name in ids if name in self.moves_by_id])

    async def moves(
        self, plan_id: str | None = None, limit: int = 100, status: MigrationStatus | None = None
    ) -> list[Move]:
        def look() -> list[Move]:
            found = [m for m in self.moves_by_id.values() if plan_id in (None, m.plan_id)]
            return [m for m in found if status in (None, m.status)][:limit]

        return await self._trip(look)

    async def unfinished_moves(self) -> list[Move]:
        return await self._trip(self.unfinished_now)

    def unfinished_now(self) -> list[Move]:
        found = [move for move in self.moves_by_id.values() if move.status not in TERMINAL]
        return sorted(found, key=lambda move: (move.created_at, move.id))

    async def unreadable_moves(self, *, besides: Collection[str]) -> dict[str, int]:
        return {}

    async def end_unreadable_plans(self, *, besides: Collection[str], now: float) -> list[str]:
        return []

    async def actors(self, move_id: str) -> list[ActorRow]:
        return await self._trip(lambda: [row for _, row in sorted(self.rows.get(move_id, {}).items())])

    # -- the rest ----------------------------------------------------------------------------------------------------
    async def trim(self, keep: int) -> int:
        return 0

    async def note(self, event: ClusterEvent) -> None:
        return None

    async def close(self) -> None:
        return None


def _settle(future: asyncio.Future[Any], answer: Any, failed: Exception | None) -> None:
    if future.done():
        return
    if failed is not None:
        future.set_exception(failed)
    else:
        future.set_result(answer)
