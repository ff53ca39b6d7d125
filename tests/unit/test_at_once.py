"""Commands that are decided where they arrive, without a task: they end as those do that have one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any
from unittest import mock

import pytest

from routing.address import ActorId
from routing.envelope import Answer
from routing.errors import (
    FerryError,
    HandlerFailed,
    InvalidInput,
    PayloadTooLarge,
    Rejected,
    Unavailable,
    WrongSequence,
)
from routing.link import Appended
from routing.session import Session
from routing.session_id import new_session_id
from runtime.actor import Actor, command, event, query
from runtime.journal import Journal, Kind, Record
from runtime.live_actor import SMALL_BYTES
from runtime.mailbox import Mailboxes
from runtime.snapshots import Snapshots
from runtime.testing import Fault, MemoryLink
from tests.unit.cluster import UNIT, Ledger, SmallCluster, answered, cluster
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
        raise asyncio.CancelledError if how == "cancelled" else Unspeakable

    @query
    def ask(self, *, how: str) -> int:
        match how:
            case "rejected":
                raise Rejected("no")
            case "cancelled":
                raise asyncio.CancelledError
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


class Sealed(Actor):
    """Its state is bytes of its own."""

    actor_type = "sealed"

    def __init__(self) -> None:
        self.opened = 0

    def capture(self) -> bytes:
        return b"%d" % self.opened

    def restore(self, state: bytes) -> None:
        self.opened = int(state)

    @command
    def open(self) -> int:
        self.emit("was_opened")
        return self.opened

    @event
    def was_opened(self) -> None:
        self.opened += 1


@contextlib.asynccontextmanager
async def odd_cluster() -> AsyncIterator[SmallCluster]:
    async with cluster() as small:
        await small.add("a", classes=[Odd, Ledger])
        await small.assign("a")
        await small.served_by("a")
        await small.router.send_message(ODD, "add")
        yield small


async def posted(small: SmallCluster, entries: list[int]) -> list[asyncio.Future[Answer]]:
    """Writes that come one right behind the other; what will be answered to each."""
    return [await small.post("a", small.command("k", "write", f"m-{entry}", entry=entry)) for entry in entries]


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
@pytest.mark.parametrize("how", ["swallows", "cancelled", "unspeakable"])
async def test_however_a_plain_handler_fails_that_is_its_senders_answer(how: str) -> None:
    """It is logged, and what it had changed before is forgotten."""
    async with odd_cluster() as small:
        for router in (small.router, small.nodes["a"].node.router):
            with pytest.raises(HandlerFailed):
                await router.send_message(ODD, "fail", {"how": how})

        assert await small.router.send_message(ODD, "add") == 2
        assert small.kinds("k").count("rejection") == 2


@virtually
@pytest.mark.parametrize("how", ["cancelled", "unspeakable"])
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
async def test_an_actor_that_came_by_a_move_is_looked_at_before_its_log_is_rolled_up() -> None:
    """Its state is a cache until it has been compared with the log, and a query has not to wait for a snapshot."""
    async with cluster("a", "b", snapshot_every=3, precopy_from_bytes=2**20) as small:
        for entry in (1, 2):
            await small.send("k", "write", entry=entry)
        request = await small.lock("m", "b")
        Ledger.open_gate = asyncio.Event()
        writing = asyncio.create_task(small.send("k", "write_slowly", entry=3))
        await until(lambda: Ledger.entered == 1)
        pausing = asyncio.create_task(small.step("pause", request))
        await asyncio.sleep(0.2)
        Ledger.open_gate.set()
        await asyncio.gather(pausing, writing)
        await small.steps(request)
        await small.served_by("b")

        assert await small.send("k", "read") == [1, 2, 3]

        assert "snapshot" not in small.kinds("k")


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


@contextlib.contextmanager
def first_snapshot(befall: Callable[[Appended], bool]) -> Iterator[None]:
    """Call `befall` with what is to hear of the first snapshot that is sent without a task; True: it is not sent."""
    append_then, befallen = Journal.append_then, []

    def appending(self: Journal, actor: ActorId, record: Record, *, after: int, then: Appended) -> None:
        if record.kind is Kind.SNAPSHOT and not befallen:
            befallen.append(record)
            if befall(then):
                return
        append_then(self, actor, record, after=after, then=then)

    with mock.patch.object(Journal, "append_then", appending):
        yield
    assert befallen


@virtually
async def test_a_small_state_is_rolled_up_without_a_task() -> None:
    """One that takes long to pack is for a task."""
    async with cluster("a", snapshot_every=3) as small:
        host, rolled_up = small.nodes["a"].node.host, ["snapshot"]
        await small.send("k", "write", entry=0)
        with mock.patch.object(Mailboxes, "_run", autospec=True, side_effect=Mailboxes._run) as tasks:
            for entry in (1, 2, 3, 4):  # the snapshot itself is an entry of the log
                await small.send("k", "write", entry=entry)
            await until(lambda: host.counters["snapshots"] == 2)
            assert small.kinds("k") == rolled_up
            assert not tasks.called

            for entry in ("x" * SMALL_BYTES, 6):
                await small.send("k", "write", entry=entry)
            await until(lambda: host.counters["snapshots"] == 3)
            assert small.kinds("k") == rolled_up
            assert tasks.called

        assert await small.send("k", "read") == [0, 1, 2, 3, 4, "x" * SMALL_BYTES, 6]


@virtually
@pytest.mark.parametrize("fault", ["drop_reply", "drop_request", "late"])
async def test_a_snapshot_without_an_answer_may_have_landed(fault: Fault) -> None:
    """The next command reads what the log says; what was waiting for it is served in order."""
    async with cluster("a", snapshot_every=3, append_timeout_s=1.0) as small:
        await small.send("k", "write", entry=0)
        await small.send("k", "write", entry=1)

        def disturb(_: Appended) -> bool:
            small.disturb(fault, "append", "=k")
            return False

        with first_snapshot(disturb):
            assert await small.send("k", "write", entry=2) == 3
            futures = await posted(small, [3, 4, 5])
            assert [(await answered(future)).value for future in futures] == [4, 5, 6]

        assert small.disturbed()
        assert await small.send("k", "read") == [0, 1, 2, 3, 4, 5]


REFUSALS = pytest.mark.parametrize(
    ("error", "snapshots", "failed", "loaded"),
    [
        (WrongSequence("somebody else appended"), 1, 0, 1),  # the log is read, and it is due again
        (Unavailable("no leader"), 1, 0, 0),  # due after the next command
        (PayloadTooLarge("over the stream's limit"), 0, 1, 0),  # not before the log is twice as long
    ],
)


@virtually
@REFUSALS
async def test_a_snapshot_that_the_server_refuses_costs_no_command(
    error: FerryError, snapshots: int, failed: int, loaded: int
) -> None:
    """Only after another's append is the log read again."""
    async with cluster("a", snapshot_every=3) as small:
        await small.send("k", "write", entry=0)
        await small.send("k", "write", entry=1)
        counters = small.nodes["a"].node.host.counters
        before = counters["activations"]

        def refuse(then: Appended) -> bool:
            asyncio.get_running_loop().call_soon(then, error)
            return True

        with first_snapshot(refuse):
            assert await small.send("k", "write", entry=2) == 3
            assert await small.send("k", "write", entry=3) == 4
        await asyncio.sleep(1)

        assert (counters["snapshots"], counters["snapshots_failed"]) == (snapshots, failed)
        assert counters["activations"] - before == loaded
        assert await small.send("k", "read") == [0, 1, 2, 3]


