"""Commands that are decided where they arrive, without a task: they end as those do that have one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any
from unittest import mock

import pytest

from routing.address import ActorId
from routing.errors import HandlerFailed, InvalidInput, PayloadTooLarge, Rejected, Unavailable
from routing.session import Session
from routing.session_id import new_session_id
from runtime.actor import Actor, command, event, query
from runtime.mailbox import Mailboxes
from runtime.testing import Fault, MemoryLink
from tests.unit.cluster import UNIT, Ledger, SmallCluster, answered, cluster, posted
from tests.unit.virtual_time import until, virtually

ODD = ActorId("odd", "k")


class Unspeakable(Exception):
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise ZeroDivisionError


class Odd(Actor):
    """Fails in every way that a plain function can."""

    actor_type = "odd"

    def __init__(self) -> None:
        self.total = 0

    @command
    def add(self) -> int:
        self.emit("added")
        return self.total

    @command
    def fail(self, *, how: str) -> int:
        self.emit("added")
        if how == "swallows":
            with contextlib.suppress(ZeroDivisionError):
                self.emit("spoiled")
            return self.total
        raise {"cancelled": asyncio.CancelledError, "quits": SystemExit}.get(how, Unspeakable)

    @query
    def ask(self, *, how: str) -> int:
        match how:
            case "rejected":
                raise Rejected("no")
            case "cancelled":
                raise asyncio.CancelledError
            case "quits":
                raise SystemExit(3)
            case "unspeakable":
                raise Unspeakable
        return self.total

    @event
    def added(self) -> None:
        self.total += 1

    @event
    def spoiled(self) -> None:
        self.total = -1
        raise ZeroDivisionError


@contextlib.asynccontextmanager
async def odd_cluster() -> AsyncIterator[SmallCluster]:
    async with cluster() as small:
        await small.add("a", classes=[Odd, Ledger])
        await small.assign("a")
        await small.served_by("a")
        await small.router.send_message(ODD, "add")
        yield small


@virtually
async def test_a_command_that_answers_with_an_awaitable_is_decided_again_from_the_log() -> None:
    """What it had changed before that was seen is not in the log, and must not stay."""
    async with cluster("a") as small:
        await small.send("k", "write", entry=1)

        assert await small.send("k", "write_later", entry=2) == [1, 2]
        entered = Ledger.entered
        assert await small.send("k", "write_later", entry=3) == [1, 2, 3]
        assert Ledger.entered == entered + 1  # from then on it is known

        assert await small.send("k", "read") == [1, 2, 3]
        assert small.kinds("k").count("command") == 3


@virtually
async def test_what_comes_behind_a_command_under_way_is_served_in_order() -> None:
    """One at a time, whether the first had a task or not."""
    async with cluster("a") as small:
        await small.send("k", "write", entry=0)

        futures = await posted(small, [1, 2, 3, 4])

        assert [(await answered(future)).value for future in futures] == [2, 3, 4, 5]
        assert await small.send("k", "read") == [0, 1, 2, 3, 4]


@virtually
@pytest.mark.parametrize("fault", ["drop_reply", "drop_request", "late"])
async def test_an_append_without_an_answer_is_decided_again_before_what_waits_behind_it(fault: Fault) -> None:
    """By reading the log, never by appending the same again."""
    async with cluster("a", append_timeout_s=1.0) as small:
        await small.send("k", "write", entry=0)
        small.disturb(fault, "append", "=k")

        futures = await posted(small, [1, 2, 3])

        assert [(await answered(future)).value for future in futures] == [2, 3, 4]
        assert small.disturbed()
        assert await small.send("k", "read") == [0, 1, 2, 3]


@virtually
async def test_a_link_that_takes_nothing_more_costs_only_time() -> None:
    """Nothing was sent: the command is decided again, and its event is in the state once."""
    async with cluster("a") as small:
        await small.send("k", "write", entry=0)

        with mock.patch.object(MemoryLink, "append_then", side_effect=Unavailable("too much waits")) as refusing:
            assert await small.send("k", "write", entry=1) == 2

        assert refusing.called
        assert await small.send("k", "read") == [0, 1]


@virtually
async def test_a_reply_too_large_to_be_logged_is_a_logged_refusal() -> None:
    """Or a late duplicate would apply after the sender was told no."""
    async with cluster("a") as small:
        await small.send("k", "write", entry=0)

        for _ in range(2):
            with pytest.raises(PayloadTooLarge):
                await small.send("k", "shout", "m-1", size_bytes=small.nats.max_payload)
            assert small.kinds("k").count("rejection") == 1

        assert await small.send("k", "read") == [0]


@virtually
async def test_a_pause_waits_for_an_append_under_way() -> None:
    """And the move carries what it has stored."""
    async with cluster("a", "b", append_timeout_s=1.0) as small:
        await small.send("k", "write", entry=0)
        small.disturb("drop_reply", "append", "=k")
        (future,) = await posted(small, [1])
        await until(small.disturbed)

        await small.move("m", "b")
        await small.served_by("b")

        assert (await answered(future)).value == 2
        assert await small.send("k", "read") == [0, 1]


@virtually
async def test_a_node_that_stops_leaves_no_task_behind_for_an_append_under_way() -> None:
    """Closing its link is how it learns that the append is in doubt; by then nobody may begin anything."""
    async with cluster("a", append_timeout_s=2.0) as small:
        await small.send("k", "write", entry=0)
        small.disturb("drop_reply", "append", "=k")
        await posted(small, [1])
        await until(small.disturbed)
        node = small.nodes["a"].node

        with mock.patch("runtime.node.STOP_S", 0.1):
            await node.stop()

        assert not node._tasks


@virtually
async def test_a_mistake_after_an_append_ends_the_node() -> None:
    """It is no error of an actor's, and an actor that is never at rest again would be worse."""
    async with cluster("a") as small:
        await small.send("k", "write", entry=0)

        with mock.patch.object(Mailboxes, "_stored", side_effect=ZeroDivisionError):
            await posted(small, [1])
            with pytest.raises(ZeroDivisionError):
                await small.nodes["a"].task

        small.everyone.clear()


