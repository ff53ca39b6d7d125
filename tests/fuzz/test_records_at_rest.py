"""Records in Redis that somebody damaged: left out of every list, counted and logged; all others are still found."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self

import orjson
from hypothesis import given
from hypothesis import strategies as st

from routing.errors import InvalidInput
from tests.fuzz.effort import fuzz
from tests.fuzz.refusals import assert_orderly
from tests.fuzz.strategies import garbage, valid
from tests.fuzz.tally import TALLY
from workflows.records import ActorRow, AuditEvent, ClusterEvent, MigrationPlan, Move, to_document
from workflows.store import RecordStore

GOOD_MOVE = Move(id="good", plan_id="p", unit="shard.0", shard=0, source="a", destination="b", created_at=1.0)
GOOD_ROW = ActorRow(index=0, actor_id="ledger/k")
GOOD_PLAN = MigrationPlan(id="good", reason="a test", created_at=1.0)
GOOD_EVENT = ClusterEvent(at=1.0, what="something good")


class Answers:
    """A Redis that answers every question of a pipeline with what a test put there, and scripts with nothing."""

    def __init__(self, *answers: Any) -> None:
        self._answers = answers

    def register_script(self, script: str) -> None: ...

    def pipeline(self, *, transaction: bool) -> Self:
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def hget(self, *_: Any) -> None: ...

    def hvals(self, *_: Any) -> None: ...

    def hgetall(self, *_: Any) -> None: ...

    async def execute(self) -> list[Any]:
        return list(self._answers)

    async def smembers(self, _: str) -> set[bytes]:
        return {b"good", b"damaged"}

    async def xrevrange(self, *_: Any, **__: Any) -> list[Any]:
        return [(b"1-0", answer) for answer in self._answers]


def stored(*answers: Any) -> RecordStore:
    redis: Any = Answers(*answers)
    return RecordStore(redis, "default")


def written(record: Any) -> bytes:
    return orjson.dumps(to_document(record))


def hash_of(plan: MigrationPlan) -> dict[bytes, bytes]:
    """As `create_plan` stores one: a JSON value a field, and what was never set left out."""
    return {name.encode(): orjson.dumps(value) for name, value in to_document(plan).items() if value is not None}


def audit_entry(event: AuditEvent) -> dict[bytes, bytes]:
    document = to_document(event)
    before, after = document.pop("before").encode(), document.pop("after").encode()
    return {b"before": before, b"after": after, b"event": orjson.dumps(document)}


@fuzz
@given(garbage(valid(Move).map(written)))
def test_a_damaged_move_hides_no_other(runner: asyncio.Runner, payload: bytes) -> None:
    """A new leader takes over what can be read: one bad record must not keep it from all others."""
    TALLY.tried("moves at rest")
    store = stored(payload, written(GOOD_MOVE))

    found = runner.run(store.unfinished_moves())

    assert GOOD_MOVE in found
    tally(store, len(found), of=2)


@fuzz
@given(garbage(valid(ActorRow).map(written)))
def test_a_damaged_row_hides_no_other(runner: asyncio.Runner, payload: bytes) -> None:
    """The rows of a move are read together, and each for itself."""
    TALLY.tried("rows at rest")
    store = stored([payload, written(GOOD_ROW)])

    found = runner.run(store.actors("good"))

    assert GOOD_ROW in found
    tally(store, len(found), of=2)


@fuzz
@given(valid(MigrationPlan), st.data())
def test_a_damaged_plan_hides_no_other(runner: asyncio.Runner, plan: MigrationPlan, data: st.DataObject) -> None:
    """A plan is a hash of JSON values: one of them damaged, or its name."""
    TALLY.tried("plans at rest")
    found = hash_of(plan)
    name = data.draw(st.sampled_from(sorted(found)))
    value = found.pop(name)
    if data.draw(st.booleans()):
        found[name] = data.draw(garbage(st.just(value)))
    else:
        found[data.draw(garbage(st.just(name)))] = value
    store = stored(found, hash_of(GOOD_PLAN))

    plans = runner.run(store._plans(["damaged", "good"]))

    assert GOOD_PLAN in plans
    tally(store, len(plans), of=2)


@fuzz
@given(valid(AuditEvent), st.data())
def test_a_damaged_audit_event_hides_no_other(runner: asyncio.Runner, event: AuditEvent, data: st.DataObject) -> None:
    """An entry of the stream has three fields; any of them may be missing or damaged."""
    TALLY.tried("audit events at rest")
    entry, good = audit_entry(event), audit_entry(event)
    name = data.draw(st.sampled_from(sorted(entry)))
    value = entry.pop(name)
    if data.draw(st.integers(0, 3)):
        entry[name] = data.draw(garbage(st.just(value)))
    store = stored(entry, good)

    found = runner.run(store.audit())

    assert event in found
    tally(store, len(found), of=2)


@fuzz
@given(garbage(valid(ClusterEvent).map(written)))
def test_a_damaged_cluster_event_hides_no_other(runner: asyncio.Runner, payload: bytes) -> None:
    """Also an entry without its only field."""
    TALLY.tried("cluster events at rest")
    store = stored({b"event": payload}, {}, {b"event": written(GOOD_EVENT)})

    found = runner.run(store.events())

    assert GOOD_EVENT in found
    tally(store, len(found), of=3)


@fuzz
@given(garbage(valid(Move).map(written)), garbage(valid(ActorRow).map(written)))
def test_a_damaged_migration_asked_for_by_its_id_is_refused_in_words(
    runner: asyncio.Runner, move: bytes, row: bytes
) -> None:
    """Who asks for one record learns that it cannot be read, and why."""
    TALLY.tried("migrations at rest")
    try:
        runner.run(stored(move, row).migration("m.0"))
    except InvalidInput as error:
        TALLY.refused(error)
        assert_orderly(error)
    else:
        TALLY.read += 1


def tally(store: RecordStore, found: int, *, of: int) -> None:
    """Whatever was left out was counted."""
    assert store.counters["malformed"] == of - found
    TALLY.refusals["InvalidInput"] += of - found
