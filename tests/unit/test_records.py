"""Records: how a move's status may change, what is derived from it, and what the process accepts from outside."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.errors import InvalidInput, NotApplicable
from workflows.records import (
    STATUS_AFTER,
    STEPS,
    TERMINAL,
    TRANSITIONS,
    ActorMigration,
    ActorRow,
    AuditEvent,
    ClusterEvent,
    MigrationPlan,
    MigrationStatus,
    Move,
    advance,
    from_document,
    parse_migration_id,
    to_document,
)

MOVE = Move(id="m", plan_id="p", unit="shard.17", shard=17, source="a", destination="b", created_at=100.0)
ROW = ActorRow(index=0, actor_id="aircraft/N14228")

# The contract's list, word for word: users' scripts read these.
MIGRATION_FIELDS = """id, plan_id, move_id, actor_id, shard, source, destination, status, step, version, state_bytes,
digest, attempts, error, messages_buffered, blackout_ms, created_at, paused_at, captured_at, serialized_at, sent_at, acked_at, finished_at, task_ids"""  # noqa: E501
STATUSES = "planned paused captured serialized sent acked completed rolled_back failed cancelled"

statuses = st.sampled_from(MigrationStatus)
names = st.text(min_size=1, max_size=20)
nodes = st.sampled_from(["a", "b", "c"])
counts = st.integers(0, 2**53)
times = st.floats(0, 4e9)
errors = st.none() | st.text(max_size=20)
actor_ids = st.from_regex(r"[a-z]{1,8}/[A-Za-z0-9]{1,8}", fullmatch=True)


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


moves = st.builds(
    Move,
    id=names, plan_id=names, unit=names, shard=counts, source=st.just("a"), destination=st.just("b"), status=statuses,
    step=optional(st.sampled_from(STEPS)), lock_revision=optional(counts), epoch=optional(counts),
    task_ids=st.dictionaries(st.sampled_from(STEPS), names), attempts=counts, error=errors, actors_total=counts,
    state_bytes=counts, messages_buffered=optional(counts), blackout_ms=optional(times), created_at=times,
    started_at=optional(times), paused_at=optional(times), captured_at=optional(times), serialized_at=optional(times),
    sent_at=optional(times), acked_at=optional(times), finished_at=optional(times), step_at=optional(times),
    revision=counts,
)  # fmt: skip
rows = st.builds(
    ActorRow,
    index=counts, actor_id=actor_ids, version=optional(counts), state_bytes=optional(counts), digest=optional(names),
    error=errors,
)  # fmt: skip
plans = st.builds(
    MigrationPlan,
    id=names, reason=names, created_at=times, started_at=optional(times), finished_at=optional(times), total=counts,
    completed=counts, failed=counts, cancelled=st.booleans(), actors_total=counts, state_bytes=counts,
    estimate_s=optional(times),
)  # fmt: skip
events = st.builds(
    AuditEvent,
    at=times, plan_id=names, move_id=names, unit=names, source=st.just("a"), destination=st.just("b"), before=statuses,
    after=statuses, error=errors,
)  # fmt: skip
cluster_events = st.builds(ClusterEvent, at=times, what=names)
records = moves | rows | plans | events | cluster_events


# -- the life of a move ------------------------------------------------------------------------------------------------


def test_a_move_goes_through_the_six_steps() -> None:
    """Each step leaves its status and its time behind, and names the next."""
    move, seen = MOVE, []
    for second, step in enumerate(STEPS):
        assert move.step == step
        move = advance(move, STATUS_AFTER[step], now=200.0 + second)
        seen.append(move.status)

    assert [str(status) for status in seen] == ["paused", "captured", "serialized", "sent", "acked", "completed"]
    times = (move.paused_at, move.captured_at, move.serialized_at, move.sent_at, move.acked_at, move.finished_at)
    assert times == (200.0, 201.0, 202.0, 203.0, 204.0, 205.0)
    assert (move.step, move.step_at, move.created_at, move.revision) == (None, 205.0, 100.0, 0)


@given(moves, statuses, times)
def test_only_listed_transitions_are_taken_and_the_same_status_changes_nothing(
    move: Move, status: MigrationStatus, now: float
) -> None:
    """Any status from any other: taken as `TRANSITIONS` says, refused by name otherwise."""
    if status is move.status:
        assert advance(move, status, now=now) == move
    elif status in TRANSITIONS[move.status]:
        after = advance(move, status, now=now)
        assert (after.status, after.step_at) == (status, now)
        assert (after.step is None) == (status in TERMINAL)
    else:
        with pytest.raises(NotApplicable, match="cannot become"):
            advance(move, status, now=now)


def test_the_transitions_are_those_that_are_drawn() -> None:
    """The next status, or an end, from every status that is not one itself; nothing leaves an end."""
    order = [MigrationStatus.PLANNED, *STATUS_AFTER.values()]
    for status, following in pairwise(order):
        assert TRANSITIONS[status] == {following} | TERMINAL
    assert all(TRANSITIONS[status] == frozenset() for status in TERMINAL)
    assert TRANSITIONS.keys() == set(MigrationStatus)


@given(moves.filter(lambda move: move.status not in TERMINAL), st.sampled_from(sorted(TERMINAL)), times)
def test_every_end_is_reached_from_everywhere_and_is_dated(move: Move, end: MigrationStatus, now: float) -> None:
    """A reconciler can end any move from what the map says."""
    ended = advance(move, end, now=now, error="why")

    assert (ended.status, ended.step, ended.finished_at, ended.error) == (end, None, now, "why")


def test_a_step_that_runs_twice_may_still_add_what_it_learnt() -> None:
    """Explicit changes are taken at the same status; status, step and times stay."""
    paused = advance(MOVE, MigrationStatus.PAUSED, now=200.0)

    again = advance(paused, MigrationStatus.PAUSED, now=300.0, attempts=2)

    assert again == replace(paused, attempts=2)


def test_explicit_changes_win_over_the_times_that_are_set() -> None:
    """Who knows the time better than `now` may say so."""
    paused = advance(MOVE, MigrationStatus.PAUSED, now=200.0, paused_at=199.5, epoch=7)

    assert (paused.paused_at, paused.step_at, paused.epoch) == (199.5, 200.0, 7)


# -- what users see ----------------------------------------------------------------------------------------------------


def test_a_migration_has_exactly_the_fields_and_statuses_of_the_contract() -> None:
    """In the contract's order, too: it is what the JSON shows."""
    assert [field.name for field in fields(ActorMigration)] == MIGRATION_FIELDS.replace("\n", " ").split(", ")
    assert [str(status) for status in MigrationStatus] == STATUSES.split()


