"""Commands at a node: applied once wherever their actor is, forwarded, bounded."""

from __future__ import annotations

import asyncio
import random

import pytest

from routing.envelope import MAX_HOPS
from routing.errors import Busy, FerryError, TransientError
from runtime.testing import Fault
from tests.unit.cluster import STEPS, UNIT, Ledger, answered, cluster
from tests.unit.virtual_time import until, virtually

FAULTS: list[Fault] = ["drop_request", "drop_reply", "late"]


# ------------------------------------------------------------------------------------------------ applied once


@pytest.mark.parametrize("meanwhile", ["nothing", "move", "snapshot", "restart", "fail-over", "passivation", "all"])
def test_a_message_id_sent_again_is_applied_once_and_answered_the_same(meanwhile: str) -> None:
    """Whatever happened to the actor between the two."""

    @virtually
    async def check() -> None:
        async with cluster("a", "b", snapshot_every=4, passivate_after_s=2.0) as small:
            assert await small.send("k", "write", "m-1", entry="one") == 1

            if meanwhile in {"snapshot", "all"}:
                for number in range(6):
                    await small.send("k", "write", entry=number)
                assert "snapshot" in small.kinds("k")
            if meanwhile in {"move", "all"}:
                await small.move("m", "b")
            if meanwhile in {"passivation", "all"}:
                await asyncio.sleep(5)
                owner = (await small.map()).owner
                await until(lambda: not small.nodes[owner].node.host.inventory().units.get(UNIT))
            if meanwhile in {"restart", "all"}:
                owner = (await small.map()).owner
                await small.restart(owner, snapshot_every=4)
                await small.served_by(owner)
            if meanwhile in {"fail-over", "all"}:
                other = "a" if (await small.map()).owner == "b" else "b"
                await small.fail_over(other)
                await small.served_by(other)

            before = await small.send("k", "read")
            assert await small.send("k", "write", "m-1", entry="one") == 1
            assert await small.send("k", "read") == before
            assert before.count("one") == 1

    check()


@virtually
async def test_a_message_id_sent_twice_at_once_is_applied_once() -> None:
    """An impatient sender: both in the inbox before either has run."""
    async with cluster("a") as small:
        futures = [await small.post("a", small.command("k", "write_slowly", "m-1", entry=1)) for _ in range(5)]

        values = [(await answered(future)).value for future in futures]

        assert values == [1] * 5
        assert await small.send("k", "read") == [1]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("others", [0, 3])
def test_an_append_of_unknown_fate_is_applied_once(fault: Fault, others: int) -> None:
    """Lost, acknowledged to nobody, or landing after its sender gave up; the commands behind it are applied after."""

    @virtually
    async def check() -> None:
        async with cluster("a") as small:
            await small.send("k", "write", entry="first")
            small.disturb(fault, "append", ".ev.")

            sending = [asyncio.create_task(small.send("k", "write", "m-1", entry="x"))]
            for number in range(others):
                await asyncio.sleep(0.1)
                sending.append(asyncio.create_task(small.send("k", "write", f"o-{number}", entry=number)))
            replies = await asyncio.gather(*sending)
            await asyncio.sleep(10)  # what was late has landed, or been refused

            assert small.disturbed()
            assert await small.send("k", "write", "m-1", entry="x") == replies[0]
            entries = await small.send("k", "read")
            assert sorted(map(str, entries)) == sorted(["first", "x", *map(str, range(others))])
            assert [entries[reply - 1] for reply in replies] == ["x", *range(others)]

    check()


@virtually
async def test_many_appends_of_unknown_fate_lose_and_double_nothing() -> None:
    """A server that stumbles all the time; every command arrives once, per sender in order."""
    async with cluster("a", snapshot_every=5) as small:
        draw = random.Random(11)
        for _ in range(25):
            small.faults.append(
                (lambda k, s: k == "append" and ".ev." in s and draw.random() < 0.3, draw.choice(FAULTS), [1])
            )

        async def sender(name: int) -> None:
            for number in range(8):
                await small.send("k", "write", f"{name}-{number}", entry=[name, number], timeout_s=500.0)

        await asyncio.gather(*(sender(name) for name in range(4)))
        await asyncio.sleep(10)

        entries = await small.send("k", "read", timeout_s=60)
        assert len(entries) == 32
        for name in range(4):
            assert [number for who, number in entries if who == name] == list(range(8))


