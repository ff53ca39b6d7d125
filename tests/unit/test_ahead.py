"""Steps that a worker takes before their tasks come: what the tasks then do, and what happens when that fails."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from msgspec import structs

from routing.control import StepRequest, read_migration_request
from routing.errors import Timeout, Unavailable
from runtime.handover import FEW
from tests.unit.cluster import SmallCluster, cluster
from tests.unit.office import worker
from tests.unit.shelf import Shelf, planned, planned_move
from tests.unit.virtual_time import clock, until, virtually, wall_clock
from workflows.ahead import Ahead
from workflows.migration import CHAIN, driver
from workflows.records import MigrationStatus, Move

PAUSE, SEND, AWAIT_ACK, DELETE = CHAIN[0], CHAIN[3], CHAIN[4], CHAIN[5]
WAIT_S = 5.0  # of virtual time
TASK = "a chain's pause"


async def begun(small: SmallCluster, shelf: Shelf, number: int) -> Move:
    """A move of one of several shards that is planned and launched."""
    entry = await small.directory.refresh(f"shard.{number}")
    assert entry is not None
    move = replace(planned(number, number), lock_revision=entry.revision, started_at=wall_clock())
    return await shelf.save(replace(move, task_ids={"pause": TASK}))


def step_times(move: Move) -> list[float]:
    """When each step up to COMMIT was taken, of a move that has taken all of them."""
    times = [move.paused_at, move.captured_at, move.serialized_at, move.sent_at, move.acked_at]
    known = [time for time in times if time is not None]
    assert len(known) == len(times)
    return known


@virtually
async def test_only_the_last_step_is_waited_for() -> None:
    """The chain goes on while a step is being taken; what was not asked for ahead is no business of it."""
    ahead = Ahead(["capture", "send"])

    assert ahead.relieves("capture")
    assert not ahead.relieves("send")
    assert not await ahead.take("delete")
    waiting = asyncio.ensure_future(ahead.take("send"))
    await asyncio.sleep(0)
    assert not waiting.done()

    ahead.taken("capture")
    ahead.taken("send")
    ahead.end()
    assert await waiting


@virtually
async def test_a_step_that_failed_is_left_to_its_task() -> None:
    """Also one that seemed to be on its way when an earlier task looked."""
    ahead = Ahead(["capture", "send"])
    ahead.taken("capture")
    ahead.end()

    assert ahead.relieves("capture")
    assert not await ahead.take("send")


@virtually
async def test_after_the_pause_nothing_is_left_to_do_but_to_commit() -> None:
    """Each step is recorded with its time, and the tasks in between ask nobody."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry="one")
        shelf = Shelf()
        move = await planned_move(small, shelf)
        context = worker(small, shelf)

        await driver.take(PAUSE, context, move.id, 0)
        await until(lambda: shelf.stored[move.id].status is MigrationStatus.ACKED)
        asked = len(small.messages)
        for step in CHAIN[1:5]:
            await driver.take(step, context, move.id, 0)

        assert len(small.messages) == asked
        assert len(step_times(shelf.stored[move.id])) == 5
        await driver.take(DELETE, context, move.id, 0)
        assert shelf.stored[move.id].status is MigrationStatus.COMPLETED
        await small.served_by("b")


@virtually
@pytest.mark.parametrize(("actors", "asked"), [(FEW, 0), (FEW + 1, 1)], ids=["few", "many"])
async def test_a_unit_of_few_actors_is_prepared_together_with_its_pause(actors: int, asked: int) -> None:
    """One answer tells of all steps up to COMMIT; a larger one is prepared while Celery hands the chain on."""
    async with cluster("a", "b") as small:
        for number in range(actors):
            await small.send(f"k{number}", "write", entry="one")
        shelf = Shelf()
        move = await planned_move(small, shelf)

        await driver.take(PAUSE, worker(small, shelf), move.id, 0)
        await until(lambda: shelf.stored[move.id].status is MigrationStatus.ACKED)

        assert len(small.messages_to("prepare")) == asked
        recorded = shelf.stored[move.id]
        assert step_times(recorded) == sorted(step_times(recorded))
        assert recorded.actors_total == actors


