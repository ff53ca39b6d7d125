"""Snapshots: when a log is rolled up, without a task where that holds up nobody, and what becomes of one that fails."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

from routing.address import ActorId
from routing.errors import FerryError, PayloadTooLarge, Unavailable, WrongSequence
from routing.link import Appended
from runtime.actor import Actor, command, event
from runtime.codec import frame_header
from runtime.journal import Journal, Kind, Record
from runtime.live_actor import SMALL_BYTES
from runtime.mailbox import Mailboxes
from runtime.snapshots import Snapshots
from runtime.testing import Fault
from tests.unit.cluster import UNIT, Ledger, answered, cluster, posted
from tests.unit.virtual_time import until, virtually


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


def refusing(error: FerryError, *, after_s: float = 0.0) -> Callable[[Appended], bool]:
    """For `first_snapshot`: it is not sent, and the server's answer is `error`."""

    def refuse(then: Appended) -> bool:
        asyncio.get_running_loop().call_later(after_s, then, error)
        return True

    return refuse


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


@virtually
async def test_a_snapshot_that_is_sent_by_a_task_is_encoded_once() -> None:
    """One that fits a message goes out as it was when its size was looked at."""
    async with cluster("a", snapshot_every=3) as small:
        counters = small.nodes["a"].node.host.counters
        with mock.patch("runtime.journal.frame_header", side_effect=frame_header) as encoded:
            for entry in ("x" * SMALL_BYTES, 1, 2):
                await small.send("k", "write", entry=entry)
            await until(lambda: counters["snapshots"] == 1)
            assert encoded.call_count == 1

        await small.restart("a")
        await small.served_by("a")
        assert await small.send("k", "read") == ["x" * SMALL_BYTES, 1, 2]


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

        with first_snapshot(refusing(error)):
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
        append, append_snapshot, appended = Journal.append, Journal.append_snapshot, []

        async def appending(self: Journal, actor: ActorId, record: Record, *, after: int) -> int:
            appended.append(record.kind)
            return await append(self, actor, record, after=after)

        async def appending_snapshot(self: Journal, actor: ActorId, whole: bytes, *, after: int) -> int:
            appended.append(Kind.SNAPSHOT)
            return await append_snapshot(self, actor, whole, after=after)

        with (
            first_snapshot(refusing(Unavailable("no leader"), after_s=0.5)),
            mock.patch.object(Journal, "append", appending),
            mock.patch.object(Journal, "append_snapshot", appending_snapshot),
        ):
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

        with first_snapshot(refusing(PayloadTooLarge("over the stream's limit"))):
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
