"""Races that once broke a promise of the protocol, each as a scene that states the promise."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from typing import Any

import pytest

from routing.address import ActorId
from routing.birth import found_or_join
from routing.errors import FerryError, HandlerFailed, Timeout, TransientError, Unavailable, WrongSequence
from routing.link import Entry
from routing.shard_map import Outcome
from runtime.actor import Actor, command
from runtime.testing import MemoryLink
from tests.unit.cluster import UNIT, Ledger, SmallCluster, cluster
from tests.unit.virtual_time import clock, until, virtually, wall_clock
from workflows.admission import Admission
from workflows.context import StepContext
from workflows.coordinator import Coordinator
from workflows.desk import Desk
from workflows.migration import CHAIN, driver
from workflows.reconciler import Reconciler
from workflows.records import TERMINAL, MigrationPlan, MigrationStatus, Move


class HeldLink:
    """A link whose reads of one actor's log wait until they are let go: a slow leader, for one subject."""

    def __init__(self, link: MemoryLink) -> None:
        self._link = link
        self.held = ""  # end of the subjects whose reads wait
        self.waiting = asyncio.Event()
        self.let_go = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    async def last(self, stream: str, subject: str, *, timeout_s: float) -> Entry | None:
        if self.held and subject.endswith(self.held):
            self.waiting.set()
            await self.let_go.wait()
        return await self._link.last(stream, subject, timeout_s=timeout_s)


async def command_during_a_late_capture(small: SmallCluster) -> Any:
    """An aborted move's capture is still reading while an actor of its shard runs a command; the command's answer."""
    links: list[HeldLink] = []

    def wrap(link: MemoryLink) -> Any:
        links.append(HeldLink(link))
        return links[-1]

    await small.add("a", wrap=wrap)
    await small.add("b")
    await small.assign("a")
    await small.served_by("a")
    # given an actor that capture has to load again (its handler failed), and one behind it in the shard
    await small.send("first", "touch")
    await small.send("second", "write", entry=1)
    with pytest.raises(HandlerFailed):
        await small.send("first", "write_and_fail", entry=0)
    request = await small.lock("m1", "b")
    await small.step("pause", request)
    links[0].held = "=first"
    capture = asyncio.create_task(small.step("capture", request))
    await links[0].waiting.wait()

    # when the move is aborted meanwhile, and the second actor is just running a command when capture gets to it
    Ledger.open_gate = asyncio.Event()
    await small.abort("m1")
    await until(lambda: small.nodes["a"].node.host.units[UNIT].pause is None)
    writing = asyncio.create_task(small.send("second", "write_slowly", entry=2))
    await until(lambda: Ledger.entered == 1)
    links[0].held = ""
    links[0].let_go.set()
    with pytest.raises(FerryError):
        await capture
    Ledger.open_gate.set()
    return await writing


@virtually
async def test_a_capture_that_outlives_its_pause_does_not_touch_actors_in_use() -> None:
    """A command that was acknowledged is seen by every later query and command, whatever a late capture does."""
    async with cluster() as small:
        acknowledged = await command_during_a_late_capture(small)

        # then what was acknowledged is there
        assert acknowledged == 2
        assert await small.send("second", "read") == [1, 2]


@virtually
async def test_what_a_late_capture_lost_is_not_written_into_a_snapshot() -> None:
    """No acknowledged command is lost: not even when the actor rolls its log up and is activated elsewhere."""
    async with cluster(snapshot_every=4) as small:
        await command_during_a_late_capture(small)

        for entry in (3, 4, 5, 6):
            await small.send("second", "write", entry=entry)
        await small.fail_over("b")
        await small.served_by("b")

        assert await small.send("second", "read") == [1, 2, 3, 4, 5, 6]


