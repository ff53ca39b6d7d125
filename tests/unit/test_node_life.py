"""A node's lease, its restarts, and how it leaves."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest import mock

import orjson
import pytest

from routing.address import ActorId
from routing.errors import FerryError, InDoubt, InvalidInput, NotApplicable, TransientError, Unavailable
from routing.lease import Lease
from routing.shard_map import Outcome
from routing.subjects import LEADER_KEY
from runtime.testing.memory_link import MemoryLink
from tests.unit.cluster import STEPS, Ledger, answered, cluster
from tests.unit.virtual_time import clock, until, virtually


@virtually
async def test_two_nodes_of_one_name_do_not_live_at_once() -> None:
    """The second is told so at its start."""
    async with cluster("a") as small:
        with pytest.raises(InvalidInput):
            await small.add("a")

        assert await small.send("k", "write", entry=1) == 1


@virtually
async def test_a_stopped_node_gives_its_lease_back_at_once() -> None:
    """Nobody waits for its expiry: the same name may start again immediately."""
    async with cluster("a", "b") as small:
        running = small.nodes["b"]
        running.task.cancel()
        await asyncio.gather(running.task, return_exceptions=True)
        await running.node.stop()
        await running.node.stop()

        await small.add("b")


@virtually
async def test_stopping_lets_a_running_handler_finish() -> None:
    """Its caller gets the reply."""
    async with cluster("a") as small:
        Ledger.open_gate = asyncio.Event()
        future = await small.post("a", small.command("k", "write_slowly", "m-1", entry=1))
        await until(lambda: Ledger.entered == 1)

        stopping = asyncio.create_task(small.nodes["a"].node.stop())
        await asyncio.sleep(0.5)
        Ledger.open_gate.set()
        await stopping

        assert (await answered(future)).value == 1


@virtually
async def test_a_query_that_answers_with_an_awaitable_is_asked_with_its_own_arguments_each_time() -> None:
    """It cannot be answered at once: asked again in its mailbox, it must not find what it has changed before."""
    async with cluster("a") as small:
        await small.send("k", "write", entry=1)
        router, actor = small.nodes["a"].node.router, ActorId("ledger", "k")

        for _ in range(2):
            assert await small.send("k", "pop_later", items=[1, 2, 3]) == [1, 2]
            assert await router.send_message(actor, "pop_later", {"items": [1, 2, 3]}, timeout_s=1.0) == [1, 2]


@virtually
async def test_an_answer_that_finds_the_link_full_waits_for_it() -> None:
    """An answer dropped is a caller left in doubt: it is sent as soon as the server takes it."""
    async with cluster("a") as small:
        await small.send("k", "write", entry=1)
        host = small.nodes["a"].node.host

        with mock.patch.object(MemoryLink, "answer", side_effect=Unavailable("too much waits to be sent")):
            read = await small.send("k", "read", timeout_s=1.0)

        assert read == [1]
        assert host.counters["unsent"] == 0


@virtually
async def test_local_reads_stop_when_the_lease_is_within_its_margin() -> None:
    """Cut off, it cannot know whether another owns its actors by now."""
    async with cluster("a") as small:
        await small.send("k", "write", entry=1)
        node = small.nodes["a"].node
        assert await node.router.send_message(ActorId("ledger", "k"), "read", timeout_s=1.0) == [1]
        small.nodes["a"].cut()
        await asyncio.sleep(small.settings.node_lease_s)

        with pytest.raises((TransientError, InDoubt)):
            await node.router.send_message(ActorId("ledger", "k"), "read", timeout_s=2.0)


@virtually
async def test_one_lost_renewal_interrupts_no_reads() -> None:
    """Renewing five times a lease is for exactly this."""
    async with cluster("a") as small:
        await small.send("k", "write", entry=1)
        await asyncio.sleep(3)
        small.disturb("drop_request", "append", "leases.node.a")
        began_s, failed = clock(), []

        while clock() - began_s < 8:
            await asyncio.sleep(0.2)
            try:
                await small.send("k", "read", timeout_s=0.1)
            except FerryError as error:
                failed.append((round(clock() - began_s, 1), type(error).__name__))

        assert small.disturbed()
        assert failed == []


@pytest.mark.parametrize("outage_s", [0.5, 2.0, 4.0, 20.0])
def test_a_node_comes_back_after_an_outage_of_its_link(outage_s: float) -> None:
    """Nobody took its units: it re-acquires its lease, reads the map again, and serves on."""

    @virtually
    async def check() -> None:
        async with cluster("a") as small:
            await small.send("k", "write", "m-1", entry=1)
            small.nodes["a"].cut()
            await asyncio.sleep(outage_s)
            small.nodes["a"].heal()

            assert await small.send("k", "write", "m-2", entry=2, timeout_s=30.0) == 2
            assert await small.send("k", "write", "m-1", entry=1) == 1
            assert not small.nodes["a"].task.done()

    check()


@virtually
async def test_a_restarted_owner_takes_its_units_back_and_aborts_the_lock() -> None:
    """BOOT: what was paused went with the old process; commands go on, and the move does not."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", "m-1", entry=1)
        request = await small.lock("m", "b")
        await small.steps(request, until_verb="await_ack")

        await small.restart("a")
        await small.served_by("a")

        view = await small.map()
        assert (view.owner, view.epoch, view.outcome_of("m")) == ("a", request.epoch + 1, Outcome.ABORTED)
        with pytest.raises(NotApplicable):
            await small.step("commit", request)
        assert await small.send("k", "write", "m-1", entry=1) == 1
        assert await small.send("k", "write", entry=2) == 2
        assert "claim" in small.kinds("k")


