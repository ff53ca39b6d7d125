"""Small moves that go the same way share a chain; each still fails, retries and ends for itself."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from routing.directory import MapEntry
from routing.errors import Busy, InDoubt, NotApplicable, StateNotPortable, Unavailable, WrongSequence
from routing.shard_map import LastMove, Outcome, Ownership
from tests.simulation.broker import Broker
from tests.unit.cluster import Ledger, SmallCluster, cluster
from tests.unit.office import worker
from tests.unit.shelf import Shelf, planned
from tests.unit.virtual_time import clock, until, virtually, wall_clock
from workflows import migration
from workflows.admission import CHAIN_ACTORS, CHAIN_BYTES, ROOM_MOST, Admission
from workflows.context import StepContext
from workflows.driver import GRACE_S, STEP_RETRIES, Parted
from workflows.records import STEPS, MigrationPlan, MigrationStatus, Move

SHARDS = 8


class Desk:
    """Admission over a shelf; `chains` are the moves that were launched together."""

    def __init__(self, small: SmallCluster, *, moves_per_chain: int, moves_at_once: int = 1) -> None:
        self.shelf, self.chains, self.now_s = Shelf(), list[list[str]](), wall_clock()
        store: Any = self.shelf
        context = StepContext(
            link=small.link, subjects=small.subjects, directory=small.directory, store=store, settings=small.settings,
            wall_clock=wall_clock,
        )  # fmt: skip
        self.admission = Admission(
            store=store, directory=small.directory, context=context, launch=self._launch, moves_at_once=moves_at_once,
            moves_per_chain=moves_per_chain, blackout_budget_s=0.1, wall_clock=lambda: self.now_s,
        )  # fmt: skip

    async def ended(self, name: str, blackout_s: float) -> None:
        """The map tells of a move's end, and then its record of how long it stood still."""
        self.outcome(name, Outcome.COMMITTED)
        completed = replace(self.shelf.stored[name], status=MigrationStatus.COMPLETED, blackout_ms=blackout_s * 1000)
        await self.shelf.save(completed)

    def outcome(self, name: str, outcome: Outcome) -> None:
        last = LastMove(move=name, outcome=outcome, epoch=2)
        ended = Ownership(owner="b", incarnation="i", epoch=2, last=last)
        self.admission.on_map(self.shelf.stored[name].unit, MapEntry(ended, 3))

    async def _launch(self, *moves: Move) -> None:
        self.chains.append([move.id for move in moves])

    async def add(self, moves: Sequence[Move]) -> None:
        self.admission.add([await self.shelf.save(move) for move in moves])


def moves(count: int, **common: Any) -> list[Move]:
    return [replace(planned(number, number), **common) for number in range(count)]


async def launched_together(small: SmallCluster, shelf: Shelf, count: int, task_ids: dict[str, str]) -> list[Move]:
    """Moves of so many shards that share a chain, each on record with what its LOCK is to replace."""
    convoy = []
    for move in moves(count, started_at=wall_clock(), task_ids=task_ids):
        entry = await small.directory.refresh(move.unit)
        assert entry is not None
        convoy.append(await shelf.save(replace(move, lock_revision=entry.revision)))
    return convoy


@virtually
async def test_moves_of_one_route_share_a_chain_and_its_task_ids() -> None:
    """At most so many per chain, and one chain at once where the window is one."""
    async with cluster("a", "b", shards=SHARDS) as small:
        desk = Desk(small, moves_per_chain=3)
        await desk.add(moves(5, actors_total=10))

        await desk.admission.admit(("a", "b"))
        await desk.admission.admit(("a", "b"))

        assert desk.chains == [["m0", "m1", "m2"]]
        assert len({str(desk.shelf.stored[name].task_ids) for name in desk.chains[0]}) == 1
        assert set(desk.admission.waiting) == {"m3", "m4"}


@virtually
async def test_a_window_counts_chains() -> None:
    """The second chain is launched beside the first where two may run."""
    async with cluster("a", "b", shards=SHARDS) as small:
        desk = Desk(small, moves_per_chain=2, moves_at_once=2)
        await desk.add(moves(5))

        await desk.admission.admit(("a", "b"))

        assert desk.chains == [["m0", "m1"], ["m2", "m3"]]


