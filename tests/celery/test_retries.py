"""What passes is tried again by Celery; what does not pass in time ends in a rollback."""

from __future__ import annotations

import pytest

from tests.celery.scene import Scene
from workflows.records import STATUS_AFTER, STEPS, MigrationStatus

# What a node refuses, the first times it is asked, in every step: step, at the source, at the destination.
FAILS_TWICE = [
    ("pause", "pause=unavailable*2", ""),
    ("capture", "capture=unavailable*2", ""),
    ("serialize", "serialize=unavailable*2", ""),
    ("send", "send=unavailable*1", "stage_ahead=error*1,stage=unavailable*1"),
    # the source itself asks the destination again
    ("await_ack", "await_ack=unavailable*2", "stage_ahead=error*1,verify=unavailable*1"),
    ("delete", "commit=unavailable*2", ""),
]


@pytest.mark.parametrize(
    ("step", "source_failpoints", "destination_failpoints"), FAILS_TWICE, ids=[step for step, *_ in FAILS_TWICE]
)
async def test_a_step_that_a_node_refuses_twice_is_tried_again_until_it_passes(scene: Scene, step: str) -> None:
    """A transient refusal costs tries, not the move; what was sent to the actors meanwhile waits at the gate."""
    # given actors in use, and a node that refuses the step for now
    async with scene.traffic() as traffic:
        planned = await scene.plan_move()

        # when the move runs
        await scene.launch(planned)
        move = await scene.ended(planned)
        await traffic.goes_on()

    # then it took the tries that were refused, and is complete all the same
    assert move.status is MigrationStatus.COMPLETED, move.error
    assert move.attempts >= len(STEPS) + 2
    assert await scene.history(move) == list(STATUS_AFTER.values())
    await scene.assert_moved(move)

    # and what came while the shard was paused was answered afterwards, once
    assert step == "pause" or move.messages_buffered
    await traffic.check_totals()


@pytest.mark.parametrize("source_failpoints", ["send=unavailable"])
async def test_a_step_that_is_refused_every_time_rolls_the_move_back(scene: Scene) -> None:
    """Retries have a bound: the source opens its gate again, with everything that has waited there."""
    # given a source that cannot send
    async with scene.traffic() as traffic:
        planned = await scene.plan_move()

        # when the move runs until its retries are used up
        await scene.launch(planned)
        move = await scene.ended(planned)
        await traffic.goes_on()

    # then it says at which step it ended, and why
    assert move.status is MigrationStatus.ROLLED_BACK
    assert await scene.history(move) == ["paused", "captured", "serialized", "rolled_back"]
    assert move.error is not None
    assert move.error.startswith("send: ")
    assert "not now, on purpose" in move.error

    # and the source serves what it has kept
    await scene.assert_kept(move)
    await traffic.check_totals()
