"""A store whose Redis is away, does not answer, or was started anew."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from routing.errors import InvalidInput, Unavailable
from tests.integration.stored import PAUSED, created, moves, plan
from workflows.records import advance
from workflows.store import RecordStore


async def test_a_store_without_redis_is_unavailable_and_says_where_it_looked() -> None:
    """One line, without the password; the store serves again by itself once Redis does."""
    store = RecordStore.connect("redis://user:secret@127.0.0.1:1/0", "test", timeout_s=1.0)

    with pytest.raises(Unavailable) as caught:
        await store.ping()

    assert "127.0.0.1:1" in str(caught.value)
    assert "FERRY_REDIS_URL" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(Unavailable):
        await store.create_plan(plan(), moves(1), {})
    await store.close()


async def test_a_redis_that_does_not_answer_is_unavailable_in_time() -> None:
    """A listener that never speaks: the deadline holds."""
    silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    store = RecordStore.connect(f"redis://127.0.0.1:{port}/0", "test", timeout_s=0.2)

    async with asyncio.timeout(30):
        with pytest.raises(Unavailable):
            await store.move("m")

    await store.close()
    silent.close()


async def test_a_connection_that_died_while_idle_is_replaced(store: RecordStore, redis_url: str) -> None:
    """As every restart of Redis leaves them behind."""
    (move,) = await created(store, 1)
    async with Redis.from_url(redis_url) as admin:
        await admin.client_kill_filter(skipme=True, _type="normal")

    saved = await store.save(advance(move, PAUSED, now=200.0))

    assert saved.revision == 2


def test_a_malformed_url_is_refused() -> None:
    """At the door, naming the setting."""
    with pytest.raises(InvalidInput, match="FERRY_REDIS_URL"):
        RecordStore.connect("http://127.0.0.1", "test")