@pytest.mark.parametrize("common", [{"actors_total": CHAIN_ACTORS}, {"state_bytes": CHAIN_BYTES}])
@virtually
async def test_a_large_shard_goes_alone(common: dict[str, int]) -> None:
    """What stands still at once is bounded by actors and by bytes, not by moves."""
    async with cluster("a", "b", shards=SHARDS) as small:
        desk = Desk(small, moves_per_chain=4, moves_at_once=2)
        await desk.add(moves(3, **common))

        await desk.admission.admit(("a", "b"))

        assert desk.chains == [["m0"], ["m1"]]


@virtually
async def test_another_route_is_another_chain() -> None:
    """A chain has one source and one destination, so that a dead node holds up nobody else's moves."""
    async with cluster("a", "b", "c", shards=SHARDS) as small:
        desk = Desk(small, moves_per_chain=4, moves_at_once=2)
        here, there = moves(4)[:2], [replace(move, destination="c") for move in moves(4)[2:]]
        await desk.add([here[0], there[0], here[1], there[1]])

        await desk.admission.admit(("a", "b", "c"))

        assert sorted(desk.chains) == [["m0", "m1"], ["m2", "m3"]]


@virtually
async def test_a_move_whose_record_cannot_be_saved_does_not_hold_up_the_others() -> None:
    """Those begun are launched at once; the error rises after that, and the move still waits."""
    async with cluster("a", "b", shards=SHARDS) as small:
        desk = Desk(small, moves_per_chain=3)
        await desk.add(moves(3))

        async def refuse(move: Move) -> None:
            if move.id == "m1":
                raise Unavailable("Redis is away")

        desk.shelf.before = refuse
        with pytest.raises(Unavailable):
            await desk.admission.admit(("a", "b"))

        assert desk.chains == [["m0", "m2"]]
        assert set(desk.admission.waiting) == {"m1"}


@virtually
async def test_after_slow_moves_fewer_actors_stand_still_and_after_quick_ones_more() -> None:
    """The budget is about how long a shard stops: what the machine can bear shows only in what it has taken."""
    async with cluster("a", "b", shards=64) as small:
        desk = Desk(small, moves_per_chain=4, moves_at_once=2)
        await desk.add(moves(64, actors_total=60))

        async def next_chains(after_s: float) -> list[int]:
            begun = len(desk.chains)
            await desk.admission.admit(("a", "b"))
            for chain in desk.chains[begun:]:
                for name in chain:
                    await desk.ended(name, after_s)
            return [len(chain) for chain in desk.chains[begun:]]

        slow = [await next_chains(0.2) for _ in range(4)]  # what took long is read of its record a round later
        quick = [await next_chains(0.01) for _ in range(7)]

        assert slow[0] == [4, 4]
        assert slow[-1] == [4]
        assert quick[-1] == [4, 4]


@virtually
async def test_a_move_that_was_given_up_tells_how_long_it_stood_still() -> None:
    """Those that take too long to commit are the ones that the room is there for."""
    async with cluster("a", "b", shards=SHARDS) as small:
        desk = Desk(small, moves_per_chain=4)
        await desk.add(moves(8, actors_total=60))
        await desk.admission.admit(("a", "b"))

        for name in desk.chains[0]:
            move = desk.shelf.stored[name]
            desk.outcome(name, Outcome.ABORTED)
            await desk.shelf.save(
                replace(move, status=MigrationStatus.ROLLED_BACK, paused_at=desk.now_s, finished_at=desk.now_s + 5)
            )
        await desk.admission.admit(())
        room = desk.admission._room

        assert room < ROOM_MOST
        await desk.admission.admit(())
        assert desk.admission._room == room


@virtually
async def test_what_is_read_of_ended_moves_while_the_lead_is_lost_is_nobodys() -> None:
    """The coordinator goes on as a standby."""
    async with cluster("a", "b", shards=SHARDS) as small:
        desk = Desk(small, moves_per_chain=1)
        await desk.add(moves(2))
        await desk.admission.admit(("a", "b"))
        await desk.ended("m0", 5.0)
        read = desk.shelf.moves_named

        async def read_late(ids: Collection[str]) -> list[Move]:
            desk.admission.forget_all()
            return await read(ids)

        desk.shelf.moves_named = read_late  # type: ignore[method-assign]
        await desk.admission._learn()

        assert desk.admission._room == ROOM_MOST