@virtually
async def test_what_waits_for_a_snapshot_that_was_not_stored_is_served_first() -> None:
    """It is due again only after the next command."""
    async with cluster("a", snapshot_every=3) as small:
        await small.send("k", "write", entry=0)
        await small.send("k", "write", entry=1)
        append, appended = Journal.append, []

        def refuse(then: Appended) -> bool:
            asyncio.get_running_loop().call_later(0.5, then, Unavailable("no leader"))
            return True

        async def appending(self: Journal, actor: ActorId, record: Record, *, after: int) -> int:
            appended.append(record.kind)
            return await append(self, actor, record, after=after)

        with first_snapshot(refuse), mock.patch.object(Journal, "append", appending):
            assert await small.send("k", "write", entry=2) == 3
            (future,) = await posted(small, [3])
            assert (await answered(future)).value == 4
            await until(lambda: small.kinds("k") == ["snapshot"])

        assert appended == [Kind.COMMAND, Kind.SNAPSHOT]


@virtually
async def test_what_cannot_be_sent_at_once_is_rolled_up_by_a_task() -> None:
    """The link has too much to send already, or takes nothing, or only the class itself can capture its state."""
    async with cluster(snapshot_every=3) as small:
        await small.add("a", classes=[Ledger, Sealed])
        await small.assign("a")
        await small.served_by("a")
        host = small.nodes["a"].node.host
        journal = host._mailboxes._journal
        for number in (1, 2):
            await small.send("k", "write", entry=number)
        with first_snapshot(mock.Mock(side_effect=Unavailable("it takes nothing"))):
            await small.send("k", "write", entry=3)
        await until(lambda: host.counters["snapshots"] == 1)

        await small.send("k", "write", entry=4)
        append_then, takes_more, sent = Journal.append_then, journal.takes_more, []

        def and_then_takes_no_more(self: Journal, actor: ActorId, record: Record, **how: Any) -> None:
            append_then(self, actor, record, **how)
            sent.append(record.kind)
            journal.takes_more = lambda: False

        with mock.patch.object(Journal, "append_then", and_then_takes_no_more):
            await small.send("k", "write", entry=5)
            await until(lambda: host.counters["snapshots"] == 2)
        assert sent == [Kind.COMMAND]
        journal.takes_more = takes_more

        with mock.patch.object(Snapshots, "take", autospec=True, side_effect=Snapshots.take) as take:
            for number in range(3):
                assert await small.router.send_message(ActorId("sealed", "k"), "open") == number + 1
            await until(lambda: host.counters["snapshots"] == 3)
            assert take.call_count == 1


