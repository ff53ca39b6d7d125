"""Actors whose code or log has gone wrong: their senders are told the truth, and nobody else stands still for them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import pytest

from routing.address import ActorId
from routing.envelope import Command
from routing.errors import FerryError, HandlerFailed, InDoubt, PayloadTooLarge, StateNotPortable
from runtime.actor import Actor, command, event, query
from runtime.unit import Buffer, Unit
from tests.unit.cluster import UNIT, Ledger, SmallCluster, answered, cluster
from tests.unit.virtual_time import until, virtually

ODD = ActorId("odd", "k")


class Odd(Actor):
    """Its events cannot be applied any more once `replayable` is taken back, and it meets what it has cancelled."""

    actor_type = "odd"
    replayable = True

    def __init__(self) -> None:
        self.added = 0

    @command
    async def add(self) -> int:
        self.emit("was_added")
        return self.added

    @command
    async def meet_cancelled(self) -> int:
        await cancelled()
        return 1

    @command
    async def quit(self) -> int:
        await asyncio.sleep(0)
        raise SystemExit(3)

    @query
    def large(self, *, size_bytes: int) -> str:
        return "x" * size_bytes

    @query
    async def ask_cancelled(self) -> int:
        await cancelled()
        return 1

    @event
    def was_added(self) -> None:
        if not type(self).replayable:
            raise ValueError("this version cannot")
        self.added += 1


async def cancelled() -> None:
    task = asyncio.ensure_future(asyncio.sleep(10))
    task.cancel()
    await task


async def with_odd(small: SmallCluster) -> None:
    Odd.replayable = True
    for name in "ab":
        await small.add(name, classes=(Ledger, Odd))
    await small.assign("a")
    await small.served_by("a")
    assert await small.router.send_message(ODD, "add", {}) == 1


def to_odd(name: str) -> Command:
    return Command(actor=ODD, name=name, message_id=f"m-{name}", expires_ms=2**52)


@virtually
async def test_a_handler_that_meets_what_was_cancelled_has_failed() -> None:
    """It is told to its sender and logged, and what waits behind it is served."""
    async with cluster() as small:
        await with_odd(small)

        futures = [await small.post("a", to_odd(name)) for name in ("meet_cancelled", "ask_cancelled", "quit", "add")]
        refused, asked, quitted, added = [await answered(future) for future in futures]

        assert isinstance(refused.error, HandlerFailed)
        assert isinstance(asked.error, HandlerFailed)
        assert isinstance(quitted.error, HandlerFailed)
        assert added.value == 2
        with pytest.raises(HandlerFailed, match="cancelled"):
            await small.router.send_message(ODD, "meet_cancelled", {}, message_id="m-meet_cancelled")


@virtually
async def test_an_answer_that_is_too_large_to_be_sent_is_told_at_once() -> None:
    """Nobody waits for it until the end of the timeout, and the query is not run again and again."""
    async with cluster() as small:
        await with_odd(small)

        with pytest.raises(PayloadTooLarge, match="the answer of 'large' of odd/k"):
            await small.router.send_message(ODD, "large", {"size_bytes": 2**21}, timeout_s=20.0)

        assert len([subject for kind, subject in small.messages if kind == "request" and ".cmd.a." in subject]) == 2


@virtually
async def test_a_command_that_may_have_landed_is_in_doubt_whatever_its_actor_says_now() -> None:
    """Its sender must not be told that it failed for certain: here it has landed."""
    async with cluster(append_timeout_s=0.5) as small:
        await with_odd(small)
        before = len(small.log("k"))
        small.disturb("drop_reply", "append", ".ev.")

        def unlearn() -> None:
            Odd.replayable = False

        asyncio.get_running_loop().call_later(0.3, unlearn)
        with pytest.raises(InDoubt):
            await small.router.send_message(ODD, "add", {}, timeout_s=1.5)

        assert small.disturbed()
        assert len(small.log("k")) == before + 1


@virtually
async def test_an_actor_that_cannot_be_read_does_not_keep_its_shard() -> None:
    """It is nothing but its log, which moves with the shard; the others go with what they are."""
    async with cluster() as small:
        await with_odd(small)
        await small.send("fine", "write", entry=1)
        Odd.replayable = False
        with pytest.raises(HandlerFailed):
            await small.router.send_message(ODD, "add", {})
        with pytest.raises(StateNotPortable):
            await small.router.send_message(ODD, "add", {})

        await small.move("m", "b")
        await small.served_by("b")

        assert await small.send("fine", "read") == [1]
        with pytest.raises(StateNotPortable):
            await small.router.send_message(ODD, "add", {})
        Odd.replayable = True
        assert await small.router.send_message(ODD, "add", {}) == 2


@virtually
async def test_a_long_log_does_not_hold_up_the_commands_of_others() -> None:
    """Others have their turn between any two of its records: while they are read, and while they are replayed."""
    async with cluster("a", snapshot_every=10**6) as small:
        for entry in range(600):
            await small.send("k", "write", entry=entry)
        await small.restart("a")
        await small.served_by("a")
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        with mock.patch("runtime.turn.TURN_S", -1.0):
            assert len(await small.send("k", "read")) == 600
        counting.cancel()

        assert turns > 2 * 600


class Fragile(Actor):
    """Its constructor fails, for example because a file is missing on this machine."""

    actor_type = "fragile"

    def __init__(self) -> None:
        raise RuntimeError("a mistake in the actor")

    @command
    def go(self) -> bool:
        return True


@virtually
async def test_an_actor_that_cannot_be_constructed_does_not_end_the_node() -> None:
    """A mistake of one actor class is answered to its caller; the other actors of the node go on."""
    async with cluster() as small:
        await small.add("a", classes=(Ledger, Fragile))
        await small.assign("a")
        await small.served_by("a")
        with pytest.raises(FerryError):
            await small.router.send_message(ActorId("fragile", "k"), "go", {}, timeout_s=3.0)

        assert not small.nodes["a"].task.done()
        assert await small.send("k", "write", entry=1) == 1


# -- a handler that still runs when its unit is begun anew -------------------------------------------------------------
@virtually
async def test_two_who_wait_for_the_same_handlers_both_go_on() -> None:
    """And neither before all of the units that were there before are quiet."""
    units = [Unit("shard.0", Buffer(10, 1000)) for _ in range(3)]
    for before, after in pairwise(units):
        before.mailbox_started()
        after.before = before
    waiting = [asyncio.create_task(units[-1].quiet(40.0)) for _ in range(2)]
    await asyncio.sleep(0.1)

    units[1].mailbox_stopped()
    await asyncio.sleep(0.1)
    assert not any(task.done() for task in waiting)
    units[0].mailbox_stopped()
    await asyncio.gather(*waiting)


@virtually
async def test_a_pause_that_is_asked_for_twice_meanwhile_ends_no_node() -> None:
    """A task that was delivered twice, after the unit was begun anew."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry=0)
        Ledger.open_gate = asyncio.Event()
        slow = await small.post("a", small.command("k", "write_slowly", "m-1", entry=1))
        await until(lambda: Ledger.entered == 1)
        entry = await small.directory.refresh(UNIT)
        assert entry is not None
        anew = replace(entry.ownership, epoch=entry.ownership.epoch + 1, fence=entry.ownership.epoch + 1)
        await small.directory.transition(UNIT, entry, anew)
        await asyncio.sleep(0.1)
        request = await small.lock("m", "b")
        pausing = [asyncio.create_task(small.step("pause", request)) for _ in range(2)]
        await asyncio.sleep(1.0)

        Ledger.open_gate.set()
        await asyncio.gather(*pausing)
        await small.steps(request)

        assert not small.nodes["a"].task.done()
        assert (await answered(slow)).value == 2
        assert await small.send("k", "read") == [0, 1]