@virtually
async def test_ended_moves_are_read_together() -> None:
    """One question for all that have ended, none when none has: a launch must not wait for a round trip of each."""
    async with cluster("a", "b", shards=SHARDS) as small:
        desk = Desk(small, moves_per_chain=4, moves_at_once=2)
        await desk.add(moves(SHARDS))
        await desk.admission.admit(("a", "b"))
        asked: list[list[str]] = []
        read, desk.shelf.move = desk.shelf.moves_named, None  # type: ignore[assignment,method-assign]

        async def read_together(ids: Collection[str]) -> list[Move]:
            asked.append([*ids])
            return await read(ids)

        desk.shelf.moves_named = read_together  # type: ignore[method-assign]
        await desk.admission.admit(("a", "b"))
        for name in ("m0", "m1", "m2"):
            await desk.ended(name, 5.0)
        await desk.admission.admit(("a", "b"))
        await desk.admission.admit(("a", "b"))

        assert asked == [["m0", "m1", "m2"]]
        assert desk.admission._room < ROOM_MOST


# -- taking a step together --------------------------------------------------------------------------------------------
STEP, TASK = migration.CHAIN[3], "convoy's send"


async def together(
    monkeypatch: pytest.MonkeyPatch, errors: dict[str, BaseException], *, attempt: int = 0, shelf: Shelf | None = None,
    slow: Mapping[str, float] | None = None, gone: Collection[str] = (),
) -> tuple[Parted, list[str]]:  # fmt: skip
    """(who cannot go on, who took the step) of three moves; those in `errors` fail, those in `slow` take so long, and
    those in `gone` have ended or left before."""
    shelf, taken = shelf or await three(), []

    async def take(step: Any, context: Any, move_id: str, attempt: int, *, convoy_task: str) -> bool:
        await asyncio.sleep((slow or {}).get(move_id, 0.0))
        if move_id in errors:
            raise errors[move_id]
        if move_id not in gone:
            taken.append(move_id)
        return move_id not in gone

    monkeypatch.setattr(migration.driver, "take", take)
    nobody: Any = None
    store: Any = shelf
    context = StepContext(
        link=nobody, subjects=nobody, directory=nobody, store=store, settings=nobody, wall_clock=wall_clock
    )
    return await migration.driver.take_together(STEP, context, ("m0", "m1", "m2"), attempt, TASK), taken


async def three() -> Shelf:
    """Three moves of a convoy that wait for `STEP`."""
    shelf, task_ids = Shelf(), {step: f"convoy's {step}" for step in STEPS}
    for number in range(3):
        waiting = replace(planned(number), status=MigrationStatus.SERIALIZED, step=STEP.name, task_ids=task_ids)
        await shelf.save(waiting)
    return shelf


@virtually
async def test_one_move_that_cannot_be_carried_out_leaves_the_others_on_their_way() -> None:
    """A state that the destination cannot take ends its own shard's move alone."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        errors: dict[str, BaseException] = {"m1": StateNotPortable("x"), "m2": NotApplicable("y")}

        parted, taken = await together(monkeypatch, errors)

    assert (parted.lost, parted.behind, taken) == (["m1", "m2"], [], ["m0"])


@virtually
async def test_what_may_pass_is_tried_again_by_all_while_none_has_taken_the_step() -> None:
    """Nobody stands still for another; at the last attempt all are given up."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        errors: dict[str, BaseException] = dict.fromkeys(("m0", "m1", "m2"), Unavailable("away"))

        with pytest.raises(Unavailable):
            await together(monkeypatch, errors)
        parted, _ = await together(monkeypatch, errors, attempt=STEP_RETRIES)

    assert (parted.lost, parted.behind) == (["m0", "m1", "m2"], [])


