"""Saving moves on a real Valkey: by compare-and-set, in few round trips, with indexes and audit that never disagree."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.connection import AbstractConnection

from routing.errors import WrongSequence
from tests.integration.stored import (
    CANCELLED,
    CAPTURED,
    COMPLETED,
    FAILED,
    PAUSED,
    PLANNED,
    SERIALIZED,
    created,
    ids,
    moves,
    plan,
    rows,
)
from workflows.records import STATUS_AFTER, STEPS, ActorRow, MigrationStatus, Move, advance
from workflows.store import RecordStore


async def test_a_saved_move_reads_back_one_revision_later_with_its_rows(store: RecordStore) -> None:
    """Rows that are named are replaced, the others stay."""
    (move,) = await created(store, 1)
    captured = ActorRow(index=1, actor_id="cart/0-1", version=7, state_bytes=11, digest="d", error="odd")

    saved = await store.save(advance(move, PAUSED, now=200.0, epoch=4), actors=[captured])

    assert saved == replace(advance(move, PAUSED, now=200.0, epoch=4), revision=2)
    assert await store.move(move.id) == saved
    assert await store.actors(move.id) == [rows(move)[0], captured]


async def test_a_save_is_one_round_trip(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the script is known: one command, however many rows."""
    (move,) = await created(store, 1)
    sent = []
    send = AbstractConnection.send_packed_command

    async def recording(connection: AbstractConnection, command: Any, check_health: bool = True) -> None:
        sent.append(command)
        await send(connection, command, check_health)

    monkeypatch.setattr(AbstractConnection, "send_packed_command", recording)
    await store.save(advance(move, PAUSED, now=200.0), actors=rows(move, 40))

    assert len(sent) == 1


async def test_of_many_saves_at_once_exactly_one_wins_per_revision(store: RecordStore) -> None:
    """Fifty tasks race through the six steps: every revision has one winner, every change of status one audit event."""
    (move,) = await created(store, 1)
    wins: Counter[int] = Counter()

    for step in STEPS:
        after = advance(move, STATUS_AFTER[step], now=200.0)
        results = await asyncio.gather(
            *(store.save(replace(after, attempts=racer)) for racer in range(50)), return_exceptions=True
        )
        winners = [result for result in results if isinstance(result, Move)]
        wins[move.revision] += len(winners)
        assert all(isinstance(result, (Move, WrongSequence)) for result in results)
        assert await store.move(move.id) == winners[0]
        move = winners[0]

    assert wins == dict.fromkeys(range(1, 7), 1)
    events = await store.audit()
    assert [(event.before, event.after) for event in events[::-1]] == [
        (PLANNED, PAUSED), (PAUSED, CAPTURED), (CAPTURED, "serialized"), ("serialized", "sent"), ("sent", "acked"),
        ("acked", COMPLETED),
    ]  # fmt: skip
    counted = await store.plan("p")
    assert counted is not None
    assert (counted.total, counted.completed, counted.failed) == (1, 1, 0)


async def test_a_refused_save_leaves_nothing_behind(store: RecordStore) -> None:
    """Not its rows, not its status in an index, not an event."""
    (move,) = await created(store, 1)
    await store.save(advance(move, PAUSED, now=200.0))

    with pytest.raises(WrongSequence, match="revision 2, not 1"):
        await store.save(advance(move, FAILED, now=200.0), actors=[replace(rows(move)[0], error="late")])

    assert await store.actors(move.id) == rows(move)
    assert await store.moves(status=FAILED) == []
    assert len(await store.audit()) == 1


async def test_saving_without_a_change_of_status_adds_no_event(store: RecordStore) -> None:
    """The audit has changes, not writes."""
    (move,) = await created(store, 1)

    paused = await store.save(advance(move, PAUSED, now=200.0))
    await store.save(replace(paused, attempts=2))

    (event,) = await store.audit()
    assert (event.at, event.plan_id, event.move_id, event.unit) == (200.0, "p", "p-000", "shard.0")
    assert (event.source, event.destination, event.before, event.after) == ("a", "b", PLANNED, PAUSED)


async def test_statuses_passed_since_the_last_save_go_in_one_and_each_has_its_event(store: RecordStore) -> None:
    """One revision, one place in the index of statuses, and the audit as if each had been saved."""
    (move,) = await created(store, 1)
    paused = advance(move, PAUSED, now=200.0)
    captured = advance(paused, MigrationStatus.CAPTURED, now=201.0)
    serialized = advance(captured, MigrationStatus.SERIALIZED, now=202.0)

    saved = await store.save(serialized, actors=rows(move), through=[paused, captured])

    assert saved.revision == move.revision + 1
    assert await store.move(move.id) == saved
    assert ids(await store.moves(status=MigrationStatus.SERIALIZED)) == [move.id]
    assert await store.moves(status=PAUSED) == []
    changes = [(event.before, event.after, event.at) for event in reversed(await store.audit())]
    assert changes == [
        (PLANNED, PAUSED, 200.0), (PAUSED, MigrationStatus.CAPTURED, 201.0),
        (MigrationStatus.CAPTURED, MigrationStatus.SERIALIZED, 202.0),
    ]  # fmt: skip