@virtually
@pytest.mark.parametrize("how", ["swallows", "cancelled", "unspeakable", "quits"])
async def test_however_a_plain_handler_fails_that_is_its_senders_answer(how: str) -> None:
    """It is logged, and what it had changed before is forgotten."""
    async with odd_cluster() as small:
        for router in (small.router, small.nodes["a"].node.router):
            with pytest.raises(HandlerFailed):
                await router.send_message(ODD, "fail", {"how": how})

        assert await small.router.send_message(ODD, "add") == 2
        assert small.kinds("k").count("rejection") == 2


@virtually
@pytest.mark.parametrize("how", ["cancelled", "unspeakable", "quits"])
async def test_however_a_plain_query_fails_that_is_its_senders_answer(how: str) -> None:
    """A caller in the same process is not cancelled by it."""
    async with odd_cluster() as small:
        for router in (small.router, small.nodes["a"].node.router):
            with pytest.raises(HandlerFailed):
                await router.send_message(ODD, "ask", {"how": how})


@virtually
async def test_a_handler_that_fails_does_not_keep_from_the_others_what_waited_with_it() -> None:
    """A gate that opens hands out everything behind it."""
    async with odd_cluster() as small:
        for key in ("1", "2", "3"):
            await small.send(key, "write", entry=0)
        request = await small.lock("m", "b")
        await small.step("pause", request)
        bad = small.command("k", "fail", "bad", how="cancelled")
        bad.actor = ODD
        sent = [small.command("1", "write", "m-1", entry=1), bad, small.command("2", "write", "m-2", entry=1)]
        futures = [await small.post("a", one) for one in [*sent, small.command("3", "write", "m-3", entry=1)]]

        await small.abort("m")

        assert [type((await answered(future, within_s=1.0)).error) for future in futures] == [
            type(None), HandlerFailed, type(None), type(None)
        ]  # fmt: skip


