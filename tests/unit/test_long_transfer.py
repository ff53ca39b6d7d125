"""Transfers longer than a request, a lease, or the memory set aside for them."""

from __future__ import annotations

import asyncio
import random
import string

import pytest

from routing.errors import Busy, NotApplicable, PayloadTooLarge, Timeout, TransientError
from runtime.handover import FEW
from tests.unit.cluster import SmallCluster, cluster
from tests.unit.office import Office
from tests.unit.shelf import Shelf, planned
from tests.unit.virtual_time import clock, until, virtually
from workflows import migration
from workflows.records import MigrationStatus

LARGE = "".join(random.Random(2).choices(string.ascii_letters + string.digits, k=20_000))  # 15 kB when compressed
ALONE = {"chunk_bytes": 500, "transfer_window_bytes": 500, "precopy_from_bytes": 10**9}  # nothing is copied ahead


def slow_chunks(small: SmallCluster, each_s: float) -> None:
    """Every chunk takes `each_s` to be acknowledged."""
    link = small.nodes["a"].transfer_link
    request = link.request

    async def late(subject: str, payload: bytes, *, timeout_s: float) -> bytes:
        await asyncio.sleep(each_s)
        return await request(subject, payload, timeout_s=timeout_s)

    link.request = late  # type: ignore[method-assign]


@virtually
async def test_a_transfer_may_take_longer_than_every_lease() -> None:
    """Over a minute, while pause and lock leases are 10 and 30 s: as long as chunks arrive, the pause goes on."""
    async with cluster("a", "b", **ALONE) as small:
        await small.send("k", "write", entry=LARGE)
        request = await small.lock("m", "b")
        await small.steps(request, until_verb="serialize")
        slow_chunks(small, 2.0)
        began_s = clock()

        answer = await small.ask("send", request)
        await small.steps(request)

        assert answer["pending"]
        assert clock() - began_s > 2 * small.settings.lock_lease_s
        assert await small.send("k", "read") == [LARGE]


@virtually
async def test_the_pause_goes_on_while_chunks_arrive_though_nobody_asks() -> None:
    """The worker died; whoever takes its step over finds the transfer going on, not the move aborted."""
    async with cluster("a", "b", **ALONE) as small:
        await small.send("k", "write", entry=LARGE)
        request = await small.lock("m", "b")
        await small.steps(request, until_verb="serialize")
        slow_chunks(small, 2.0)
        await small.ask("send", request)

        await asyncio.sleep(3 * small.settings.pause_lease_s)

        await small.steps(request)
        assert await small.send("k", "read") == [LARGE]


@virtually
async def test_the_pause_ends_when_chunks_stop_arriving_and_nobody_asks() -> None:
    """Promise 5: no actor stays paused."""
    async with cluster("a", "b", **ALONE) as small:
        await small.send("k", "write", entry=LARGE)
        request = await small.lock("m", "b")
        await small.steps(request, until_verb="serialize")
        slow_chunks(small, 2.0)
        await small.ask("send", request)
        small.nodes["b"].cut()

        await asyncio.sleep(small.settings.pause_lease_s + 20)

        assert (await small.map()).move is None
        assert await small.send("k", "write", entry="on") == 2
        assert small.nodes["a"].node._handover._outgoing == {}


@virtually
async def test_a_transfer_that_fails_says_so_when_asked_again_and_then_begins_anew() -> None:
    """What has arrived is not sent twice by that: the destination says what it lacks."""
    async with cluster("a", "b", **ALONE) as small:
        await small.send("k", "write", entry=LARGE)
        request = await small.lock("m", "b")
        await small.steps(request, until_verb="serialize")
        small.nodes["b"].cut()

        with pytest.raises(TransientError):
            await small.step("send", request)

        small.nodes["b"].heal()
        await small.steps(request)
        assert await small.send("k", "read") == [LARGE]