@pytest.mark.parametrize("captured", [0, 1, 2, 3, 4])
async def test_the_rows_captured_replace_those_planned(store: RecordStore, redis_url: str, captured: int) -> None:
    """Actors were put to rest or woke up between plan and capture: the rows are those that move, and so counted."""
    (move,) = moves(1)
    (move,) = await store.create_plan(plan(), [move], {move.id: rows(move, 3)})
    moving = [ActorRow(index=index, actor_id=f"cart/moved-{index}", version=5) for index in range(captured)]
    paused = advance(move, PAUSED, now=200.0)
    after = advance(paused, CAPTURED, now=201.0, actors_total=captured)

    saved = await store.save(advance(after, SERIALIZED, now=202.0), actors=moving, through=[paused, after])

    assert await store.actors(move.id) == moving
    async with Redis.from_url(redis_url) as admin:
        assert await admin.get("ferry:test:records") == str(max(captured, 1)).encode()
    await store.save(advance(saved, COMPLETED, now=203.0), actors=moving[:1])
    assert await store.actors(move.id) == moving
    assert await store.trim(keep=0) == max(captured, 1)


async def test_a_capture_taken_again_replaces_the_rows_of_the_first(store: RecordStore) -> None:
    """Its status stays the same, and its rows are fewer."""
    (move,) = await created(store, 1)
    paused = await store.save(advance(move, PAUSED, now=199.0))
    first = await store.save(advance(paused, CAPTURED, now=200.0), actors=rows(move))

    await store.save(advance(first, CAPTURED, now=201.0, actors_total=1), actors=rows(move, 1))

    assert await store.actors(move.id) == rows(move, 1)


async def test_of_saves_that_wait_together_all_but_the_refused_are_written(store: RecordStore) -> None:
    """One loser does not hold up the others, and is not passed over in silence."""
    stored = await created(store, 4)
    await store.save(advance(stored[2], PAUSED, now=150.0))

    saving = [store.save(advance(move, CANCELLED, now=200.0)) for move in stored]
    *_, refused, saved = await asyncio.gather(*saving, return_exceptions=True)

    assert isinstance(refused, WrongSequence)
    assert isinstance(saved, Move)
    assert ids(await store.moves(status=CANCELLED)) == ["p-003", "p-001", "p-000"]
    assert ids(await store.unfinished_moves()) == ["p-002"]


async def test_a_move_saved_into_a_plan_later_is_counted(store: RecordStore) -> None:
    """The plan's total is the number of its moves, however they came to be."""
    await created(store, 1)

    await store.save(moves(2)[1])

    counted = await store.plan("p")
    assert counted is not None
    assert counted.total == 2


async def test_the_script_is_loaded_again_after_the_server_forgot_it(store: RecordStore, redis_url: str) -> None:
    """A restarted Redis has no scripts; neither a single nor a pipelined save may notice."""
    stored = await created(store, 1)
    async with Redis.from_url(redis_url) as admin:
        await admin.script_flush()
        saved = await store.save(advance(stored[0], PAUSED, now=200.0))
        await admin.script_flush()
        again = await store.create_plan(plan("p2"), [advance(move, PAUSED, now=200.0) for move in moves(1, "p2")], {})

    assert ids(await store.moves(status=PAUSED)) == [again[0].id, saved.id]


async def test_many_actors_are_written_in_more_round_trips(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """redis-py packs what goes in one, and takes many times its size for that: it must not grow with the plan."""
    sent: list[int] = []
    execute = Pipeline.execute

    async def counted(self: Pipeline, raise_on_error: bool = True) -> list[Any]:
        sent.append(len(self.command_stack))
        return await execute(self, raise_on_error)

    monkeypatch.setattr(Pipeline, "execute", counted)
    monkeypatch.setattr("workflows.store_saves.BATCH_ROWS", 6)
    monkeypatch.setattr("workflows.store_saves.BATCH", 3)
    planned = moves(9)
    counts = [3, 3, 1, 9, 0, 0, 0, 0, 2]

    await store.create_plan(
        plan(), planned, {move.id: rows(move, count) for move, count in zip(planned, counts, strict=True)}
    )

    assert sent[1:-1] == [2, 1, 1, 3, 2]  # without what is written of the plan itself
    assert [len(await store.actors(move.id)) for move in planned] == counts


async def test_saves_that_wait_together_are_all_saved_whoever_gives_up(
    store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has the turn writes until its own is written, also when it takes more than one round trip."""
    monkeypatch.setattr("workflows.store_saves.BATCH_ROWS", 2)
    planned = moves(8)

    saving = [asyncio.create_task(store.save(move, actors=rows(move))) for move in planned]
    await asyncio.sleep(0)
    for given_up in saving[1:7]:
        given_up.cancel()
    first, *_, last = await asyncio.gather(*saving, return_exceptions=True)

    assert first == replace(planned[0], revision=1)
    assert last == replace(planned[7], revision=1)
    assert await store.actors("p-007") == rows(planned[7])
