"""Moves that share a chain: one whose step is refused for now goes on in a chain of its own."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.celery.scene import Scene
from workflows import migration
from workflows.records import STATUS_AFTER, STEPS, MigrationStatus

SHARDS = (1, 2)


@pytest.mark.parametrize(
    ("step", "source_failpoints"), [("pause", "pause=unavailable*1"), ("delete", "commit=unavailable*1")]
)
async def test_a_move_that_is_refused_once_leaves_its_convoy_and_completes(scene: Scene, step: str) -> None:
    """Its record names the tasks that took its steps: the convoy's before the refusal, its own chain's from there."""
    # given two shards in use that share a chain, and a source that refuses a step of one of them
    async with scene.traffic(SHARDS[0]) as one, scene.traffic(SHARDS[1]) as other:
        planned = [await scene.plan_move(shard) for shard in SHARDS]
        task_ids = planned[0].task_ids
        convoy = [await scene.context.store.save(replace(move, task_ids=task_ids)) for move in planned]

        # when they are moved
        await asyncio.to_thread(migration.launch, *convoy)
        ended = [await scene.ended(move) for move in convoy]
        await one.goes_on()
        await other.goes_on()

    # then both have moved
    for move in ended:
        assert move.status is MigrationStatus.COMPLETED, move.error
        assert await scene.history(move) == list(STATUS_AFTER.values())
        await scene.assert_moved(move)

    # and one of them has had a chain of its own from the step that was refused
    [left] = [move for move in ended if move.task_ids != task_ids]
    assert left.attempts == len(STEPS) + 1
    own = [name for name in STEPS if left.task_ids[name] != task_ids[name]]
    assert own == list(STEPS[STEPS.index(step) :])
    for name in own:  # and the convoy's tasks have let it alone from there
        await scene.succeeded(left.task_ids[name])
    await one.check_totals()
    await other.check_totals()
