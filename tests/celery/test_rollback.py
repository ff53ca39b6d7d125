"""A step that cannot be taken ends the move at the source, whichever step it is, and nobody notices but the record."""

from __future__ import annotations

import asyncio

import pytest

from tests.celery.scene import Scene
from workflows import migration
from workflows.records import STATUS_AFTER, STEPS, MigrationStatus

# The first time it is asked, a node refuses for good: step, at the source, at the destination.
REFUSALS = {
    "pause": ("pause", "pause=error*1", ""),
    "capture": ("capture", "capture=error*1", ""),
    "serialize": ("serialize", "serialize=error*1", ""),
    "send": ("send", "send=error*1", ""),
    "send-stage": ("send", "", "stage_ahead=error*1,stage=error*1"),
    "await_ack": ("await_ack", "await_ack=error*1", ""),
    "await_ack-verify": ("await_ack", "", "stage_ahead=error*1,verify=error*2"),
    "delete": ("delete", "commit=error*1", ""),
}


@pytest.mark.parametrize(
    ("step", "source_failpoints", "destination_failpoints"), REFUSALS.values(), ids=REFUSALS.keys()
)
async def test_a_step_that_is_refused_for_good_rolls_back_and_the_shard_can_move_later(scene: Scene, step: str) -> None:
    """The map says aborted, the record says at which step and why, the source serves on, and nothing is left over."""
    async with scene.traffic() as traffic:
        # given a move that a node refuses at one step
        planned = await scene.plan_move()
        await scene.launch(planned)

        # when it has ended
        refused = await scene.ended(planned)
        await traffic.goes_on()

        # then it is rolled back: in the record, in the map, and at both nodes
        assert refused.status is MigrationStatus.ROLLED_BACK
        assert refused.error is not None
        assert refused.error.startswith(f"{step}: ")
        assert "refused on purpose" in refused.error
        taken = [STATUS_AFTER[earlier] for earlier in STEPS[: STEPS.index(step)]]
        assert await scene.history(refused) == [*taken, MigrationStatus.ROLLED_BACK]
        await scene.assert_kept(refused)

        # and it leaves nothing that a second try would stumble over
        again = await scene.plan_move()
        await scene.launch(again)
        moved = await scene.ended(again)
        await traffic.goes_on()

    assert moved.status is MigrationStatus.COMPLETED, moved.error
    await scene.assert_moved(moved)
    await traffic.check_totals()


@pytest.mark.parametrize("source_failpoints", ["await_ack=error*1"])
async def test_a_chain_that_comes_again_after_its_rollback_changes_nothing(scene: Scene) -> None:
    """A step that Celery delivers late finds that its move has ended, and leaves everything as it is."""
    async with scene.traffic() as traffic:
        # given a move that was rolled back
        planned = await scene.plan_move()
        await scene.launch(planned)
        refused = await scene.ended(planned)
        owner = await scene.owner()

        # when its whole chain comes once more
        await scene.launch(planned)
        await scene.succeeded(planned.task_ids["delete"])
        await traffic.goes_on()

    # then nothing has changed
    assert refused.status is MigrationStatus.ROLLED_BACK
    assert await scene.record(planned) == refused
    assert (await scene.history(planned)).count(MigrationStatus.ROLLED_BACK) == 1
    assert await scene.owner() == owner
    await scene.assert_kept(planned)
    await traffic.check_totals()


async def test_a_rollback_that_comes_after_the_commit_rolls_forward(scene: Scene) -> None:
    """Errback and last step can both run: COMMIT and ABORT start from one revision, so the map has one answer."""
    async with scene.traffic() as traffic:
        # given a shard that the map has given away, which the record does not say yet
        planned = await scene.plan_move()
        await scene.commit_unrecorded(planned)

        # when a worker rolls the move back
        await asyncio.to_thread(migration.rollback.delay, planned.id)
        move = await scene.ended(planned)
        await traffic.goes_on()

    # then the record says what the map says
    assert move.status is MigrationStatus.COMPLETED
    await scene.assert_moved(move)
    await traffic.check_totals()
