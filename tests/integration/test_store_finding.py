"""Finding moves and migrations on a real Valkey, and nothing of another cluster."""

from __future__ import annotations

from typing import cast

import pytest
from redis.asyncio import Redis

from routing.errors import InvalidInput
from tests.integration.stored import COMPLETED, FAILED, PLANNED, created, ended, ids, rows
from workflows.records import ActorMigration
from workflows.store import PAGE, RecordStore
from workflows.store_saves import BATCH


async def test_moves_are_found_newest_first_by_plan_and_status(store: RecordStore) -> None:
    """Over more than one page, and never more than the limit."""
    await created(store, PAGE + 5, "p1", 100.0)
    (late, *_) = await created(store, 3, "p2", 200.0)
    await ended(store, late, FAILED)

    assert ids(await store.moves(limit=5)) == ["p2-002", "p2-001", "p2-000", f"p1-{PAGE + 4:03}", f"p1-{PAGE + 3:03}"]
    assert ids(await store.moves("p1", limit=1000)) == [f"p1-{n:03}" for n in reversed(range(PAGE + 5))]
    assert ids(await store.moves(status=FAILED)) == ["p2-000"]
    assert ids(await store.moves("p2", status=PLANNED)) == ["p2-002", "p2-001"]
    assert await store.moves("p1", status=FAILED) == []
    assert await store.moves("nobody") == []
    assert await store.moves(limit=0) == []


async def test_moves_are_found_by_their_ids(store: RecordStore) -> None:
    """In that order, without those that are not stored, however many."""
    stored = await created(store, BATCH + 2, "p1", 100.0)
    asked = [move.id for move in reversed(stored)]

    assert ids(await store.moves_named(["nobody", *asked])) == asked
    assert await store.moves_named([]) == []


async def test_migrations_are_found_by_everything_a_user_may_give(store: RecordStore) -> None:
    """Each filter alone and together; a filter that another index was chosen for still counts."""
    await created(store, PAGE + 1, "p1", 100.0)
    second = await created(store, 2, "p2", 200.0)
    await ended(store, second[1])

    assert ids(await store.migrations(limit=3)) == ["p2-001.0", "p2-001.1", "p2-000.0"]
    assert ids(await store.migrations(status=COMPLETED)) == ["p2-001.0", "p2-001.1"]
    assert len(await store.migrations(plan="p1", limit=1000)) == 2 * (PAGE + 1)
    assert ids(await store.migrations(shard=1)) == ["p2-001.0", "p2-001.1", "p1-001.0", "p1-001.1"]
    assert ids(await store.migrations(shard=1, plan="p1")) == ["p1-001.0", "p1-001.1"]
    assert ids(await store.migrations(shard=1, status=PLANNED)) == ["p1-001.0", "p1-001.1"]
    assert ids(await store.migrations(actor="cart/0-1")) == ["p2-000.1", "p1-000.1"]
    assert ids(await store.migrations(actor="cart/0-1", shard=0, plan="p2")) == ["p2-000.1"]
    assert await store.migrations(actor="cart/0-1", shard=1) == []
    assert await store.migrations(limit=0) == []


async def test_one_migration_is_found_by_its_id(store: RecordStore) -> None:
    """The join of its move and its row; None for one that is not stored, an error for no id at all."""
    (move,) = await created(store, 1)

    assert await store.migration("p-000.1") == ActorMigration.of(move, rows(move)[1])
    assert await store.migration("p-000.2") is None
    assert await store.migration("nobody.0") is None
    with pytest.raises(InvalidInput):
        await store.migration("p-000")


async def test_what_is_not_stored_is_none_or_empty(store: RecordStore) -> None:
    """An empty store has no errors."""
    assert await store.move("m") is None
    assert await store.plan("p") is None
    assert await store.actors("m") == []
    assert await store.moves() == []
    assert await store.migrations() == []
    assert await store.unfinished_moves() == []
    assert await store.audit() == []
    assert await store.trim(0) == 0


async def test_clusters_do_not_see_each_other(store: RecordStore, redis_url: str) -> None:
    """All keys carry the cluster's name."""
    await created(store, 1)
    neighbour = RecordStore.connect(redis_url, "neighbour")

    assert await neighbour.moves() == []
    assert await neighbour.latest_plan() is None
    await neighbour.close()
    async with Redis.from_url(redis_url) as admin:
        assert all(key.startswith(b"ferry:test:") for key in cast("list[bytes]", await admin.keys()))
