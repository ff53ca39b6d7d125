"""Records in memory, for tests of those who write them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from typing import Any

from routing.errors import Unavailable, WrongSequence
from tests.unit.cluster import UNIT, SmallCluster
from tests.unit.virtual_time import wall_clock
from workflows.records import TERMINAL, MigrationPlan, Move


class Shelf:
    """The record store's compare-and-set in memory. `lose` answers of saves that did land; `before` runs first."""

    def __init__(self) -> None:
        self.stored: dict[str, Move] = {}
        self.plans: dict[str, MigrationPlan] = {}
        self.unreadable: dict[str, int] = {}  # id -> revision
        self.unreadable_plans: list[str] = []
        self.lose: Callable[[Move], bool] = lambda move: False
        self.before: Callable[[Move], Awaitable[None]] | None = None
        self.between: Callable[[], Awaitable[None]] | None = None

    async def save(self, move: Move, *, actors: Any = (), through: Any = ()) -> Move:
        if self.before is not None:
            await self.before(move)
        await asyncio.sleep(0)
        known = self.stored.get(move.id)
        if (known.revision if known else 0) != move.revision:
            raise WrongSequence(f"move {move.id} was saved by another")
        self.stored[move.id] = replace(move, revision=move.revision + 1)
        if self.lose(move):
            raise Unavailable("Redis does not serve (the answer was lost)")
        return self.stored[move.id]

    async def create_plan(self, plan: MigrationPlan, moves: list[Move], actors: Any) -> list[Move]:
        self.plans[plan.id] = plan
        stored = [await self.save(move) for move in moves]
        if self.between is not None:
            await self.between()
        return stored

    async def move(self, move_id: str) -> Move | None:
        await asyncio.sleep(0)
        return self.stored.get(move_id)

    async def moves_named(self, ids: Collection[str]) -> list[Move]:
        await asyncio.sleep(0)
        return [self.stored[move_id] for move_id in ids if move_id in self.stored]

    async def moves(self, plan_id: str | None = None, limit: int = 100) -> list[Move]:
        return [move for move in self.stored.values() if move.plan_id == plan_id][:limit]

    async def unfinished_moves(self) -> list[Move]:
        await asyncio.sleep(0)
        return [move for move in self.stored.values() if move.status not in TERMINAL]

    async def unreadable_moves(self, *, besides: Collection[str]) -> dict[str, int]:
        return dict(self.unreadable)

    async def end_unreadable(self, move_id: str, *, revision: int, now: float, error: str) -> bool:
        return self.unreadable.pop(move_id) == revision

    async def plan(self, plan_id: str) -> MigrationPlan | None:
        return self.plans.get(plan_id)

    async def save_plan(self, plan: MigrationPlan) -> MigrationPlan:
        self.plans[plan.id] = plan
        return plan

    async def running_plans(self) -> list[MigrationPlan]:
        return [plan for plan in self.plans.values() if plan.finished_at is None]

    async def end_unreadable_plans(self, *, besides: Collection[str], now: float) -> list[str]:
        ended, self.unreadable_plans = [plan_id for plan_id in self.unreadable_plans if plan_id not in besides], []
        return ended

    async def trim(self, keep: int) -> int:
        return 0

    async def note(self, event: Any) -> None: ...

    async def close(self) -> None: ...


def planned(number: int, shard: int = 0, *, plan_id: str = "p1") -> Move:
    return Move(
        id=f"m{number}", plan_id=plan_id, unit=f"shard.{shard}", shard=shard, source="a", destination="b",
        created_at=wall_clock() + number / 1000,
    )  # fmt: skip


async def planned_move(small: SmallCluster, shelf: Shelf) -> Move:
    entry = await small.directory.refresh(UNIT)
    assert entry is not None
    return await shelf.save(replace(planned(1), lock_revision=entry.revision, started_at=wall_clock()))
