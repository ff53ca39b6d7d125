"""A planned move, launched as the coordinator launches it, on a real worker between real nodes."""

from __future__ import annotations

import asyncio

import pytest

from tests.celery.scene import DESTINATION, SOURCE, Scene, until
from workflows import migration
from workflows.records import STATUS_AFTER, STEPS, MigrationStatus

EVERY_STATUS = list(STATUS_AFTER.values())


async def test_a_move_passes_all_six_statuses_in_order_while_its_actors_are_in_use(scene: Scene) -> None:
    """Each step is taken once, in order, and written down; nobody who uses the actors meanwhile loses a command."""
    # given actors that are in use at the source
    async with scene.traffic() as traffic:
        planned = await scene.plan_move()

        # when the chain runs
        await scene.launch(planned)
        move = await scene.ended(planned)
        await traffic.goes_on()

    # then every status was reached once and in order
    assert move.status is MigrationStatus.COMPLETED, move.error
    assert await scene.history(move) == EVERY_STATUS
    times = [
        move.created_at, move.started_at, move.paused_at, move.captured_at, move.serialized_at, move.sent_at,
        move.acked_at, move.finished_at,
    ]  # fmt: skip
    known = [at for at in times if at is not None]
    assert len(known) == len(times)
    assert known == sorted(known)

    # and the record says what was moved, by which tasks, and what it cost
    assert move.task_ids == planned.task_ids
    for step, task_id in planned.task_ids.items():
        await scene.succeeded(task_id)
        assert f"workflows.migration.{step}[{task_id}]" in scene.worker.logs()
    assert (move.step, move.error, move.attempts) == (None, None, len(STEPS))
    assert move.blackout_ms is not None
    assert move.blackout_ms > 0
    rows = await scene.context.store.actors(move.id)
    assert {row.actor_id for row in rows} == {str(actor) for actor in traffic.aircraft}
    assert all(row.version and row.digest and row.state_bytes and row.error is None for row in rows)
    assert (move.actors_total, move.state_bytes) == (len(rows), sum(row.state_bytes or 0 for row in rows))

    # and the actors are at the destination, with every flight once
    await scene.assert_moved(move)
    await traffic.check_totals()
    shards = {node: (await scene.node(node))["shards"] for node in (SOURCE, DESTINATION)}
    assert shards == {SOURCE: 3, DESTINATION: 1}


async def test_a_chain_that_is_sent_twice_moves_once(scene: Scene) -> None:
    """Celery delivers tasks twice and late: steps that do not apply (any more) change nothing and say nothing."""
    async with scene.traffic() as traffic:
        # given a chain that is sent twice at once
        planned = await scene.plan_move()
        await scene.launch(planned)
        await scene.launch(planned)
        move = await scene.ended(planned)
        await scene.succeeded(planned.task_ids["delete"], times=2)

        # when it comes once more, long after it is done
        await scene.launch(planned)
        await scene.succeeded(planned.task_ids["delete"], times=3)
        await traffic.goes_on()

    # then there was one move
    assert move.status is MigrationStatus.COMPLETED, move.error
    assert await scene.record(move) == move
    assert await scene.history(move) == EVERY_STATUS
    await scene.assert_moved(move)
    await traffic.check_totals()


@pytest.mark.parametrize(
    ("source_failpoints", "answered_by"), [("", DESTINATION), ("commit=error*1", SOURCE)], ids=["moved", "rolled-back"]
)
async def test_what_waits_at_the_gate_is_answered_in_order_and_not_sent_again(scene: Scene, answered_by: str) -> None:
    """The source keeps what reaches a paused shard, and hands it to whoever serves the shard afterwards."""
    # given a paused shard, and flights that each were sent to it as one message
    actor = scene.traffic().aircraft[0]
    planned = await scene.plan_move()
    await migration.driver.take(migration.CHAIN[0], scene.context, planned.id, 0)
    paused = await scene.context.recall(planned.id)  # once its record is saved
    assert paused is not None
    asked = [asyncio.create_task(scene.ask_once(actor, number)) for number in range(5)]

    async def waiting() -> bool:
        return bool((await scene.context.ask(SOURCE, "pause", paused))["waiting"] == len(asked))

    await until(waiting, "the flights to wait at the gate")

    # when the move goes on to its end
    await scene.launch(paused)
    move = await scene.ended(paused)

    # then each was answered once, in the order of sending
    answers = await asyncio.gather(*asked)
    assert [(answer.error, answer.value) for answer in answers] == [(None, count) for count in range(1, 6)]
    assert {answer.owner for answer in answers} == {answered_by}
    assert move.messages_buffered == (len(asked) if answered_by == DESTINATION else 0)