@virtually
async def test_an_abort_ends_a_transfer() -> None:
    """The gate opens at once, and nothing more is sent."""
    async with cluster("a", "b", **ALONE) as small:
        await small.send("k", "write", entry=LARGE)
        request = await small.lock("m", "b")
        await small.steps(request, until_verb="serialize")
        slow_chunks(small, 1.0)
        await small.ask("send", request)

        await small.abort("m")
        assert await small.send("k", "write", entry="on", timeout_s=1.0) == 2
        await asyncio.sleep(2)
        sent = len(small.messages_to("xfer"))
        await asyncio.sleep(10)

        assert len(small.messages_to("xfer")) == sent
        with pytest.raises(NotApplicable):
            await small.ask("send", request)


@virtually
async def test_a_worker_and_a_reconciler_let_a_long_move_take_its_time() -> None:
    """The worker asks on, and its record says that the step is at work: it is neither sent again nor ended."""
    settings = {**ALONE, "precopy_from_bytes": 10_000, "precopy_bytes_per_s": 1_000}
    async with cluster("a", "b", **settings) as small:
        await small.send("k", "write", entry=LARGE)
        await small.send("late", "write", entry=LARGE)
        for number in range(FEW):  # more than are prepared together with the pause
            await small.send(f"k{number}", "write", entry="small")
        shelf = Shelf()
        office = Office(small, shelf)
        office.admission.add([await shelf.save(planned(1))])
        reconciling = asyncio.create_task(office.run(300))
        await until(lambda: office.launched)
        began_s = clock()

        move = shelf.stored["m1"]
        for step in migration.CHAIN:
            if step.name == "send":
                slow_chunks(small, 2.0)
                small.nodes["b"].node._arrivals._moves.clear()  # so that everything has to be sent again
            await migration.driver.take(step, office.context, move.id, 0)
        reconciling.cancel()

        assert clock() - began_s > 90
        assert office.launched == ["m1"]
        assert shelf.stored["m1"].status is MigrationStatus.COMPLETED
        assert await small.send("k", "read") == [LARGE]


@virtually
async def test_a_move_over_the_memory_of_its_source_is_refused_by_name() -> None:
    """The setting is named; the shard serves on after the abort."""
    async with cluster("a", "b", transfer_held_bytes=15_000) as small:
        await small.send("k", "write", entry=LARGE)
        request = await small.lock("m", "b")
        await small.step("pause", request)

        with pytest.raises(PayloadTooLarge, match="FERRY_TRANSFER_HELD_BYTES"):
            await small.step("capture", request)

        await small.abort("m")
        assert await small.send("k", "write", entry="on") == 2


@virtually
async def test_a_move_over_the_memory_of_its_destination_is_refused_by_name() -> None:
    """Before anything is sent."""
    async with cluster("a", **ALONE) as small:
        await small.add("b", transfer_held_bytes=10_000)
        await small.send("k", "write", entry=LARGE)
        request = await small.lock("m", "b")

        with pytest.raises(PayloadTooLarge, match="FERRY_TRANSFER_HELD_BYTES"):
            await small.steps(request)

        assert small.messages_to("xfer") == []


@virtually
async def test_two_moves_that_exceed_the_memory_together_go_one_after_the_other() -> None:
    """The second is told to try again, and can when the first is over."""
    async with cluster("a", shards=2, **ALONE) as small:
        await small.add("b", transfer_held_bytes=20_000)
        keys = small.keys_of_shards()
        for key in keys:
            await small.send(key, "write", entry=LARGE)
        first, second = [await small.lock(f"m{n}", "b", f"shard.{n}") for n in range(2)]
        await small.steps(first, until_verb="await_ack")
        await small.steps(second, until_verb="serialize")

        with pytest.raises(Busy):
            await small.step("send", second)

        await small.step("commit", first)
        await small.steps(second)
        assert [await small.send(key, "read") for key in keys] == [[LARGE], [LARGE]]


@virtually
async def test_a_lost_chunk_is_sent_again_by_itself() -> None:
    """One lost message does not fail a transfer of thousands."""
    async with cluster("a", "b", **ALONE) as small:
        await small.send("k", "write", entry=LARGE)
        request = await small.lock("m", "b")
        await small.steps(request, until_verb="serialize")
        small.disturb("drop_request", "request", "xfer", times=2)
        try:
            await small.step("send", request)
        except Timeout:
            pytest.fail("a lost chunk failed the whole transfer")

        assert small.disturbed()