@virtually
async def test_a_move_whose_worker_died_is_aborted_by_its_source() -> None:
    """Paused, and then nothing: the pause lease runs out, and the gate opens through the map."""
    async with cluster("a", "b") as small:
        request = await small.lock("m", "b")
        await small.steps(request, until_verb="serialize")
        future = await small.post("a", small.command("k", "write", "m-1", lives_s=60.0, entry=1))
        began_s = clock()

        assert (await answered(future, 60.0)).value == 1

        assert clock() - began_s < small.settings.pause_lease_s + 2
        assert (await small.map()).outcome_of("m") is Outcome.ABORTED


@virtually
async def test_a_move_that_goes_on_is_not_aborted_by_its_source() -> None:
    """Each step is a sign of life: a slow chain of steps, each within the lease, completes."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry=1)
        request = await small.lock("m", "b")
        for verb in STEPS:
            await small.step(verb, request)
            await asyncio.sleep(small.settings.pause_lease_s * 0.6)

        assert (await small.map()).outcome_of("m") is Outcome.COMMITTED


@virtually
async def test_a_lock_that_nobody_follows_is_aborted_by_its_source() -> None:
    """The worker died between LOCK and `pause` [S1]; commands were served all along."""
    async with cluster("a", "b") as small:
        await small.lock("m", "b")
        began_s = clock()

        while (await small.map()).outcome_of("m") is None:
            assert await small.send("k", "write", entry=1, timeout_s=2.0)
            await asyncio.sleep(0.5)
            assert clock() - began_s < small.settings.lock_lease_s + 2

        assert (await small.map()).outcome_of("m") is Outcome.ABORTED
        await small.move("n", "b")


@virtually
async def test_a_draining_node_says_so_waits_to_be_emptied_and_leaves() -> None:
    """SIGTERM: announce, let the coordinator move everything away, then give the lease back and end."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry=1)
        leader = Lease(small.link, small.subjects.lease_bucket, LEADER_KEY, incarnation="c-1", ttl_s=120.0, clock=clock)
        await leader.hold({"name": "c"})
        await asyncio.sleep(0.1)

        def leases(name: str) -> list[Any]:
            return [orjson.loads(e.payload) for e in small.leases() if e.subject.endswith(f"node.{name}") and e.payload]

        small.nodes["a"].stopping.set()
        await until(lambda: leases("a") and leases("a")[0]["state"] == "draining", within_s=5)
        assert (leases("a")[0]["types"], leases("a")[0]["schemas"]) == (["ledger"], {"ledger": 1})
        assert await small.send("k", "write", entry=2) == 2

        await small.move("m", "b")
        async with asyncio.timeout(30):
            await small.nodes["a"].task

        assert leases("a") == []
        assert await small.send("k", "read") == [1, 2]


@virtually
async def test_a_draining_node_that_nobody_empties_leaves_at_its_deadline() -> None:
    """Everything is in the log and in the map: staying for ever would serve nobody who sent the signal."""
    async with cluster("a", "b", drain_timeout_s=20.0) as small:
        await small.send("k", "write", entry=1)
        leader = Lease(small.link, small.subjects.lease_bucket, LEADER_KEY, incarnation="c-1", ttl_s=120.0, clock=clock)
        await leader.hold({"name": "c"})
        began_s = clock()
        await asyncio.sleep(0.1)

        small.nodes["a"].stopping.set()
        async with asyncio.timeout(60):
            await small.nodes["a"].task
        assert clock() - began_s > 15

        await small.fail_over("b")
        await small.served_by("b")
        assert await small.send("k", "read") == [1]