@virtually
async def test_a_pause_does_not_wait_for_a_destination_that_is_away() -> None:
    """What cannot be had at once is left to the steps, and their tasks tell what is wrong."""
    async with cluster("a", "b", precopy_from_bytes=10**9) as small:
        await small.send("k", "write", entry="one")
        request = await small.lock("m", "b")

        async def silent(_: object) -> dict[str, object]:
            await asyncio.sleep(60.0)
            return {}

        small.nodes["b"].node._verbs["stage"] = (read_migration_request, silent)
        began_s = clock()

        paused = await small.ask("pause", structs.replace(request, ahead=True))

        assert clock() - began_s < 0.1
        assert list(paused["prepared"]) == ["capture", "serialize"]


@virtually
async def test_a_step_that_is_delivered_twice_at_once_is_taken_and_recorded_once() -> None:
    """Celery delivers a task a second time while a thread of the same worker still takes it."""
    async with cluster("a", "b", latency=lambda: 0.01) as small:
        await small.send("k", "write", entry="one")
        shelf = Shelf()
        move = await planned_move(small, shelf)
        context = worker(small, shelf)

        await asyncio.gather(*(driver.take(PAUSE, context, move.id, 0) for _ in range(3)))
        await until(lambda: shelf.stored[move.id].status is MigrationStatus.ACKED)

        assert len(small.messages_to("pause")) == 1


@virtually
async def test_a_step_is_recorded_at_the_time_at_which_the_source_took_it() -> None:
    """Not when the worker heard of all of them at once: `ferry migration` shows where the time of a move went."""
    async with cluster("a", "b", latency=lambda: 0.05, precopy_from_bytes=10**9) as small:
        await small.send("k", "write", entry="one")
        shelf = Shelf()
        move = await planned_move(small, shelf)

        await driver.take(PAUSE, worker(small, shelf), move.id, 0)
        await until(lambda: shelf.stored[move.id].status is MigrationStatus.ACKED)

        paused_at, captured_at, serialized_at, sent_at, acked_at = step_times(shelf.stored[move.id])
        assert paused_at <= captured_at <= serialized_at
        assert sent_at - serialized_at >= 0.2  # there, back, and so again: manifest and bytes
        assert sent_at <= acked_at <= wall_clock()