# -- admission, reconciler, desk ---------------------------------------------------------------------------------------
class Shelf:
    """The record store's compare-and-set in memory. `lose` answers of saves that did land; `before` runs first."""

    def __init__(self) -> None:
        self.stored: dict[str, Move] = {}
        self.plans: dict[str, MigrationPlan] = {}
        self.unreadable: dict[str, int] = {}  # id -> revision
        self.lose: Callable[[Move], bool] = lambda move: False
        self.before: Callable[[Move], Awaitable[None]] | None = None
        self.between: Callable[[], Awaitable[None]] | None = None

    async def save(self, move: Move, *, actors: Any = (), through: Any = ()) -> Move:
        if self.before is not None:
            await self.before(move)
        await asyncio.sleep(0)
        known = self.stored.get(move.id)
        if (known.revision if known else 0) != move.revision:
            raise WrongSequence(f"move {move.id} was saved by another")
        self.stored[move.id] = replace(move, revision=move.revision + 1)
        if self.lose(move):
            raise Unavailable("Redis does not serve (the answer was lost)")
        return self.stored[move.id]

    async def create_plan(self, plan: MigrationPlan, moves: list[Move], actors: Any) -> list[Move]:
        self.plans[plan.id] = plan
        stored = [await self.save(move) for move in moves]
        if self.between is not None:
            await self.between()
        return stored

    async def move(self, move_id: str) -> Move | None:
        await asyncio.sleep(0)
        return self.stored.get(move_id)

    async def moves(self, plan_id: str | None = None, limit: int = 100) -> list[Move]:
        return [move for move in self.stored.values() if move.plan_id == plan_id][:limit]

    async def unfinished_moves(self) -> list[Move]:
        await asyncio.sleep(0)
        return [move for move in self.stored.values() if move.status not in TERMINAL]

    async def unreadable_moves(self, *, besides: Collection[str]) -> dict[str, int]:
        return dict(self.unreadable)

    async def end_unreadable(self, move_id: str, *, revision: int, now: float, error: str) -> bool:
        return self.unreadable.pop(move_id) == revision

    async def plan(self, plan_id: str) -> MigrationPlan | None:
        return self.plans.get(plan_id)

    async def save_plan(self, plan: MigrationPlan) -> MigrationPlan:
        self.plans[plan.id] = plan
        return plan

    async def running_plans(self) -> list[MigrationPlan]:
        return [plan for plan in self.plans.values() if plan.finished_at is None]

    async def trim(self, keep: int) -> int:
        return 0

    async def note(self, event: Any) -> None: ...

    async def close(self) -> None: ...


def planned(number: int, shard: int = 0, *, plan_id: str = "p1") -> Move:
    return Move(
        id=f"m{number}", plan_id=plan_id, unit=f"shard.{shard}", shard=shard, source="a", destination="b",
        created_at=wall_clock() + number / 1000,
    )  # fmt: skip


class Office:
    """Admission and reconciler of one leader over a shelf, with the cluster's map."""

    def __init__(self, small: SmallCluster, shelf: Shelf, *, moves_at_once: int = 2) -> None:
        store: Any = shelf
        self.launched: list[str] = []
        self.context = StepContext(
            link=small.link, subjects=small.subjects, directory=small.directory, store=store, settings=small.settings,
            wall_clock=wall_clock,
        )  # fmt: skip
        self.admission = Admission(
            store=store, directory=small.directory, context=self.context, launch=self._launch,
            moves_at_once=moves_at_once, wall_clock=wall_clock,
        )  # fmt: skip
        self.reconciler = Reconciler(
            store=store, directory=small.directory, context=self.context, admission=self.admission,
            records_kept=1000, wall_clock=wall_clock, clock=clock,
        )  # fmt: skip

    async def _launch(self, move: Move) -> None:
        self.launched.append(move.id)

    async def run(self, for_s: float) -> None:
        """What Coordinator._tend_moves does while nothing changes in membership."""
        until_s = clock() + for_s
        while clock() < until_s:
            for act in (self.reconciler.reconcile, lambda: self.admission.admit(("a", "b"))):
                try:
                    await act()
                except TransientError:
                    break
            await asyncio.sleep(1.0)


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


# -- steps whose records are saved while the chain goes on -------------------------------------------------------------
async def planned_move(small: SmallCluster, shelf: Shelf) -> Move:
    entry = await small.directory.refresh(UNIT)
    assert entry is not None
    return await shelf.save(replace(planned(1), lock_revision=entry.revision, started_at=wall_clock()))


def worker(small: SmallCluster, shelf: Shelf) -> StepContext:
    store: Any = shelf
    return StepContext(
        link=small.link, subjects=small.subjects, directory=small.directory, store=store, settings=small.settings,
        wall_clock=wall_clock,
    )  # fmt: skip


@virtually
async def test_a_worker_that_saw_a_move_some_steps_ago_reads_its_record_again() -> None:
    """Two workers take turns: what one remembers of the move is old when its turn comes, and is not acted upon."""
    async with cluster("a", "b") as small:
        shelf = Shelf()
        move = await planned_move(small, shelf)
        first, second = worker(small, shelf), worker(small, shelf)

        for step, context in zip(CHAIN, (first, second, second, first, second, first), strict=True):
            await driver.take(step, context, move.id, 0)

        assert shelf.stored[move.id].status is MigrationStatus.COMPLETED