@pytest.mark.parametrize("error", [Busy("x"), InDoubt("x"), WrongSequence("x")])
def test_a_move_whose_step_may_pass_later_leaves_those_that_have_taken_it(error: BaseException) -> None:
    """For a chain of its own: its record names the tasks of that, from the step that failed."""

    @virtually
    async def scene() -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            shelf = await three()
            parted, taken = await together(monkeypatch, {"m1": error}, attempt=1, shelf=shelf)

        assert (parted.lost, taken) == ([], ["m0", "m2"])
        [left] = parted.behind
        assert left == shelf.stored["m1"]
        assert left.step == STEP.name
        in_convoy = {step for step, task_id in left.task_ids.items() if task_id == f"convoy's {step}"}
        assert in_convoy == {"pause", "capture", "serialize"}

    scene()


@virtually
async def test_a_move_that_has_another_chain_or_has_ended_needs_none() -> None:
    """Its step failed because somebody else was quicker: the reconciler, a rollback, or another worker."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        shelf = await three()
        shelf.stored["m0"] = replace(shelf.stored["m0"], status=MigrationStatus.ROLLED_BACK, step=None)
        shelf.stored["m1"] = replace(shelf.stored["m1"], task_ids=dict.fromkeys(STEPS, "sent again"))

        parted, _ = await together(monkeypatch, dict.fromkeys(("m0", "m1"), WrongSequence("x")), shelf=shelf)

    assert (parted.lost, parted.behind) == ([], [])


@virtually
async def test_a_move_whose_record_cannot_be_written_stays_in_its_convoy() -> None:
    """Without new task ids no other chain may be sent; the convoy's next task takes the step it lacks."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        shelf = await three()

        async def refuse(move: Move) -> None:
            raise Unavailable("Redis is away")

        shelf.before = refuse
        parted, _ = await together(monkeypatch, {"m1": Busy("x")}, shelf=shelf)

    assert (parted.lost, parted.behind) == ([], [])


@virtually
async def test_a_move_that_takes_longer_than_the_others_leaves_them() -> None:
    """Those that have taken the step wait for it a moment, not for as long as its try may last."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        shelf, began_s = await three(), clock()

        parted, taken = await together(monkeypatch, {}, slow={"m1": 2 * GRACE_S, "m2": GRACE_S / 2}, shelf=shelf)

        assert (parted.lost, [move.id for move in parted.behind], taken) == ([], ["m1"], ["m0", "m2"])
        assert clock() - began_s == pytest.approx(GRACE_S)


@virtually
async def test_a_move_that_was_hurried_at_the_last_attempt_is_not_rolled_back() -> None:
    """Nothing was refused; one that fails then is given up."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        errors: dict[str, BaseException] = {"m2": Unavailable("away")}

        parted, taken = await together(monkeypatch, errors, slow={"m1": 2 * GRACE_S}, attempt=STEP_RETRIES)

    assert (parted.lost, [move.id for move in parted.behind], taken) == (["m2"], ["m1"], ["m0"])


@virtually
async def test_nobody_is_hurried_while_none_has_taken_the_step() -> None:
    """What stands still then stands still for its own sake."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        slow = {"m0": 2 * GRACE_S, "m1": 2.5 * GRACE_S, "m2": 2.9 * GRACE_S}

        parted, taken = await together(monkeypatch, {}, slow=slow)

    assert (parted.lost, parted.behind, taken) == ([], [], ["m0", "m1", "m2"])


@virtually
async def test_nobody_is_hurried_or_sent_away_for_one_that_has_gone_before() -> None:
    """A move that has ended, or goes on in another chain, does not stand still for the others."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        slow = {"m1": 2 * GRACE_S, "m2": 2.5 * GRACE_S}

        parted, taken = await together(monkeypatch, {}, slow=slow, gone=["m0"])
        assert (parted.lost, parted.behind, taken) == ([], [], ["m1", "m2"])

        with pytest.raises(Unavailable):
            await together(monkeypatch, dict.fromkeys(("m1", "m2"), Unavailable("away")), gone=["m0"])


