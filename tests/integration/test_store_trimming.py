"""Records of the past are deleted, the oldest first, and everything that leads to them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import cast

from redis.asyncio import Redis

from tests.integration.stored import COMPLETED, all_saved, created, ended, ids, plan
from workflows.records import advance
from workflows.store import PAGE, RecordStore


async def test_trimming_deletes_the_oldest_terminal_moves_and_nothing_else(store: RecordStore) -> None:
    """Ten moves of two records: keeping eight leaves the four newest, or those that still run."""
    stored = await created(store, 5, "p1", 100.0) + await created(store, 5, "p2", 200.0)
    for move in stored[1:]:
        await ended(store, move)

    assert await store.trim(keep=8) == 12

    assert ids(await store.moves()) == ["p2-004", "p2-003", "p2-002", "p1-000"]
    assert ids(await store.moves(status=COMPLETED)) == ["p2-004", "p2-003", "p2-002"]
    assert ids(await store.migrations(shard=0)) == ["p1-000.0", "p1-000.1"]
    assert await store.move("p1-001") is None
    assert await store.actors("p1-001") == []
    assert await store.trim(keep=8) == 0


async def test_trimming_everything_leaves_only_what_still_runs(store: RecordStore, redis_url: str) -> None:
    """No key of a deleted move or plan stays; the audit stream does, bounded by itself."""
    stored = await created(store, PAGE + 3, "p1", 100.0)
    await all_saved(store, [advance(move, COMPLETED, now=300.0) for move in stored])
    await store.save_plan(replace(plan("p1"), finished_at=300.0))
    await created(store, 1, "p2", 200.0)

    assert await store.trim(keep=0) == 2 * (PAGE + 3)

    assert ids(await store.moves()) == ["p2-000"]
    assert ids(await store.plans()) == ["p2"]
    async with Redis.from_url(redis_url) as admin:
        left = {key.decode().removeprefix("ferry:test:") for key in cast("list[bytes]", await admin.keys())}
        assert await admin.get("ferry:test:records") == b"2"
        assert await admin.zrange("ferry:test:moves:status:planned", 0, -1) == [b"p2-000"]
    assert left == {
        "audit", "records", "moves", "moves:plan:p2", "moves:shard:0", "moves:status:planned", "moves:unfinished",
        "move:p2-000", "move:p2-000:rows", "plan:p2", "plans", "plans:running",
    }  # fmt: skip


async def test_two_coordinators_trimming_at_once_count_right(store: RecordStore, redis_url: str) -> None:
    """Each move is deleted by one of them, and the number of records stays true."""
    stored = await created(store, 40)
    await all_saved(store, [advance(move, COMPLETED, now=300.0) for move in stored])
    other = RecordStore.connect(redis_url, "test")

    deleted = await asyncio.gather(store.trim(keep=0), other.trim(keep=0))

    await other.close()
    assert sum(deleted) == 80
    async with Redis.from_url(redis_url) as admin:
        assert await admin.get("ferry:test:records") == b"0"