@virtually
async def test_a_step_whose_predecessor_was_never_recorded_takes_that_one_again() -> None:
    """A worker died after a step and before its record; Celery goes on with the next."""
    async with cluster("a", "b") as small:
        shelf = Shelf()
        move = await planned_move(small, shelf)
        for step in CHAIN:
            before = shelf.stored[move.id]
            await driver.take(step, worker(small, shelf), move.id, 0)
            if step.name in ("capture", "send"):
                await asyncio.sleep(1.0)
                shelf.stored[move.id] = before

        assert shelf.stored[move.id].status is MigrationStatus.COMPLETED


@virtually
async def test_a_store_that_takes_no_writes_makes_each_try_of_a_step_fail() -> None:
    """Steps taken again and again without a pause would keep extending the pause of the shard."""
    async with cluster("a", "b") as small:
        shelf = Shelf()
        move = await planned_move(small, shelf)
        context = worker(small, shelf)

        async def read_only(saved: Move) -> None:
            raise Unavailable("Redis is read-only")

        shelf.before = read_only
        await driver.take(CHAIN[0], context, move.id, 0)
        await asyncio.sleep(1.0)
        asked = len(small.messages)
        for attempt in range(3):
            with pytest.raises(Unavailable):
                await driver.take(CHAIN[-1], context, move.id, attempt)

        assert len(small.messages) - asked < 60
        await until(lambda: small.nodes["a"].node.host.units[UNIT].pause is None)


# -- the source's own clock on a lock ----------------------------------------------------------------------------------
@virtually
async def test_s1_a_lock_seen_together_with_the_abort_before_it_is_aborted_too() -> None:
    """A source that missed the abort and saw only the next lock still aborts a lock that nobody follows up."""
    async with cluster("a", "b") as small:
        request = await small.lock("m1", "b")
        await small.step("pause", request)
        node = small.nodes["a"]
        node.cut()
        await small.abort("m1")
        await small.lock("m2", "b")
        node.heal()

        await until(lambda: small.nodes["a"].node.host.units[UNIT].pause is None)
        await asyncio.sleep(small.settings.pause_lease_s * 3)

        assert (await small.map()).move is None


# -- what a caller is told ---------------------------------------------------------------------------------------------
@virtually
async def test_a_command_in_doubt_at_the_old_owner_is_not_reported_as_surely_not_applied() -> None:
    """Unavailable and Timeout say "was not applied"; what may have landed is InDoubt."""
    async with cluster("a", "b", append_timeout_s=1.0) as small:
        await small.send("k", "write", entry=1)
        router = small.nodes["a"].node.router
        small.disturb("drop_reply", "append", "=k")
        sending = asyncio.create_task(router.send_message(ActorId("ledger", "k"), "write", {"entry": 2}, timeout_s=6.0))
        await until(small.disturbed)
        await small.fail_over("b")
        small.nodes["b"].cut()
        with pytest.raises(FerryError) as caught:
            await sending
        assert len(small.log("k")) == 2
        assert not isinstance(caught.value, Timeout | Unavailable), caught.value


# -- an actor's own mistakes -------------------------------------------------------------------------------------------
class Fragile(Actor):
    """Its constructor fails, for example because a file is missing on this machine."""

    actor_type = "fragile"

    def __init__(self) -> None:
        raise RuntimeError("a mistake in the actor")

    @command
    def go(self) -> bool:
        return True


@virtually
async def test_an_actor_that_cannot_be_constructed_does_not_end_the_node() -> None:
    """A mistake of one actor class is answered to its caller; the other actors of the node go on."""
    async with cluster() as small:
        await small.add("a", classes=(Ledger, Fragile))
        await small.assign("a")
        await small.served_by("a")
        with pytest.raises(FerryError):
            await small.router.send_message(ActorId("fragile", "k"), "go", {}, timeout_s=3.0)

        assert not small.nodes["a"].task.done()
        assert await small.send("k", "write", entry=1) == 1


# -- the coordinator ---------------------------------------------------------------------------------------------------
async def coordinator(small: SmallCluster, link: Any = None) -> tuple[Coordinator, asyncio.Task[None], asyncio.Event]:
    async def launch(move: Move) -> None: ...

    store: Any = Shelf()
    process = Coordinator(
        small.settings, name="c", link=link or small.nats.link("coordinator"), store=store, launch=launch, clock=clock,
        wall_clock=wall_clock,
    )  # fmt: skip
    await process.start()
    stopping = asyncio.Event()
    return process, asyncio.create_task(process.serve(stopping)), stopping