@virtually
async def test_a_worker_that_knows_nothing_takes_all_missing_steps_before_it_commits() -> None:
    """The worker that paused died with everything it had taken and not recorded."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry="one")
        shelf = Shelf()
        move = await planned_move(small, shelf)
        dead, other = worker(small, shelf), worker(small, shelf)

        async def lost(_: object) -> None:
            raise Unavailable("Redis is away")

        shelf.before = lost
        await driver.take(PAUSE, dead, move.id, 0)
        await asyncio.sleep(1.0)
        shelf.before = None
        assert shelf.stored[move.id].status is MigrationStatus.PLANNED

        await driver.take(DELETE, other, move.id, 0)

        assert shelf.stored[move.id].status is MigrationStatus.COMPLETED
        assert await small.send("k", "read") == ["one"]


@virtually
async def test_no_commit_is_asked_for_while_the_record_cannot_be_saved() -> None:
    """The task of COMMIT sees the failure of what was saved behind the tasks before it."""
    async with cluster("a", "b") as small:
        shelf = Shelf()
        move = await planned_move(small, shelf)
        context = worker(small, shelf)

        async def lost(_: object) -> None:
            raise Unavailable("Redis is away")

        shelf.before = lost
        await driver.take(PAUSE, context, move.id, 0)
        await driver.take(AWAIT_ACK, context, move.id, 0)

        with pytest.raises(Unavailable):
            await driver.take(DELETE, context, move.id, 0)
        assert not small.messages_to("commit")


@virtually
async def test_commit_is_asked_for_when_the_chain_has_come_to_await_ack() -> None:
    """Not before, whatever the source has taken by then; and then without its own task."""
    async with cluster("a", "b") as small:
        shelf = Shelf()
        move = await planned_move(small, shelf)
        context = worker(small, shelf)
        await driver.take(PAUSE, context, move.id, 0)
        for step in CHAIN[1:4]:
            await driver.take(step, context, move.id, 0)
        await asyncio.sleep(WAIT_S)
        assert not small.messages_to("commit")

        await driver.take(AWAIT_ACK, context, move.id, 0)
        await until(lambda: shelf.stored[move.id].status is MigrationStatus.COMPLETED)
        await driver.take(DELETE, context, move.id, 0)

        assert len(small.messages_to("commit")) == 1


@virtually
async def test_a_commit_that_was_refused_ahead_is_its_tasks_first_try() -> None:
    """The task fails with the same error, once; Celery then tries it again, or rolls back."""
    async with cluster("a", "b") as small:
        shelf = Shelf()
        move = await planned_move(small, shelf)
        context, verbs = worker(small, shelf), small.nodes["a"].node._verbs
        schema, commit = verbs["commit"]
        asked: list[StepRequest] = []

        async def refuse(request: StepRequest) -> dict[str, object]:
            asked.append(request)
            raise Unavailable("not now")

        verbs["commit"] = (schema, refuse)
        await driver.take(PAUSE, context, move.id, 0)
        await driver.take(AWAIT_ACK, context, move.id, 0)
        with pytest.raises(Unavailable, match="not now"):
            await driver.take(DELETE, context, move.id, 0)
        assert len(asked) == 1

        verbs["commit"] = (schema, commit)
        await driver.take(DELETE, context, move.id, 1)
        assert shelf.stored[move.id].status is MigrationStatus.COMPLETED


@virtually
async def test_two_workers_that_commit_at_once_agree() -> None:
    """One is ahead of its task, which went to the other: both are told the same, and one of them records it."""
    async with cluster("a", "b", latency=lambda: 0.01) as small:
        shelf = Shelf()
        move = await planned_move(small, shelf)
        ahead, other = worker(small, shelf), worker(small, shelf)

        async def slow(_: object) -> None:
            await asyncio.sleep(0.1)

        await driver.take(PAUSE, ahead, move.id, 0)
        await until(lambda: shelf.stored[move.id].status is MigrationStatus.ACKED)
        shelf.before = slow
        await driver.take(AWAIT_ACK, ahead, move.id, 0)
        await driver.take(DELETE, other, move.id, 0)
        await driver.take(DELETE, ahead, move.id, 0)

        assert shelf.stored[move.id].status is MigrationStatus.COMPLETED
        assert shelf.stored[move.id].blackout_ms is not None


@virtually
async def test_a_chain_has_its_turn_when_the_one_before_it_has_committed() -> None:
    """Two at once would both stand still for twice as long, and one beside another that copies for a third longer."""
    async with cluster("a", "b", shards=2) as small:
        shelf = Shelf()
        moves = [await begun(small, shelf, number) for number in range(2)]
        context = worker(small, shelf)

        await driver.drive(PAUSE, context, [moves[0].id], 0, TASK)
        second = asyncio.ensure_future(driver.drive(PAUSE, context, [moves[1].id], 0, TASK))
        await asyncio.sleep(0.05)
        assert not second.done()
        assert len(small.messages_to("pause")) == 1
        for step in CHAIN[1:]:
            await driver.drive(step, context, [moves[0].id], 0, TASK)
        await second

        verbs = [subject.rpartition(".")[2] for kind, subject in small.messages if kind == "request"]
        assert [verb for verb in verbs if verb in ("precopy", "pause", "commit")] == [
            "pause", "commit", "precopy", "pause",
        ]  # fmt: skip


@virtually
async def test_a_convoy_is_copied_ahead_before_the_first_gate_is_closed() -> None:
    """Otherwise the first of its shards would stand still while the last is being copied."""
    async with cluster("a", "b", shards=2) as small:
        shelf = Shelf()
        moves = [await begun(small, shelf, number) for number in range(2)]

        await driver.drive(PAUSE, worker(small, shelf), [move.id for move in moves], 0, TASK)

        verbs = [subject.rpartition(".")[2] for kind, subject in small.messages if kind == "request"]
        asked = [verb for verb in verbs if verb in ("precopy", "pause")]
        assert asked == ["precopy", "precopy", "pause", "pause"]


@virtually
async def test_times_are_in_order_when_the_answer_to_the_pause_was_lost() -> None:
    """The second answer tells when the gate was closed, not when it was asked again."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry="one")
        shelf = Shelf()
        move = await planned_move(small, shelf)
        context = worker(small, shelf)
        small.disturb("drop_reply", "request", ".pause")

        with pytest.raises(Timeout):
            await driver.take(PAUSE, context, move.id, 0)
        await driver.take(PAUSE, context, move.id, 1)
        await until(lambda: shelf.stored[move.id].status is MigrationStatus.ACKED)

        times = step_times(shelf.stored[move.id])
        assert times == sorted(times)


