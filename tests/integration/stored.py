"""Plans, moves and rows as the tests of the record store have them stored."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from workflows.records import ActorMigration, ActorRow, MigrationPlan, MigrationStatus, Move, advance
from workflows.store import RecordStore

PLANNED, PAUSED, CAPTURED, SERIALIZED, COMPLETED, ROLLED_BACK, FAILED, CANCELLED = (
    MigrationStatus(name)
    for name in ("planned", "paused", "captured", "serialized", "completed", "rolled_back", "failed", "cancelled")
)


def plan(plan_id: str = "p", created_at: float = 100.0) -> MigrationPlan:
    return MigrationPlan(id=plan_id, reason="node d joined", created_at=created_at, actors_total=3, state_bytes=30)


def moves(count: int, plan_id: str = "p", created_at: float = 100.0) -> list[Move]:
    return [
        Move(
            id=f"{plan_id}-{shard:03}", plan_id=plan_id, unit=f"shard.{shard}", shard=shard, source="a",
            destination="b", actors_total=2, created_at=created_at,
        )
        for shard in range(count)
    ]  # fmt: skip


def rows(move: Move, count: int = 2) -> list[ActorRow]:
    return [ActorRow(index=index, actor_id=f"cart/{move.shard}-{index}", state_bytes=10) for index in range(count)]


async def created(store: RecordStore, count: int, plan_id: str = "p", created_at: float = 100.0) -> list[Move]:
    """A stored plan of `count` moves with two actors each."""
    planned = moves(count, plan_id, created_at)
    return await store.create_plan(plan(plan_id, created_at), planned, {move.id: rows(move) for move in planned})


async def all_saved(store: RecordStore, changed: Iterable[Move]) -> list[Move]:
    return await asyncio.gather(*(store.save(move) for move in changed))


async def ended(store: RecordStore, move: Move, status: MigrationStatus = COMPLETED) -> Move:
    return await store.save(advance(move, status, now=300.0))


def ids(records: Iterable[Move | MigrationPlan | ActorMigration]) -> list[str]:
    return [record.id for record in records]