@pytest.mark.parametrize("offset_s", [0.0, 0.2, 0.4, 0.6, 0.8])
def test_a_nats_server_that_stood_still_does_not_cost_living_nodes_their_shards(offset_s: float) -> None:
    """While NATS stood still nobody could renew: every node gets its chance before it counts as dead.

    A stopped server (SIGSTOP, a frozen VM) keeps its connections, so nothing reconnects.
    """

    @virtually
    async def scene() -> None:
        stalled_until = [0.0]
        small = SmallCluster(shards=8, latency=lambda: max(0.0005, stalled_until[0] - clock()))
        await found_or_join(small.link, small.settings)
        await small.directory.start()
        await small.add("a")
        await asyncio.sleep(offset_s)
        await small.add("b")
        _, serving, stopping = await coordinator(small)
        try:
            await until(lambda: len(small.directory.entries()) == 8)
            await asyncio.sleep(10)
            before = {unit: entry.ownership.epoch for unit, entry in small.directory.entries().items()}
            stalled_until[0] = clock() + 12.0
            await asyncio.sleep(30)
            after = {unit: entry.ownership.epoch for unit, entry in small.directory.entries().items()}
            assert after == before
        finally:
            stopping.set()
            await serving
            for running in small.everyone:
                running.task.cancel()
            await asyncio.gather(*(running.task for running in small.everyone), return_exceptions=True)
            for running in small.everyone:
                await running.node.stop()
            await small.directory.stop()

    scene()


class DeafLink:
    """A link whose watch of the leases can go silent alone: all else goes through."""

    def __init__(self, link: MemoryLink) -> None:
        self._link = link
        self.deaf = False
        self._missed: dict[str, tuple[Callable[[Entry], None], Entry]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    async def watch(self, stream: str, subject: str, handler: Callable[[Entry], None], *, timeout_s: float) -> Any:
        def hear(entry: Entry) -> None:
            if self.deaf:
                self._missed[entry.subject] = handler, entry
            else:
                handler(entry)

        follows_leases = stream.endswith("-leases")
        return await self._link.watch(stream, subject, hear if follows_leases else handler, timeout_s=timeout_s)

    async def hear_again(self) -> None:
        """As a watch that begins anew: the last entry of each key, and not all of them at once."""
        self.deaf = False
        for handler, entry in self._missed.values():
            handler(entry)
            await asyncio.sleep(0.15)


@pytest.mark.parametrize("leader_lease_s", [2.0, 5.0, 30.0])
def test_a_leader_that_hears_of_nobody_takes_nobody_for_dead(leader_lease_s: float) -> None:
    """Its watch of the leases was silent, and nobody's lease: all keep their shards. Who is dead then is found dead."""

    @virtually
    async def scene() -> None:
        # given three nodes with two shards each, and a leader that hears them
        async with cluster(shards=6, leader_lease_s=leader_lease_s) as small:
            for number, name in enumerate("abc"):
                await small.add(name)
                await asyncio.sleep(0.3)
                for unit in (f"shard.{2 * number}", f"shard.{2 * number + 1}"):
                    await small.assign(name, unit)
                    await small.served_by(name, unit)
            link = DeafLink(small.nats.link("coordinator"))
            leader, serving, stopping = await coordinator(small, link)
            leader.suspended = True
            await asyncio.sleep(10)
            before = {unit: entry.ownership.epoch for unit, entry in small.directory.entries().items()}

            # when its watch of the leases says nothing for longer than a lease and the margin, and then goes on
            link.deaf = True
            await asyncio.sleep(9)
            assert leader.leading
            await link.hear_again()
            await asyncio.sleep(10)

            # then nobody has lost anything
            after = {unit: entry.ownership.epoch for unit, entry in small.directory.entries().items()}
            assert after == before

            # and a node that dies is still noticed
            small.nodes["c"].cut()
            await until(lambda: "c" not in {entry.ownership.owner for entry in small.directory.entries().values()})
            stopping.set()
            await serving

    scene()


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


@virtually
async def test_an_earlier_life_that_wakes_up_does_not_take_its_shards_back() -> None:
    """A zombie whose id was taken over by a new incarnation learns that and goes; the map stays with the new one."""
    async with cluster("a", "b", shards=8, latency=lambda: 0.0005) as small:
        old = small.nodes["a"]
        new = await small.restart("a")
        for shard in range(8):
            await small.served_by("a", f"shard.{shard}")
        before = [(await small.map(f"shard.{shard}")).epoch for shard in range(8)]

        old.heal()
        await until(old.task.done)
        await asyncio.sleep(5)

        assert [(await small.map(f"shard.{shard}")).epoch for shard in range(8)] == before
        assert not new.task.done()
