"""The record store on a real Valkey: compare-and-set, counters, indexes and audit that never disagree."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import orjson
import pytest
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.connection import AbstractConnection

from routing.errors import InvalidInput, NotApplicable, Unavailable, WrongSequence
from workflows.records import (
    STATUS_AFTER,
    STEPS,
    ActorMigration,
    ActorRow,
    MigrationPlan,
    MigrationStatus,
    Move,
    advance,
    from_document,
)
from workflows.store import PAGE, RecordStore

PLANNED, PAUSED, CAPTURED, SERIALIZED, COMPLETED, ROLLED_BACK, FAILED, CANCELLED = (
    MigrationStatus(name)
    for name in ("planned", "paused", "captured", "serialized", "completed", "rolled_back", "failed", "cancelled")
)


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[RecordStore]:
    store = RecordStore.connect(redis_url, "test")
    yield store
    await store.close()


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


async def ended(store: RecordStore, move: Move, status: MigrationStatus = COMPLETED) -> Move:
    return await store.save(advance(move, status, now=300.0))


def ids(records: Iterable[Move | MigrationPlan | ActorMigration]) -> list[str]:
    return [record.id for record in records]


# -- plans -------------------------------------------------------------------------------------------------------------


async def test_a_created_plan_reads_back_with_its_moves_and_rows(store: RecordStore) -> None:
    """Everything given comes back, the moves at revision 1, the counts set by the store."""
    planned = moves(450)

    stored = await store.create_plan(plan(), planned, {move.id: rows(move) for move in planned})

    assert stored == [replace(move, revision=1) for move in planned]
    assert await store.plan("p") == replace(plan(), total=450)
    assert await store.move("p-449") == stored[449]
    assert await store.actors("p-449") == rows(planned[449])
    assert await store.unfinished_moves() == stored


async def test_many_actors_are_written_in_more_round_trips(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """redis-py packs what goes in one, and takes many times its size for that: it must not grow with the plan."""
    sent: list[int] = []
    execute = Pipeline.execute

    async def counted(self: Pipeline, raise_on_error: bool = True) -> list[Any]:
        sent.append(len(self.command_stack))
        return await execute(self, raise_on_error)

    monkeypatch.setattr(Pipeline, "execute", counted)
    monkeypatch.setattr("workflows.store.BATCH_ROWS", 6)
    monkeypatch.setattr("workflows.store.BATCH", 3)
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
    monkeypatch.setattr("workflows.store.BATCH_ROWS", 2)
    planned = moves(8)

    saving = [asyncio.create_task(store.save(move, actors=rows(move))) for move in planned]
    await asyncio.sleep(0)
    for given_up in saving[1:7]:
        given_up.cancel()
    first, *_, last = await asyncio.gather(*saving, return_exceptions=True)

    assert first == replace(planned[0], revision=1)
    assert last == replace(planned[7], revision=1)
    assert await store.actors("p-007") == rows(planned[7])


async def test_creating_a_plan_again_changes_nothing(store: RecordStore) -> None:
    """The first answer may have been lost: the same call is safe, also after the moves went on."""
    first = await created(store, 3)

    again = await created(store, 3)

    assert again == first
    assert await store.plan("p") == replace(plan(), total=3)
    with pytest.raises(WrongSequence):
        await store.create_plan(plan(), [replace(first[0], revision=0, destination="c")], {})


async def test_a_plan_whose_creation_broke_off_is_not_listed_but_its_moves_are_found(store: RecordStore) -> None:
    """A crash half-way leaves moves for the reconciler, and no plan that seems smaller than it is."""
    other = await store.save(moves(1)[0])

    with pytest.raises(WrongSequence):
        await store.create_plan(plan(), [replace(other, revision=0, source="c"), moves(2)[1]], {})

    assert await store.latest_plan() is None
    assert await store.running_plans() == []
    assert ids(await store.unfinished_moves()) == ["p-000", "p-001"]


async def test_a_plan_counts_how_its_moves_ended_and_each_only_once(store: RecordStore) -> None:
    """Completed is completed; rolled back, failed and cancelled count as failed."""
    stored = await created(store, 5)

    for move, status in zip(stored, (COMPLETED, COMPLETED, ROLLED_BACK, FAILED, CANCELLED), strict=True):
        end = await ended(store, move, status)
        await store.save(replace(end, blackout_ms=12.5))

    counted = await store.plan("p")
    assert counted is not None
    assert (counted.total, counted.completed, counted.failed) == (5, 2, 3)
    assert await store.unfinished_moves() == []


async def test_what_was_noted_of_a_plan_is_never_undone(store: RecordStore) -> None:
    """Two writers with different views: the first start and finish stay, a cancellation stays."""
    await created(store, 1)

    await store.save_plan(replace(plan(), started_at=110.0))
    await store.save_plan(replace(plan(), started_at=111.0, cancelled=True, total=99))
    noted = await store.save_plan(replace(plan(), finished_at=120.0, reason="other"))

    assert noted == replace(plan(), total=1, started_at=110.0, finished_at=120.0, cancelled=True)
    assert await store.plan("p") == noted


async def test_a_plan_that_is_not_stored_cannot_be_noted(store: RecordStore) -> None:
    """And nothing of it is left behind."""
    with pytest.raises(NotApplicable, match="not stored"):
        await store.save_plan(replace(plan(), started_at=1.0))

    assert await store.plan("p") is None


async def test_plans_are_listed_newest_first_and_running_ones_oldest_first(store: RecordStore) -> None:
    """`finished_at` takes a plan off the running list."""
    assert await store.latest_plan() is None
    for plan_id, created_at in (("p1", 100.0), ("p2", 200.0), ("p3", 300.0)):
        await created(store, 1, plan_id, created_at)
    await store.save_plan(replace(plan("p2", 200.0), finished_at=210.0))

    latest = await store.latest_plan()

    assert latest is not None
    assert latest.id == "p3"
    assert ids(await store.plans(2)) == ["p3", "p2"]
    assert await store.plans(0) == []
    assert ids(await store.running_plans()) == ["p1", "p3"]


# -- saving a move -----------------------------------------------------------------------------------------------------


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


async def test_saving_many_writes_all_but_the_refused_ones(store: RecordStore) -> None:
    """One loser does not hold up the others, and is not passed over in silence."""
    stored = await created(store, 3)
    await store.save(advance(stored[1], PAUSED, now=150.0))

    with pytest.raises(WrongSequence, match="p-001"):
        await store.save_many([advance(move, CANCELLED, now=200.0) for move in stored])

    assert ids(await store.moves(status=CANCELLED)) == ["p-002", "p-000"]
    assert ids(await store.unfinished_moves()) == ["p-001"]
    assert await store.save_many([]) == []


async def test_a_move_saved_into_a_plan_later_is_counted(store: RecordStore) -> None:
    """The plan's total is the number of its moves, however they came to be."""
    await created(store, 1)

    await store.save(moves(2)[1])

    counted = await store.plan("p")
    assert counted is not None
    assert counted.total == 2