@virtually
async def test_times_are_in_order_when_one_answer_was_on_its_way_for_longer_than_the_next() -> None:
    """How long ago a step was taken is told at the sending; how long an answer then travels, nobody knows."""
    async with cluster("a", "b") as small:
        shelf = Shelf()
        context = worker(small, shelf)
        move = await begun(small, shelf, 0)
        context.taken(move.id, "pause", 0.0)
        context.taken(move.id, "capture", 0.003)

        paused = context.passed(move, MigrationStatus.PAUSED)
        captured = context.passed(paused, MigrationStatus.CAPTURED)

        assert (paused.paused_at, captured.captured_at) == (wall_clock(), wall_clock())


@virtually
async def test_a_step_that_was_refused_is_recorded_when_it_passes() -> None:
    """Not at the time of the refusal that came with the pause."""
    async with cluster("a", "b", precopy_from_bytes=10**9) as small:
        await small.send("k", "write", entry="one")
        shelf = Shelf()
        move = await planned_move(small, shelf)
        context, verbs = worker(small, shelf), small.nodes["b"].node._verbs

        async def refuse(_: object) -> dict[str, object]:
            raise Unavailable("not now")

        stage, verbs["stage"] = verbs["stage"], (read_migration_request, refuse)
        await driver.take(PAUSE, context, move.id, 0)
        await asyncio.sleep(0.1)
        with pytest.raises(Unavailable):
            await driver.take(SEND, context, move.id, 0)
        await asyncio.sleep(2.0)
        verbs["stage"], tried_at = stage, wall_clock()
        await driver.take(SEND, context, move.id, 1)
        await context.recall(move.id)

        sent_at = shelf.stored[move.id].sent_at
        assert sent_at is not None
        assert sent_at >= tried_at


@virtually
async def test_a_record_that_redis_has_lost_costs_a_pause_more() -> None:
    """A fail-over of Redis may take acknowledged writes back; the steps are recorded anew from there."""
    async with cluster("a", "b", latency=lambda: 0.02) as small:
        for number in range(FEW + 1):
            await small.send(f"k{number}", "write", entry="one")
        shelf = Shelf()
        move = await planned_move(small, shelf)
        before, context = shelf.stored[move.id], worker(small, shelf)
        await driver.take(PAUSE, context, move.id, 0)
        await until(lambda: shelf.stored[move.id].status is MigrationStatus.PAUSED)

        shelf.stored[move.id] = before
        for step in CHAIN[1:]:
            await driver.take(step, context, move.id, 0)

        assert shelf.stored[move.id].status is MigrationStatus.COMPLETED
        assert len(small.messages_to("pause")) == 2


@virtually
async def test_a_task_that_comes_twice_does_not_take_a_save_away_from_the_next() -> None:
    """What is passed while a save is on its way is saved after it, whoever waits for that one as well."""
    async with cluster("a", "b", latency=lambda: 0.015) as small:
        for number in range(FEW + 1):
            await small.send(f"k{number}", "write", entry="one")
        shelf = Shelf()
        move = await planned_move(small, shelf)
        context = worker(small, shelf)

        async def slow(_: object) -> None:
            await asyncio.sleep(0.5)

        shelf.before = slow
        await driver.take(PAUSE, context, move.id, 0)
        await asyncio.sleep(0.015)
        await driver.take(PAUSE, context, move.id, 0)
        await asyncio.sleep(1.1)

        assert shelf.stored[move.id].status is MigrationStatus.ACKED


@virtually
async def test_a_convoy_that_comes_twice_is_copied_ahead_by_one_after_the_other() -> None:
    """Both say in the record that they are at it; neither takes the other's revision away."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry="one")
        shelf = Shelf()
        move = await planned_move(small, shelf)
        context, verbs = worker(small, shelf), small.nodes["a"].node._verbs
        schema, pause = verbs["pause"]
        until_s = clock() + 3.0

        async def at_it(_: object) -> dict[str, object]:
            await asyncio.sleep(0.05)
            return {"pending": True} if clock() < until_s else {}

        async def pause_late(request: StepRequest) -> dict[str, object]:
            await asyncio.sleep(0.2)
            return {"pending": True} if clock() < until_s else await pause(request)

        verbs["precopy"], verbs["pause"] = (schema, at_it), (schema, pause_late)

        async def second() -> None:
            await asyncio.sleep(1.03)
            await driver.drive(PAUSE, context, [move.id], 0, TASK)

        await asyncio.gather(driver.take(PAUSE, context, move.id, 0), second())

        await until(lambda: shelf.stored[move.id].status is MigrationStatus.ACKED)