@virtually
async def test_a_query_sees_the_command_that_was_acknowledged_before_it() -> None:
    """A caller that awaits its reply reads its own write."""
    async with cluster("a") as small:
        for number in range(5):
            await small.send("k", "write", entry=number)
            assert len(await small.send("k", "read")) == number + 1


@virtually
async def test_a_command_without_events_is_answered_the_same_again() -> None:
    """It is in the log for its reply's sake."""
    async with cluster("a") as small:
        assert await small.send("k", "touch", "m-1") == "nothing changed"
        assert await small.send("k", "touch", "m-1") == "nothing changed"
        assert len(small.log("k")) == 1


@virtually
async def test_an_expired_command_is_not_applied() -> None:
    """Nobody waits for it any more; its sender was told that it failed, or asks again with a new deadline."""
    async with cluster("a") as small:
        await small.post("a", small.command("k", "write", "m-1", lives_s=-1.0, entry=1))
        await asyncio.sleep(1)

        assert await small.send("k", "read") == []
        assert small.log("k") == []


@virtually
async def test_different_actors_of_a_node_do_not_wait_for_each_other() -> None:
    """One at work, the other answers."""
    async with cluster("a") as small:
        Ledger.open_gate = asyncio.Event()
        slow = asyncio.create_task(small.send("slow", "write_slowly", entry=1))
        await until(lambda: Ledger.entered == 1)

        assert await small.send("quick", "write", entry=1, timeout_s=1.0) == 1

        Ledger.open_gate.set()
        assert await slow == 1


# ------------------------------------------------------------------------------------------------- forwarding


@virtually
async def test_a_command_sent_to_the_wrong_node_is_forwarded_and_answered() -> None:
    """The answer names the owner and its epoch, so the sender learns the route."""
    async with cluster("a", "b") as small:
        answer = await answered(await small.post("b", small.command("k", "write", "m-1", entry=1)))

        assert (answer.value, answer.error) == (1, None)
        assert (answer.owner, answer.epoch) == ("a", 1)


@virtually
async def test_a_command_that_was_forwarded_too_often_is_answered_moved() -> None:
    """Never loop, never reset the hop count: at the limit the sender is told, and nothing was applied."""
    async with cluster("a", "b") as small:
        answer = await answered(await small.post("b", small.command("k", "write", "m-1", hops=MAX_HOPS, entry=1)))

        assert answer.error is not None
        assert isinstance(answer.error, TransientError)
        assert answer.owner == "a"
        assert await small.send("k", "read") == []


@virtually
async def test_a_command_at_the_hop_limit_is_served_by_the_owner() -> None:
    """The last hop may still be the right one."""
    async with cluster("a") as small:
        answer = await answered(await small.post("a", small.command("k", "write", "m-1", hops=MAX_HOPS, entry=1)))

        assert answer.value == 1


@virtually
async def test_a_node_older_than_the_commands_epoch_looks_again_first() -> None:
    """Its map is behind the sender's: it asks the leader instead of serving on what it knew."""
    async with cluster("a", "b") as small:
        answer = await answered(await small.post("a", small.command("k", "write", "m-1", epoch=99, entry=1)))

        assert answer.value == 1 or isinstance(answer.error, TransientError)
        assert (await small.send("k", "read")).count(1) == (1 if answer.value == 1 else 0)


# ----------------------------------------------------------------------------------------------- bounds, slowness


@virtually
async def test_an_overflowing_buffer_says_busy_and_loses_nothing() -> None:
    """The one too many is told to come back; what waited is served; the refused one is welcome afterwards."""
    async with cluster("a", "b", buffer_messages=3) as small:
        request = await small.lock("m", "b")
        await small.step("pause", request)
        futures = [await small.post("a", small.command("k", "write", f"m-{n}", entry=n)) for n in range(5)]

        refused = [await answered(future, 1.0) for future in futures[3:]]
        assert all(isinstance(answer.error, Busy) for answer in refused)
        await small.abort("m")

        assert [(await answered(future)).value for future in futures[:3]] == [1, 2, 3]
        assert await small.send("k", "write", "m-3", entry=3) == 4
        assert await small.send("k", "read") == [0, 1, 2, 3]


