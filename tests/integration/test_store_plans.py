"""Plans on a real Valkey: created with their moves, counted, noted and listed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from routing.errors import NotApplicable, WrongSequence
from tests.integration.stored import CANCELLED, COMPLETED, FAILED, ROLLED_BACK, created, ended, ids, moves, plan, rows
from workflows.store import RecordStore


async def test_a_created_plan_reads_back_with_its_moves_and_rows(store: RecordStore) -> None:
    """Everything given comes back, the moves at revision 1, the counts set by the store."""
    planned = moves(450)

    stored = await store.create_plan(plan(), planned, {move.id: rows(move) for move in planned})

    assert stored == [replace(move, revision=1) for move in planned]
    assert await store.plan("p") == replace(plan(), total=450)
    assert await store.move("p-449") == stored[449]
    assert await store.actors("p-449") == rows(planned[449])
    assert await store.unfinished_moves() == stored


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