@given(moves, rows)
def test_a_migration_joins_a_move_with_an_actors_row(move: Move, row: ActorRow) -> None:
    """What both have, such as size and error, is the actor's; all else is the move's."""
    migration = ActorMigration.of(move, row)

    assert parse_migration_id(migration.id) == (move.id, row.index)
    assert migration.move_id == move.id
    assert migration.error == (row.error or move.error)
    for name in ("actor_id", "version", "state_bytes", "digest"):
        assert getattr(migration, name) == getattr(row, name)
    for name in {field.name for field in fields(ActorMigration)} & {field.name for field in fields(Move)}:
        assert name in ("id", "state_bytes", "error") or getattr(migration, name) == getattr(move, name)


@pytest.mark.parametrize("text", ["", "m", ".0", "m.", "m.x", "m.-1", "m.01", "m.1 ", "m.١", "m.²"])
def test_ids_that_no_migration_has_are_refused(text: str) -> None:
    """One line that says where to find a good one."""
    with pytest.raises(InvalidInput, match="ferry migrations"):
        parse_migration_id(text)


# -- documents ---------------------------------------------------------------------------------------------------------


@given(records)
def test_every_record_survives_its_json(record: Any) -> None:
    """`from_document` is the inverse of `to_document`, from the text and from the values alike."""
    document = to_document(record)

    assert from_document(type(record), orjson.dumps(document)) == record
    assert from_document(type(record), document) == record
    assert list(document) == [field.name for field in fields(record)]


@given(moves, rows)
def test_what_users_see_of_a_migration_is_json(move: Move, row: ActorRow) -> None:
    """Its fields in the contract's order, its status in words."""
    migration = ActorMigration.of(move, row)

    document = to_document(migration)

    assert list(document) == [field.name for field in fields(ActorMigration)]
    assert document["status"] == str(move.status)
    assert orjson.loads(orjson.dumps(document)) == document


@given(records, st.data())
def test_a_missing_or_an_unknown_field_is_refused_by_name(record: Any, data: st.DataObject) -> None:
    """A document of another version is never half understood."""
    document = to_document(record)
    missing = data.draw(st.sampled_from(sorted(document)))

    with pytest.raises(InvalidInput, match="surplus"):
        from_document(type(record), {**document, "surplus": 1})
    with pytest.raises(InvalidInput, match=missing):
        from_document(type(record), {name: value for name, value in document.items() if name != missing})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", ""), ("id", None), ("id", 7), ("unit", ["shard.17"]), ("shard", "17"), ("shard", True), ("shard", 17.0),
        ("shard", -1), ("status", "stuck"), ("status", None), ("step", "teleport"), ("step", ""), ("attempts", None),
        ("created_at", "100"), ("created_at", None), ("created_at", float("nan")), ("created_at", float("inf")),
        ("created_at", -1.0), ("created_at", False), ("blackout_ms", "1"), ("task_ids", None),
        ("task_ids", {"pause": 1}), ("task_ids", []), ("destination", "a"), ("revision", "1"), ("error", 1),
    ],
)  # fmt: skip
def test_a_field_of_a_wrong_type_or_range_is_refused_by_name(field: str, value: object) -> None:
    """Nothing is converted on the way in: a number is a number."""
    with pytest.raises(InvalidInput, match=f"Move is malformed: {field}"):
        from_document(Move, {**to_document(MOVE), field: value})


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"7", b'"m"', b"\xff", b"NaN"])
def test_text_that_is_no_document_is_refused(text: bytes) -> None:
    """Whatever arrives, one error of one kind."""
    with pytest.raises(InvalidInput, match="Move is"):
        from_document(Move, text)


def test_an_actors_id_and_a_route_are_read_as_such() -> None:
    """What the type of a field does not say: an actor has a type and a key, and a move goes somewhere."""
    with pytest.raises(InvalidInput, match="ActorRow is malformed: actor 'nobody' is malformed"):
        from_document(ActorRow, {**to_document(ROW), "actor_id": "nobody"})
    with pytest.raises(InvalidInput, match="Move is malformed: destination: a owns it already"):
        from_document(Move, {**to_document(MOVE), "destination": "a"})


@given(st.data())
def test_what_is_wrong_is_told_in_one_short_line(data: st.DataObject) -> None:
    """However much of it there is, and whatever the document repeats."""
    document = {**to_document(MOVE), "status": data.draw(st.text()) * 1_000}
    surplus = {f"unknown-{number}": number for number in range(1_000)}

    step = {**to_document(MOVE), "step": " - at `$" * 10_000}

    for malformed in (document, document | surplus, step):
        with pytest.raises(InvalidInput) as caught:
            from_document(Move, malformed)
        assert len(str(caught.value)) < 300
        assert "\n" not in str(caught.value)
