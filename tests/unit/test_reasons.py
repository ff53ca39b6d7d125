"""A record says why its move did not go through: what was refused last, not merely that nobody went on."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from routing.errors import InvalidInput, Unavailable
from tests.simulation.broker import Broker
from tests.unit.cluster import Ledger, SmallCluster, cluster
from tests.unit.office import Office, worker
from tests.unit.shelf import Shelf, planned, planned_move
from tests.unit.virtual_time import until, virtually
from workflows.driver import ERROR_CHARACTERS
from workflows.migration import CHAIN, driver
from workflows.records import TERMINAL, MigrationStatus, Move

PAUSE, *_, AWAIT_ACK, DELETE = CHAIN


async def moved_while_a_handler_runs(small: SmallCluster, shelf: Shelf) -> Move:
    """How a move ends whose pause waits for a handler that does not return, with a worker and a reconciler at work."""
    await small.send("k", "write", entry=0)
    Ledger.open_gate = asyncio.Event()
    await small.post("a", small.command("k", "write_slowly", "slow", entry=1, lives_s=300))
    await until(lambda: Ledger.entered)
    office, broker = Office(small, shelf), Broker(Random(1), visibility_timeout_s=small.settings.visibility_timeout_s)
    office.admission._launch = broker.launch
    office.admission.add([await shelf.save(planned(1))])
    threads = [asyncio.create_task(broker.work(worker(small, shelf))) for _ in range(3)]
    threads.append(asyncio.create_task(office.run(120.0)))
    await until(lambda: shelf.stored["m1"].status in TERMINAL, within_s=100.0)
    for thread in threads:
        thread.cancel()
    return shelf.stored["m1"]


@virtually
async def test_a_move_that_a_handler_kept_from_pausing_names_its_actor() -> None:
    """The source gives the pause up by itself; why nobody came further is what the operator has to know."""
    async with cluster("a", "b", precopy_from_bytes=10**9) as small:
        ended = await moved_while_a_handler_runs(small, Shelf())

        assert ended.status is MigrationStatus.ROLLED_BACK
        assert ended.error == "pause: a handler of ledger/k still runs after 4 s"


@virtually
async def test_what_was_refused_is_on_record_while_the_step_is_tried_again_and_gone_when_it_passes() -> None:
    """Who looks at a move that stands still sees why; a move that went through has no error."""
    async with cluster("a", "b", precopy_from_bytes=10**9) as small:
        shelf = Shelf()
        move = await planned_move(small, shelf)
        context, verbs = worker(small, shelf), small.nodes["a"].node._verbs
        pause = verbs["pause"]

        async def refuse(_: object) -> dict[str, object]:
            raise Unavailable("not now " + "!" * 10_000)

        verbs["pause"] = (pause[0], refuse)
        with pytest.raises(Unavailable):
            await driver.take(PAUSE, context, move.id, 0)
        waiting = shelf.stored[move.id]
        assert waiting.status is MigrationStatus.PLANNED
        assert str(waiting.error).startswith("pause: not now")
        assert len(str(waiting.error)) <= ERROR_CHARACTERS

        verbs["pause"] = pause
        await driver.take(PAUSE, context, move.id, 1)
        await driver.take(AWAIT_ACK, context, move.id, 0)
        await driver.take(DELETE, context, move.id, 0)
        assert shelf.stored[move.id].status is MigrationStatus.COMPLETED
        assert shelf.stored[move.id].error is None


@virtually
async def test_a_move_that_committed_after_all_has_no_error() -> None:
    """The answer to `commit` was lost, and somebody else reads in the map how it ended."""
    async with cluster("a", "b") as small:
        shelf = Shelf()
        move = await planned_move(small, shelf)
        await small.move(move.id, "b")
        shelf.stored[move.id] = replace(shelf.stored[move.id], error="delete: no answer", revision=2)

        ended = await worker(small, shelf).settle(move.id, error="delete: no worker took this step in time")

        assert ended is not None
        assert (ended.status, ended.error) == (MigrationStatus.COMPLETED, None)


@virtually
async def test_that_the_map_has_moved_on_does_not_hide_what_was_refused_before() -> None:
    """It is what follows when a source gives up; the refusal is why it did."""
    async with cluster("a", "b") as small:
        shelf = Shelf()
        move = await planned_move(small, shelf)
        shelf.stored[move.id] = replace(shelf.stored[move.id], error="pause: still runs", revision=2)
        await small.lock(move.id, "b")
        await small.abort(move.id)

        with pytest.raises(Exception, match="changed hands"):
            await driver.take(PAUSE, worker(small, shelf), move.id, 2)

        assert shelf.stored[move.id].error == "pause: still runs"


@virtually
async def test_no_try_fails_because_its_refusal_cannot_be_written_down() -> None:
    """Redis is away: what the node said is what the task fails with."""
    async with cluster("a", "b") as small:
        shelf = Shelf()
        move = await planned_move(small, shelf)

        async def away(_: Move) -> None:
            raise Unavailable("Redis does not serve")

        async def refuse(_: object) -> dict[str, object]:
            raise Unavailable("not now")

        small.nodes["a"].node._verbs["pause"] = (small.nodes["a"].node._verbs["pause"][0], refuse)
        shelf.before = away
        with pytest.raises(Unavailable, match="not now"):
            await driver.take(PAUSE, worker(small, shelf), move.id, 0)


@virtually
async def test_a_pause_that_waits_for_handlers_names_a_few_actors_and_counts_the_rest() -> None:
    """A shard may hold thousands."""
    async with cluster("a", "b", precopy_from_bytes=10**9) as small:
        Ledger.open_gate = asyncio.Event()
        for number in range(7):
            await small.post("a", small.command(f"k{number}", "write_slowly", f"s{number}", entry=1, lives_s=60))
        await until(lambda: Ledger.entered == 7)

        with pytest.raises(Exception, match=r"^handlers of ledger/k0, ledger/k1, ledger/k2 and 4 more still run after"):
            await small.step("pause", await small.lock("m1", "b"))


ROW = {"index": 0, "actor_id": "ledger/k", "version": 1, "digest": "d"}


@pytest.mark.parametrize(
    ("page", "told"),
    [
        ({"rows": [ROW | {"version": None}]}, "rows that lack a version or a digest"),
        ({"rows": [ROW | {"index": "0"}]}, "rows[0].index: Expected `int`, got `str`"),
        ({"rows": [ROW], "next": 7}, "rows that go on at 7"),
        ({}, "missing required field `rows`"),
    ],
)
@virtually
async def test_rows_that_no_node_answers_end_the_move_and_are_told(page: dict[str, Any], told: str) -> None:
    """What is written down of an actor is what its node has said: nothing is made up for what lacks."""
    async with cluster("a", "b", precopy_from_bytes=10**9) as small:
        await small.send("k", "write", entry="one")
        shelf = Shelf()
        move = await planned_move(small, shelf)
        context, verbs = worker(small, shelf), small.nodes["a"].node._verbs

        async def answer(_: object) -> dict[str, Any]:
            return page

        verbs["capture"] = (verbs["capture"][0], answer)
        locked = await context.lock(move)
        with pytest.raises(InvalidInput) as refusal:
            await context.ask_rows("a", "capture", replace(move, epoch=locked.ownership.epoch))

        assert told in str(refusal.value)
