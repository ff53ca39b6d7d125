"""Moves and plans on a real Valkey that cannot be read: damaged, lost, or of a later version."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import cast

import orjson
import pytest
from redis.asyncio import Redis

from routing.errors import WrongSequence
from tests.integration.stored import COMPLETED, FAILED, PAUSED, all_saved, created, ended, ids, plan
from workflows.records import Move, advance, from_document
from workflows.store import PAGE, RecordStore

LATER = b',"of_a_later_version":null}'


async def of_a_later_version(redis: Redis, move_id: str) -> None:
    document = cast(bytes, await redis.hget(f"ferry:test:move:{move_id}", "document"))
    await redis.hset(f"ferry:test:move:{move_id}", "document", document.removesuffix(b"}") + LATER)


async def damaged(redis: Redis, move_id: str) -> None:
    await redis.hset(f"ferry:test:move:{move_id}", "document", b"{")


async def lost(redis: Redis, move_id: str) -> None:
    await redis.delete(f"ferry:test:move:{move_id}")


UNREADABLE = [of_a_later_version, damaged, lost]


@pytest.mark.parametrize("spoil", UNREADABLE)
async def test_trimming_deletes_what_cannot_be_read_like_everything_else(
    store: RecordStore, redis_url: str, spoil: Callable[[Redis, str], Awaitable[None]]
) -> None:
    """However many of the oldest moves it is: records that nobody reads must not keep all others for ever."""
    stored = await created(store, PAGE + 3, "p1", 100.0)
    await all_saved(store, [advance(move, COMPLETED, now=300.0) for move in stored])
    await store.save_plan(replace(plan("p1"), finished_at=300.0))
    async with Redis.from_url(redis_url) as admin:
        for move in stored[: PAGE + 1]:
            await spoil(admin, move.id)

        assert await store.trim(keep=2) == 2 * (PAGE + 2)

        assert await admin.get("ferry:test:records") == b"2"
        assert ids(await store.moves()) == [stored[-1].id]
        assert await store.trim(keep=0) == 2
        left = {key.decode().removeprefix("ferry:test:") for key in cast("list[bytes]", await admin.keys())}
    if spoil is of_a_later_version:  # it still says where it is filed
        assert left == {"audit", "records"}
    assert not any(key.startswith("move:") for key in left)


@pytest.mark.parametrize("spoil", UNREADABLE)
async def test_an_unfinished_move_that_cannot_be_read_can_be_ended(
    store: RecordStore, redis_url: str, spoil: Callable[[Redis, str], Awaitable[None]]
) -> None:
    """Its plan counts it as failed and so can finish; who tries to end it again is told that it has ended."""
    stored = await created(store, 2)
    await ended(store, stored[0])
    async with Redis.from_url(redis_url) as admin:
        await spoil(admin, stored[1].id)
    assert await store.unfinished_moves() == []

    ((move_id, revision),) = (await store.unreadable_moves(besides=())).items()
    ends = [
        await store.end_unreadable(move_id, revision=at, now=400.0, error="why")
        for at in (revision + 1, revision, revision, revision + 1)
    ]

    assert (move_id, ends) == (stored[1].id, [False, True, False, False])
    assert await store.unreadable_moves(besides=()) == {}
    counted = await store.plan("p")
    assert counted is not None
    assert (counted.total, counted.completed, counted.failed) == (2, 1, 1)
    assert await store.trim(keep=0) == 4
    assert await store.moves() == []


async def test_whoever_can_read_a_move_that_was_ended_for_others_reads_that_it_failed(
    store: RecordStore, redis_url: str
) -> None:
    """Nothing of what a later version wrote is lost, and its next save is refused: it reads again and stops."""
    (move,) = await created(store, 1)
    async with Redis.from_url(redis_url) as admin:
        await of_a_later_version(admin, move.id)
        await store.end_unreadable(move.id, revision=1, now=400.0, error="why")
        document = orjson.loads(cast(bytes, await admin.hget(f"ferry:test:move:{move.id}", "document")))
        assert await admin.hget(f"ferry:test:move:{move.id}", "status") == b"failed"
        assert await admin.zrange("ferry:test:moves:status:failed", 0, -1) == [move.id.encode()]
        assert not await admin.exists("ferry:test:moves:status:planned")

    assert document.pop("of_a_later_version", "lost") is None
    failed = from_document(Move, document)
    assert failed == replace(advance(move, FAILED, now=400.0, error="why"), revision=2)
    with pytest.raises(WrongSequence):
        await store.save(advance(move, PAUSED, now=401.0))


async def test_moves_that_can_be_read_are_not_among_those_that_cannot(store: RecordStore) -> None:
    """Only one created since would be, until the next look."""
    first = await created(store, 2, "p1")
    known = {move.id for move in await store.unfinished_moves()}
    await created(store, 1, "p2")

    assert known == {move.id for move in first}
    assert await store.unreadable_moves(besides=known) == {"p2-000": 1}


# -- plans -------------------------------------------------------------------------------------------------------------
async def plan_of_a_later_version(redis: Redis, plan_id: str) -> None:
    await redis.hset(f"ferry:test:plan:{plan_id}", "of_a_later_version", b"null")


async def damaged_plan(redis: Redis, plan_id: str) -> None:
    await redis.hset(f"ferry:test:plan:{plan_id}", "reason", b"{")


async def lost_plan(redis: Redis, plan_id: str) -> None:
    await redis.delete(f"ferry:test:plan:{plan_id}")


@pytest.mark.parametrize("spoil", [plan_of_a_later_version, damaged_plan, lost_plan])
async def test_a_plan_that_cannot_be_read_ends_with_its_moves(
    store: RecordStore, redis_url: str, spoil: Callable[[Redis, str], Awaitable[None]]
) -> None:
    """Its counts cannot tell that it is over. It is trimmed with its moves, as every plan."""
    moves = await created(store, 2, "p1", 100.0)
    await ended(store, moves[0])
    async with Redis.from_url(redis_url) as admin:
        await spoil(admin, "p1")
        known = ids(await store.running_plans())
        await created(store, 0, "p2", 200.0)

        assert known == []
        assert await store.end_unreadable_plans(besides=known, now=300.0) == []  # it runs, and p2 can be read
        assert await admin.zrange("ferry:test:plans:running", 0, -1) == [b"p1", b"p2"]

        await ended(store, moves[1])
        assert await store.end_unreadable_plans(besides=["p2"], now=300.0) == ["p1"]
        assert await store.end_unreadable_plans(besides=["p2"], now=300.0) == []
        assert await admin.zrange("ferry:test:plans:running", 0, -1) == [b"p2"]

        await store.trim(0)
        assert not await admin.exists("ferry:test:plan:p1")
