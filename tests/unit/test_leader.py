"""Races of a leader with others who write the same records, that once broke a promise: admission, reconciler, desk."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

from routing.errors import FerryError
from routing.shard_map import Outcome
from tests.unit.cluster import UNIT, cluster
from tests.unit.office import Office
from tests.unit.shelf import Shelf, planned
from tests.unit.virtual_time import virtually, wall_clock
from workflows.desk import Desk
from workflows.records import TERMINAL, MigrationPlan, MigrationStatus, Move


@virtually
async def test_a_save_whose_answer_was_lost_does_not_stop_admission_for_ever() -> None:
    """A launch that Redis stored without saying so is found out; moves behind it are launched, records end."""
    async with cluster("a", "b", shards=2) as small:
        shelf = Shelf()
        office = Office(small, shelf)
        office.admission.add([await shelf.save(planned(1, 0)), await shelf.save(planned(2, 1))])
        lost = [True]

        def lose(move: Move) -> bool:
            return move.started_at is not None and move.id == "m1" and bool(lost) and lost.pop()

        shelf.lose = lose
        await office.run(120.0)

        assert "m2" in office.launched
        assert shelf.stored["m1"].status in TERMINAL or "m1" in office.launched


@virtually
async def test_losing_the_lead_in_the_middle_of_a_launch_is_no_crash() -> None:
    """forget_all comes from the lease's task while admit waits for Redis; only what `_repeat` expects may rise."""
    async with cluster("a", "b") as small:
        shelf = Shelf()
        office = Office(small, shelf)
        office.admission.add([await shelf.save(planned(1))])

        async def lose_the_lead(move: Move) -> None:
            office.admission.forget_all()

        shelf.before = lose_the_lead
        with contextlib.suppress(FerryError):  # `Coordinator._repeat` logs these; a KeyError ends the process
            await office.admission.admit(("a", "b"))


@virtually
async def test_a_plan_that_cannot_be_read_is_ended() -> None:
    """Or it would be looked at in every round, for ever; when its moves have ended, the store tells."""
    async with cluster("a", "b") as small:
        shelf = Shelf()
        office = Office(small, shelf)
        shelf.unreadable_plans = ["p1"]

        await office.reconciler.reconcile()

        assert shelf.unreadable_plans == []


@virtually
async def test_a_move_that_cannot_be_read_is_ended_once_nobody_drives_it_on() -> None:
    """While its revision grows somebody can read it; one that is planned here is written anew by its launch."""
    async with cluster("a", "b") as small:
        shelf = Shelf()
        office = Office(small, shelf, moves_at_once=0)
        office.admission.add([await shelf.save(planned(1))])
        shelf.unreadable = {"m1": 1, "m2": 1, "m3": 1}
        idle_s = small.settings.lock_lease_s

        await office.run(idle_s - 5.0)
        assert shelf.unreadable.keys() == {"m1", "m2", "m3"}
        shelf.unreadable["m3"] += 1
        await office.run(10.0)
        assert shelf.unreadable.keys() == {"m1", "m3"}
        await office.run(idle_s)

        assert shelf.unreadable.keys() == {"m1"}


@virtually
async def test_a_plan_that_is_just_being_written_is_not_taken_for_a_dead_leader_s() -> None:
    """The reconciler runs beside the desk: moves stored, but not queued yet, are not orphans."""
    async with cluster("a", "b") as small:
        shelf = Shelf()
        office = Office(small, shelf)

        async def reconcile() -> None:
            await office.reconciler.reconcile()

        shelf.between = reconcile
        plan = MigrationPlan(id="p1", reason="by hand", created_at=wall_clock(), started_at=wall_clock(), total=1)
        office.admission.add(await shelf.create_plan(plan, [planned(1)], {}))
        await office.run(5.0)

        assert office.launched == ["m1"]


@virtually
async def test_s4_an_ending_concluded_before_a_launch_is_concluded_anew() -> None:
    """A leader that stood still writes "cancelled" over a move that another has launched, and that has committed."""
    async with cluster("a", "b") as small:
        shelf = Shelf()
        office = Office(small, shelf)
        await shelf.save(planned(1))

        async def another_leader_launches_it(move: Move) -> None:
            shelf.before = None
            entry = await small.directory.refresh(UNIT)
            assert entry is not None
            stored = shelf.stored["m1"]
            shelf.stored["m1"] = replace(
                stored, lock_revision=entry.revision, started_at=wall_clock(), revision=stored.revision + 1
            )
            await small.move("m1", "b")

        shelf.before = another_leader_launches_it
        ended = await office.context.settle("m1", error="superseded")

        assert (await small.map()).outcome_of("m1") is Outcome.COMMITTED
        assert ended is not None
        assert ended.status is shelf.stored["m1"].status is MigrationStatus.COMPLETED


@virtually
async def test_a_record_dated_an_hour_ahead_is_ended_in_time_all_the_same() -> None:
    """A worker's time of day must not hold a move up: the reconciler counts from when it saw the record so."""
    async with cluster("a", "b") as small:
        shelf = Shelf()
        office = Office(small, shelf)
        office.admission.add([await shelf.save(planned(1))])
        await office.admission.admit(("a", "b"))
        shelf.stored["m1"] = replace(shelf.stored["m1"], step_at=wall_clock() + 3600)

        await office.run(60.0)

        assert shelf.stored["m1"].status in TERMINAL


@virtually
async def test_cancel_ends_every_move_of_a_plan_although_one_has_just_advanced() -> None:
    """A record that a step wrote meanwhile is read again; the moves behind it are ended as well."""
    async with cluster("a", "b", shards=2) as small:
        shelf = Shelf()
        office = Office(small, shelf)
        shelf.plans["p1"] = MigrationPlan(id="p1", reason="x", created_at=0.0, started_at=0.0, total=2)
        moves = [await shelf.save(planned(1, 0)), await shelf.save(planned(2, 1))]
        office.admission.add(moves)
        await office.admission.admit(("a", "b"))
        running = shelf.stored["m1"]

        async def a_step_is_quicker(move: Move) -> None:
            if move.id == "m1" and move.status in TERMINAL and shelf.stored["m1"].revision == running.revision:
                shelf.stored["m1"] = replace(running, attempts=1, revision=running.revision + 1)

        shelf.before = a_step_is_quicker
        fake: Any = type("Leader", (), {"admission": office.admission})()
        store: Any = shelf
        desk = Desk(fake, link=small.link, subjects=small.subjects, store=store, context=office.context)
        await desk.cancel({"plan": "p1"})

        assert [move.status for move in shelf.stored.values()] == [MigrationStatus.CANCELLED] * 2