@virtually
async def test_arguments_that_do_not_fit_are_no_entry_of_the_log() -> None:
    """They never reach the handler, at rest or not."""
    async with cluster("a") as small:
        await small.send("k", "write", entry=1)
        before = len(small.log("k"))

        with pytest.raises(InvalidInput):
            await small.send("k", "write", entrance=2)

        assert len(small.log("k")) == before


@virtually
async def test_a_command_that_nobody_waits_for_any_more_is_not_decided() -> None:
    """Its sender has been told that it was not applied."""
    async with cluster("a") as small:
        await small.send("k", "write", entry=1)

        await small.post("a", small.command("k", "write", "late", entry="late", lives_s=-1.0))
        await asyncio.sleep(1)

        assert await small.send("k", "read") == [1]
        assert small.nodes["a"].node.host.counters["expired"] == 1


@virtually
async def test_a_local_query_waits_at_a_closed_gate() -> None:
    """The actor may be another node's by the time it is answered."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry=1)
        request = await small.lock("m", "b")
        await small.step("pause", request)

        reading = asyncio.create_task(small.nodes["a"].node.router.send_message(ActorId("ledger", "k"), "read"))
        await asyncio.sleep(0.1)
        assert not reading.done()
        await small.abort("m")

        assert await reading == [1]


@virtually
async def test_who_looks_between_two_commands_waits_for_an_append_under_way() -> None:
    """A copy made before it would be of a state that the log does not have."""
    async with cluster("a", latency=lambda: 0.01) as small:
        await small.send("k", "write", entry=0)
        host = small.nodes["a"].node.host
        live = host.units[UNIT].actors[ActorId("ledger", "k")]
        await posted(small, [1])
        await until(lambda: live.running)

        seen = await host._mailboxes.between_commands(live, lambda: (live.version, live.instance.entries))  # type: ignore[union-attr]

        assert seen == (small.log("k")[-1].sequence, [0, 1])


@virtually
@pytest.mark.parametrize("local", [False, True])
async def test_an_actor_that_is_only_asked_is_not_put_to_rest(local: bool) -> None:
    """Queries are use as well."""
    async with cluster("a", passivate_after_s=2.0) as small:
        await small.send("k", "write", entry=1)
        router = small.nodes["a"].node.router if local else small.router

        for _ in range(60):
            await asyncio.sleep(0.1)
            await router.send_message(ActorId("ledger", "k"), "read")

        assert small.nodes["a"].node.host.counters["passivated"] == 0


@virtually
@pytest.mark.parametrize("way", ["plain", "refused", "session"])
async def test_whoever_asks_in_a_loop_lets_others_run(way: str) -> None:
    """An answer that is there at once, of whatever kind, is no wait: without one nothing else would ever run again."""
    async with odd_cluster() as small:
        router, turns = small.nodes["a"].node.router, 0
        session = Session(new_session_id(1), lambda: router)

        async def ask() -> Any:
            if way == "session":
                return await session.query(ODD, "ask", {"how": ""})
            return await router.send_message(ODD, "ask", {"how": "rejected" if way == "refused" else ""})

        async def take_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        others = asyncio.create_task(take_turns())
        for _ in range(5_000):
            with contextlib.suppress(Rejected):
                await ask()

        assert turns > 1
        others.cancel()


@virtually
async def test_a_link_with_too_much_to_send_has_a_command_wait_before_it_is_decided() -> None:
    """Not after, when the actor would have to be loaded again for each."""
    async with cluster("a") as small:
        await small.send("k", "write", entry=0)
        host = small.nodes["a"].node.host
        loaded = host.counters["activations"]

        journal = small.nodes["a"].node.host._mailboxes._journal
        with mock.patch.multiple(journal, takes_more=lambda: False, append_then=mock.DEFAULT) as refusing:
            assert await small.send("k", "write", entry=1) == 2

        assert not refusing["append_then"].called
        assert host.counters["activations"] == loaded