async def test_the_script_is_loaded_again_after_the_server_forgot_it(store: RecordStore, redis_url: str) -> None:
    """A restarted Redis has no scripts; neither a single nor a pipelined save may notice."""
    stored = await created(store, 2)
    async with Redis.from_url(redis_url) as admin:
        await admin.script_flush()
        saved = await store.save(advance(stored[0], PAUSED, now=200.0))
        await admin.script_flush()
        again = await store.save_many([advance(stored[1], PAUSED, now=200.0)])

    assert ids(await store.moves(status=PAUSED)) == [again[0].id, saved.id]


# -- finding -----------------------------------------------------------------------------------------------------------


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


# -- housekeeping ------------------------------------------------------------------------------------------------------


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
    await store.save_many([advance(move, COMPLETED, now=300.0) for move in stored])
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
    await store.save_many([advance(move, COMPLETED, now=300.0) for move in stored])
    other = RecordStore.connect(redis_url, "test")

    deleted = await asyncio.gather(store.trim(keep=0), other.trim(keep=0))

    await other.close()
    assert sum(deleted) == 80
    async with Redis.from_url(redis_url) as admin:
        assert await admin.get("ferry:test:records") == b"0"


# -- what cannot be read -----------------------------------------------------------------------------------------------
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
    await store.save_many([advance(move, COMPLETED, now=300.0) for move in stored])
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


# -- outages -----------------------------------------------------------------------------------------------------------


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
        await store.save_many(moves(1))
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
