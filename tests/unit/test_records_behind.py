"""Steps whose records are saved while the chain goes on: whoever takes the next one finds what was not saved."""

from __future__ import annotations

import asyncio

import pytest

from routing.errors import Unavailable
from tests.unit.cluster import UNIT, cluster
from tests.unit.office import worker
from tests.unit.shelf import Shelf, planned_move
from tests.unit.virtual_time import until, virtually
from workflows.migration import CHAIN, driver
from workflows.records import MigrationStatus, Move


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
async def test_a_try_that_is_given_up_while_a_record_is_saved_does_not_hide_that_save() -> None:
    """A convoy gives slow tries up; who then reads the record sees what was passed, and does not take it again."""
    async with cluster("a", "b") as small:
        shelf = Shelf()
        move = await planned_move(small, shelf)
        context = worker(small, shelf)

        async def slowly(_: Move) -> None:
            await asyncio.sleep(1.0)

        shelf.before = slowly
        context.passed(move, MigrationStatus.PAUSED)
        given_up = asyncio.create_task(context.recall(move.id))
        await asyncio.sleep(0.1)
        given_up.cancel()
        await asyncio.wait([given_up])

        stored = await context.recall(move.id, fresh=True)

        assert stored is not None
        assert stored.status is MigrationStatus.PAUSED


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
