"""Small moves that go the same way share a chain; each still fails, retries and ends for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from routing.directory import MapEntry
from routing.errors import NotApplicable, StateNotPortable, Unavailable
from routing.shard_map import LastMove, Outcome, Ownership
from tests.unit.cluster import SmallCluster, cluster
from tests.unit.test_races import Shelf, planned
from tests.unit.virtual_time import virtually, wall_clock
from workflows import migration
from workflows.admission import CHAIN_ACTORS, CHAIN_BYTES, ROOM_MOST, Admission
from workflows.context import StepContext
from workflows.records import MigrationStatus, Move

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
        read = desk.shelf.move

        async def read_late(move_id: str) -> Move | None:
            desk.admission.forget_all()
            return await read(move_id)

        desk.shelf.move = read_late  # type: ignore[method-assign]
        await desk.admission._learn()

        assert desk.admission._room == ROOM_MOST


# -- taking a step together --------------------------------------------------------------------------------------------
async def together(
    monkeypatch: pytest.MonkeyPatch, errors: dict[str, BaseException], *, attempt: int
) -> tuple[list[str], list[str]]:
    """(who is to be rolled back, who took the step) of three moves, those in `errors` failing."""
    taken = []

    async def take(step: Any, context: Any, move_id: str, attempt: int) -> None:
        if move_id in errors:
            raise errors[move_id]
        taken.append(move_id)

    monkeypatch.setattr(migration, "take", take)
    context: Any = None
    lost = await migration.take_together(migration.CHAIN[3], context, ("m0", "m1", "m2"), attempt)
    return lost, taken


async def test_one_move_that_cannot_be_carried_out_leaves_the_others_on_their_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A state that the destination cannot take ends its own shard's move alone."""
    errors: dict[str, BaseException] = {"m1": StateNotPortable("x"), "m2": NotApplicable("y")}

    assert await together(monkeypatch, errors, attempt=0) == (["m1", "m2"], ["m0"])


async def test_what_may_pass_is_tried_again_and_given_up_at_the_last_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others have taken the step by then, and go on."""
    errors: dict[str, BaseException] = {"m1": Unavailable("away")}

    with pytest.raises(Unavailable):
        await together(monkeypatch, errors, attempt=0)
    assert await together(monkeypatch, errors, attempt=migration.STEP_RETRIES) == (["m1"], ["m0", "m2"])


async def test_a_bug_in_one_step_is_not_taken_for_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the error tree is handled: anything else ends the task, and its errback rolls all back."""
    with pytest.raises(KeyError):
        await together(monkeypatch, {"m0": KeyError("bug"), "m1": Unavailable("away")}, attempt=0)