@pytest.mark.parametrize(
    ("changes", "goes_on"),
    [
        ({"status": MigrationStatus.SENT, "step": "await_ack"}, True),
        ({"status": MigrationStatus.ROLLED_BACK, "step": None}, False),
        ({"task_ids": dict.fromkeys(STEPS, "sent again")}, False),
    ],
)
def test_a_step_tells_whether_its_move_goes_on_with_the_convoy(changes: dict[str, Any], goes_on: bool) -> None:
    """Past the step it does, whoever took that; it does not when it has ended, or has another chain."""

    @virtually
    async def scene() -> None:
        async with cluster() as small:
            shelf = await three()
            shelf.stored["m0"] = replace(shelf.stored["m0"], **{"task_ids": {STEP.name: TASK}, **changes})

            assert await migration.driver.take(STEP, worker(small, shelf), "m0", 0, convoy_task=TASK) is goes_on

    scene()


@virtually
async def test_a_bug_in_one_step_is_not_taken_for_an_outcome() -> None:
    """Only the error tree is handled: anything else ends the task, and its errback rolls all back."""
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(KeyError):
        await together(monkeypatch, {"m0": KeyError("bug"), "m1": Unavailable("away")})


@virtually
async def test_one_slow_handler_does_not_hold_up_the_other_shards_of_its_convoy() -> None:
    """They go on without it before its first try is over; it follows alone."""
    async with cluster("a", "b", shards=3, precopy_from_bytes=10**9) as small:
        # given a convoy of three shards, and a handler in the first that does not end
        keys = small.keys_of_shards()
        for key in keys:
            await small.send(key, "write", entry=0)
        Ledger.open_gate = asyncio.Event()
        await small.post("a", small.command(keys[0], "write_slowly", "slow", entry=1, lives_s=60))
        await until(lambda: Ledger.entered)
        shelf, task_ids = Shelf(), {step: f"convoy's {step}" for step in STEPS}
        convoy = await launched_together(small, shelf, 3, task_ids)
        broker = Broker(Random(1), visibility_timeout_s=small.settings.visibility_timeout_s)
        context = worker(small, shelf)
        threads = [asyncio.create_task(broker.work(context)) for _ in range(3)]

        # when they are moved
        began_s = clock()
        await broker.launch(*convoy)
        await until(lambda: [shelf.stored[name].status for name in ("m1", "m2")] == [MigrationStatus.COMPLETED] * 2)

        # then only the first is still about to be paused
        assert clock() - began_s < 2 * GRACE_S < small.settings.drain_handlers_s
        assert shelf.stored["m0"].status is MigrationStatus.PLANNED
        assert await small.send(keys[1], "read") == [0]

        # and it moves as well when its handler has ended
        Ledger.open_gate.set()
        await until(lambda: shelf.stored["m0"].status is MigrationStatus.COMPLETED)
        assert task_ids["pause"] not in shelf.stored["m0"].task_ids.values()
        for thread in threads:
            thread.cancel()


@virtually
async def test_a_plan_that_is_cancelled_while_its_convoy_waits_for_its_turn_stops_nobody() -> None:
    """Who cancels it ABORTs what was locked to be copied; the chain finds that, and closes no gate."""
    async with cluster("a", "b", shards=2) as small:
        shelf, task_ids = Shelf(), {step: f"convoy's {step}" for step in STEPS}
        for key in small.keys_of_shards():
            await small.send(key, "write", entry=0)
        convoy = await launched_together(small, shelf, 2, task_ids)
        shelf.plans["p1"] = MigrationPlan(id="p1", reason="by hand", created_at=wall_clock(), total=2)
        context, coordinator = worker(small, shelf), worker(small, shelf)
        begin = context.standing_still.begin

        async def cancelled(move_ids: Sequence[str]) -> None:
            shelf.plans["p1"] = replace(shelf.plans["p1"], cancelled=True)
            for move_id in move_ids:
                await coordinator.settle(move_id, error="its plan was cancelled")
            await begin(move_ids)

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(context.standing_still, "begin", cancelled)
            move_ids = [move.id for move in convoy]
            await migration.driver.drive(migration.CHAIN[0], context, move_ids, 0, task_ids["pause"])

        assert {move.status for move in shelf.stored.values()} == {MigrationStatus.CANCELLED}
        assert len(small.messages_to("precopy")) == 2
        assert not small.messages_to("pause")
        for key in small.keys_of_shards():
            assert await small.send(key, "write", entry=1) == 2