@virtually
async def test_a_snapshot_that_succeeds_again_is_due_as_often_as_before() -> None:
    """After one that failed the log had to be twice as long."""
    async with cluster("a", snapshot_every=3) as small:
        counters = small.nodes["a"].node.host.counters

        def refuse(then: Appended) -> bool:
            asyncio.get_running_loop().call_soon(then, PayloadTooLarge("over the stream's limit"))
            return True

        with first_snapshot(refuse):
            for number in range(6):
                await small.send("k", "write", entry=number)
        await until(lambda: counters["snapshots"] == 1)
        for number in range(4):  # the snapshot itself is the first of three
            await small.send("k", "write", entry=number)

        await until(lambda: counters["snapshots"] == 3)


@virtually
async def test_a_schema_that_meets_what_was_cancelled_only_fails_the_snapshot() -> None:
    """In a plain function that is no cancellation of its task, and the actor is at rest again."""
    async with cluster(snapshot_every=3) as small:
        await small.add("a", classes=[Sealed])
        await small.assign("a")
        await small.served_by("a")
        host, sealed = small.nodes["a"].node.host, ActorId("sealed", "k")
        for _ in range(2):
            await small.router.send_message(sealed, "open")

        with mock.patch.object(Sealed, "capture", side_effect=asyncio.CancelledError):
            assert await small.router.send_message(sealed, "open") == 3
            await until(lambda: host.counters["snapshots_failed"] == 1)

        assert await small.router.send_message(sealed, "open") == 4
        await until(lambda: all(unit.running == 0 for unit in host.units.values()))


@virtually
async def test_a_pause_waits_for_a_snapshot_under_way() -> None:
    """And the move carries the actor at the version it left."""
    async with cluster("a", "b", snapshot_every=3, append_timeout_s=1.0, precopy_from_bytes=2**20) as small:
        await small.send("k", "write", entry=0)
        await small.send("k", "write", entry=1)
        unit = small.nodes["a"].node.host.units[UNIT]

        def disturb(_: Appended) -> bool:
            small.disturb("drop_reply", "append", "=k")
            return False

        with first_snapshot(disturb):
            assert await small.send("k", "write", entry=2) == 3
            request = await small.lock("m", "b")
            pausing = asyncio.create_task(small.step("pause", request))
            await until(lambda: unit.pause is not None)
            assert unit.running == 1
            await asyncio.sleep(0.5)
            assert not pausing.done()
            await pausing
        await small.steps(request)
        await small.served_by("b")

        assert small.disturbed()
        assert await small.send("k", "write", entry=3) == 4
        assert await small.send("k", "read") == [0, 1, 2, 3]


@virtually
async def test_a_mistake_after_a_snapshot_ends_the_node() -> None:
    """As after a command."""
    async with cluster("a", snapshot_every=3) as small:
        await small.send("k", "write", entry=0)
        await small.send("k", "write", entry=1)

        with mock.patch.object(Snapshots, "ended", side_effect=ZeroDivisionError):
            await small.send("k", "write", entry=2)
            with pytest.raises(ZeroDivisionError):
                await small.nodes["a"].task

        small.everyone.clear()