@virtually
async def test_an_overflowing_buffer_costs_a_patient_sender_only_time() -> None:
    """Through the router: Busy is retried under the same id until the gate opens."""
    async with cluster("a", "b", buffer_messages=2) as small:
        request = await small.lock("m", "b")
        await small.step("pause", request)
        sending = [asyncio.create_task(small.send("k", "write", f"m-{n}", entry=n)) for n in range(8)]
        await asyncio.sleep(1)

        for verb in STEPS[1:]:
            await small.step(verb, request)
        await asyncio.gather(*sending)

        assert sorted(await small.send("k", "read")) == list(range(8))


@virtually
async def test_a_full_inbox_says_busy_and_loses_nothing() -> None:
    """One slow actor does not fill the node."""
    async with cluster("a", mailbox_messages=2) as small:
        Ledger.open_gate = asyncio.Event()
        first = await small.post("a", small.command("k", "write_slowly", "m-0", entry=0))
        await until(lambda: Ledger.entered == 1)
        futures = [await small.post("a", small.command("k", "write", f"m-{n}", entry=n)) for n in range(1, 6)]
        await asyncio.sleep(0.5)

        refused = [future for future in futures if future.done()]
        assert refused
        assert all(isinstance(future.result().error, Busy) for future in refused)
        Ledger.open_gate.set()
        accepted = [first, *(future for future in futures if future not in refused)]

        values = [(await answered(future)).value for future in accepted]
        assert values == list(range(1, len(accepted) + 1))


@virtually
async def test_a_handler_that_runs_too_long_keeps_the_pause_waiting() -> None:
    """Busy with the gate closed; when it has ended, the pause asked for again succeeds and its effect moves along."""
    async with cluster("a", "b") as small:
        Ledger.open_gate = asyncio.Event()
        slow = await small.post("a", small.command("k", "write_slowly", "slow", entry="slow"))
        await until(lambda: Ledger.entered == 1)
        request = await small.lock("m", "b")

        with pytest.raises(Busy):
            await small.step("pause", request)
        with pytest.raises(FerryError):
            await small.step("capture", request)
        behind = await small.post("a", small.command("k", "write", "behind", entry="behind"))
        Ledger.open_gate.set()
        await small.steps(request)

        assert (await answered(slow)).value == 1
        assert (await answered(behind)).value == 2
        assert await small.send("k", "read") == ["slow", "behind"]
        assert (await small.map()).owner == "b"


@virtually
async def test_commands_queued_behind_a_running_one_go_before_those_that_came_later() -> None:
    """In the inbox when the gate closed, then in the buffer: the order of arrival holds across the move."""
    async with cluster("a", "b") as small:
        Ledger.open_gate = asyncio.Event()
        futures = [await small.post("a", small.command("k", "write_slowly", "m-0", entry=0))]
        await until(lambda: Ledger.entered == 1)
        futures += [await small.post("a", small.command("k", "write", f"m-{n}", entry=n)) for n in range(1, 4)]
        request = await small.lock("m", "b")
        pausing = asyncio.create_task(small.step("pause", request))
        await asyncio.sleep(0.5)
        futures += [await small.post("a", small.command("k", "write", f"m-{n}", entry=n)) for n in range(4, 7)]
        await asyncio.sleep(0.1)
        Ledger.open_gate.set()
        await pausing

        for verb in STEPS[1:]:
            await small.step(verb, request)

        assert [(await answered(future)).value for future in futures] == list(range(1, 8))
        assert await small.send("k", "read") == list(range(7))


@virtually
async def test_idle_actors_are_put_to_rest_and_wake_from_the_log() -> None:
    """Memory is for those at work."""
    async with cluster("a", passivate_after_s=1.0) as small:
        await small.send("k", "write", "m-1", entry=1)
        await until(lambda: not small.nodes["a"].node.host.inventory().units.get(UNIT), within_s=10)

        assert await small.send("k", "read") == [1]
        assert await small.send("k", "write", "m-1", entry=1) == 1
