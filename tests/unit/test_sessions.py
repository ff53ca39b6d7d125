"""Ordered sender sessions and linearizable queries, with real nodes on virtual time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace

from routing.address import ActorId
from routing.envelope import Answer, Command
from routing.errors import (
    FerryError,
    InDoubt,
    InvalidInput,
    NotApplicable,
    OutOfOrder,
    PayloadTooLarge,
    Rejected,
    SessionExpired,
    Timeout,
    Unavailable,
)
from routing.session import Session
from routing.session_id import IN_FLIGHT, new_session_id, opened_at
from runtime.journal import History, Kind, decode_record
from runtime.live_actor import LiveActor
from runtime.memory import Limits
from tests.unit.cluster import UNIT, Ledger, SmallCluster, cluster
from tests.unit.virtual_time import until, virtually

KEY = ActorId("ledger", "k")


def session(small: SmallCluster, opened: int = 1_000) -> Session:
    return Session(new_session_id(opened), lambda: small.router)


async def write(sending: Session, entry: Any, *, timeout: float = 20.0) -> Any:
    return await sending.send_message(KEY, "write", {"entry": entry}, timeout=timeout)


def numbered(small: SmallCluster, name: str, number: int, of: str = "7-00000001", **arguments: Any) -> Command:
    plain = small.command("k", name, f"{of}.{number}", **arguments)
    return Command(
        actor=plain.actor, name=name, arguments=arguments, message_id=plain.message_id, expires_ms=plain.expires_ms,
        session=of, number=number,
    )  # fmt: skip


async def answer(small: SmallCluster, node: str, sent: Command) -> Answer:
    async with asyncio.timeout(30):
        return await (await small.post(node, sent))


# -- order -------------------------------------------------------------------------------------------------------------
@virtually
async def test_commands_of_a_session_are_applied_in_the_order_of_the_calls() -> None:
    """Many on their way at once: each reply is the position of its entry."""
    async with cluster("a", latency=lambda: 0.001) as small:
        sending = session(small)

        replies = await asyncio.gather(*(write(sending, n) for n in range(100)))

        assert replies == list(range(1, 101))
        assert await small.send("k", "read") == list(range(100))


@virtually
async def test_order_holds_across_moves_lost_messages_and_a_fail_over() -> None:
    """Some are lost, some answers are, the shard moves twice and its owner is cut off: order holds."""
    async with cluster("a", "b", "c", latency=lambda: 0.002) as small:
        sending = session(small)
        for fault in ("drop_request", "drop_reply", "drop_request"):
            small.disturb(fault, "request", ".cmd.", times=3)  # type: ignore[arg-type]
        small.disturb("drop_reply", "append", ".ev.", times=2)

        async def send_all() -> list[Any]:
            return await asyncio.gather(*(write(sending, n, timeout=90) for n in range(60)))

        sender = asyncio.create_task(send_all())
        await small.move("m1", "b")
        await small.move("m2", "c")
        small.nodes["c"].cut()
        await small.fail_over("a")
        replies = await sender

        assert small.disturbed()
        assert replies == list(range(1, 61))
        assert await small.send("k", "read") == list(range(60))


@virtually
async def test_a_command_that_comes_before_its_turn_is_sent_back() -> None:
    """Nothing is applied out of order; the answer names the number that is missing."""
    async with cluster("a") as small:
        early = await answer(small, "a", numbered(small, "write", 2, entry="second"))
        first = await answer(small, "a", numbered(small, "write", 1, entry="first"))
        second = await answer(small, "a", numbered(small, "write", 2, entry="second"))

        assert isinstance(early.error, OutOfOrder)
        assert "command 1" in str(early.error)
        assert (first.value, second.value) == (1, 2)


@virtually
async def test_a_command_that_comes_again_gets_the_same_reply() -> None:
    """From memory, and from the log after a restart; its session's later commands do not change it."""
    async with cluster("a", "b", snapshot_every=3) as small:
        for number in range(1, 9):
            assert (await answer(small, "a", numbered(small, "write", number, entry=number))).value == number
        again = await answer(small, "a", numbered(small, "write", 4, entry=4))
        small.nodes["a"].cut()
        await small.fail_over("b")
        await small.served_by("b")
        from_the_log = await answer(small, "b", numbered(small, "write", 5, entry=5))
        next_one = await answer(small, "b", numbered(small, "write", 9, entry=9))

        assert (again.value, from_the_log.value, next_one.value) == (4, 5, 9)
        assert await small.send("k", "read") == list(range(1, 10))


@virtually
async def test_what_a_session_was_told_travels_with_a_move() -> None:
    """The destination goes on where the source stopped: neither a gap nor a second application."""
    async with cluster("a", "b") as small:
        for number in (1, 2):
            await answer(small, "a", numbered(small, "write", number, entry=number))
        await small.move("m", "b")
        await small.served_by("b")

        assert (await answer(small, "b", numbered(small, "write", 2, entry=2))).value == 2
        assert (await answer(small, "b", numbered(small, "write", 3, entry=3))).value == 3
        assert small.kinds("k") == ["command"] * 3  # staged state was used, nothing claimed


@virtually
async def test_t15_an_owner_that_missed_something_looks_again_before_it_sends_a_sender_back() -> None:
    """It would answer "gap" for ever: here the log has grown behind a node that has not heard of it."""
    async with cluster("a", "b") as small:
        await answer(small, "a", numbered(small, "write", 1, entry=1))
        stale = small.nodes["a"].node.host.units[UNIT].actors[KEY]
        kept = (stale.instance, stale.memory, stale.version, stale.trail)
        await answer(small, "a", numbered(small, "write", 2, entry=2))
        other = await stale_memory(small)
        stale.instance, stale.memory, stale.version, stale.trail = other.instance, other.memory, kept[2], kept[3]

        assert (await answer(small, "a", numbered(small, "write", 3, entry=3))).value == 3


async def stale_memory(small: SmallCluster) -> Any:
    """The actor as it stood after its first command."""
    first = small.log("k")[0]
    live = LiveActor(KEY)
    history = History(version=first.sequence, epoch=1, records=((first.sequence, decode_record(first.payload)),))
    await live.restore(Ledger, history, limits=Limits.of(small.settings), max_state_bytes=2**20)
    return live


# -- refusals ----------------------------------------------------------------------------------------------------------
@virtually
async def test_a_rejected_command_takes_its_number() -> None:
    """The sender knows what became of it, so the ones behind go on."""
    async with cluster("a") as small:
        sending = session(small)
        await sending.send_message(KEY, "close")

        results = await asyncio.gather(
            write(sending, "refused"), sending.send_message(KEY, "reopen"), write(sending, "taken"),
            return_exceptions=True,
        )  # fmt: skip

        assert isinstance(results[0], Rejected)
        assert results[1:] == [True, 1]


@virtually
async def test_an_unknown_command_and_a_query_take_their_numbers_too() -> None:
    """What cannot be run is refused in the log, or every later command would wait for it."""
    async with cluster("a") as small:
        sending = session(small)

        results = [
            await asyncio.gather(
                sending.send_message(KEY, name, arguments), write(sending, name), return_exceptions=True
            )
            for name, arguments in (("no_such_command", {}), ("write", {"wrong": 1}), ("read", {}))
        ]

        assert [isinstance(refused, InvalidInput) for refused, _ in results] == [True] * 3
        assert [taken for _, taken in results] == [1, 2, 3]
        assert "session.query" in str(results[2][0])


@virtually
async def test_a_command_whose_reply_is_too_large_for_the_log_takes_its_number() -> None:
    """Its refusal is in the log: the ones behind go on, and one that comes again is told the same."""
    async with cluster("a", "b") as small:
        sending = session(small)
        large = {"size_bytes": small.nats.max_payload}

        refused, taken = await asyncio.gather(
            sending.send_message(KEY, "shout", large), write(sending, 1), return_exceptions=True
        )
        assert isinstance(refused, PayloadTooLarge)
        assert taken == 1
        await small.move("m", "b")

        again = await answer(small, "b", numbered(small, "shout", 1, sending.id, **large))
        assert isinstance(again.error, PayloadTooLarge)
        assert again.error.logged
        assert await write(sending, 2) == 2
        assert await sending.query(KEY, "read") == [1, 2]


@virtually
async def test_after_a_command_without_an_outcome_the_session_goes_no_further() -> None:
    """Later commands would overtake it; a new session goes on."""
    async with cluster("a") as small:
        sending = session(small)
        await write(sending, 1)
        small.nodes["a"].cut()
        with pytest.raises((Timeout, Unavailable, InDoubt)):
            await write(sending, 2, timeout=1.0)
        small.nodes["a"].heal()

        with pytest.raises(NotApplicable, match="open a new one"):
            await write(sending, 3)
        assert await write(session(small, 2_000), 4) >= 2


@virtually
async def test_a_forgotten_session_is_refused_and_never_applied_a_second_time() -> None:
    """Its first command comes again, long after the actor has forgotten it: a clear error, not a second entry."""
    async with cluster("a", sessions_remembered=2) as small:
        first = numbered(small, "write", 1, of="5-00000001", entry="once")
        await answer(small, "a", first)
        for opened in (6, 7, 8):
            await answer(small, "a", numbered(small, "write", 1, of=f"{opened}-00000001", entry=opened))

        late = await answer(small, "a", first)

        assert isinstance(late.error, SessionExpired)
        assert await small.send("k", "read") == ["once", 6, 7, 8]


@virtually
async def test_an_expired_session_is_in_doubt_when_its_command_may_have_been_applied() -> None:
    """ "Expired" must not be read as "not applied": the first try may have landed before the session was forgotten."""
    async with cluster("a", sessions_remembered=1) as small:
        sending = session(small, 5)
        small.disturb("drop_reply", "request", ".cmd.")
        waiting = asyncio.create_task(write(sending, "maybe"))
        await until(lambda: len(small.log("k")) == 1)
        await answer(small, "a", numbered(small, "write", 1, of="9-00000001", entry="other"))

        with pytest.raises(InDoubt):
            await waiting
        assert await small.send("k", "read") == ["maybe", "other"]


@pytest.mark.parametrize("text", ["", "x", "1", "1-", "-1-00000000", "1-0000000G", "1" * 20 + "-00000000"])
def test_a_malformed_session_is_invalid_input(text: str) -> None:
    with pytest.raises(InvalidInput):
        opened_at(text)


@virtually
async def test_a_session_has_a_bounded_number_of_commands_on_their_way() -> None:
    """Actors keep as many replies: more in flight, and a repeated one could find its reply gone."""
    async with cluster("a") as small:
        sending = session(small)
        small.nodes["a"].cut()
        before = len(small.messages)
        calls = [asyncio.create_task(write(sending, n)) for n in range(3 * IN_FLIGHT)]
        await asyncio.sleep(0.001)

        sent = [subject for kind, subject in small.messages[before:] if kind == "request" and ".cmd." in subject]
        assert len(sent) == IN_FLIGHT
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


# -- queries -----------------------------------------------------------------------------------------------------------
@virtually
async def test_a_query_of_a_session_sees_every_command_before_it() -> None:
    """Read your own writes, although none of them has been answered yet."""
    async with cluster("a", "b", latency=lambda: 0.002) as small:
        sending = session(small)

        writes = [asyncio.create_task(write(sending, n)) for n in range(5)]
        await asyncio.sleep(0)
        seen = await sending.query(KEY, "read")
        await asyncio.gather(*writes)

        assert seen == [0, 1, 2, 3, 4]


@virtually
async def test_a_linearizable_query_sees_what_another_owner_acknowledged() -> None:
    """The old owner has not heard of the fail-over and still holds its lease: its log read tells it."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry=1)
        zombie = small.nodes["a"]
        await deaf_to_the_map(small, "a")
        await small.fail_over("b")
        await small.served_by("b")
        await small.send("k", "write", entry=2)

        assert zombie.node.host.serves(UNIT)
        stale = await (await small.post("a", small.command("k", "read", "q-1")))
        fresh = await (await small.post("a", linearizable(small.command("k", "read", "q-2"))))

        assert stale.value == [1]
        assert fresh.value == [1, 2]


async def deaf_to_the_map(small: SmallCluster, name: str) -> None:
    """Its watch of the map has stopped without its knowing; all else works."""
    await small.nodes[name].node._directory.stop()


def linearizable(sent: Command) -> Command:
    return replace(sent, linearizable=True)


@virtually
async def test_a_linearizable_query_waits_rather_than_answer_without_the_log() -> None:
    """When NATS does not answer there is nothing to say; the caller gets an error at its deadline."""
    async with cluster("a") as small:
        await small.send("k", "write", entry=1)
        small.disturb("drop_reply", "read", ".", times=1_000)

        with pytest.raises(FerryError):
            await small.router.send_message(KEY, "read", linearizable=True, timeout_s=2.0)


@virtually
async def test_snapshots_keep_sessions() -> None:
    """The log is rolled up again and again: a session's order and replies survive it."""
    async with cluster("a", snapshot_every=2) as small:
        sending = session(small)
        for n in range(7):
            await write(sending, n)

        assert Kind.SNAPSHOT.value in small.kinds("k")
        await small.nodes["a"].node.host.refresh(UNIT)
        small.nodes["a"].node.host.units[UNIT].actors.clear()
        assert await write(sending, 7) == 8


# -- found by review -------------------------------------------------------------------------------------------------
@virtually
async def test_a_command_asked_as_a_query_of_a_session_is_refused_and_changes_nothing() -> None:
    """Applied without a number, it would set the session back to the start."""
    async with cluster("a", "b", snapshot_every=2) as small:
        sending = session(small)
        await write(sending, 1)

        with pytest.raises(InvalidInput, match="send_message"):
            await sending.query(KEY, "write", {"entry": "slipped in"})

        assert await write(sending, 2) == 2
        assert await write(sending, 3) == 3
        assert await sending.query(KEY, "read") == [1, 2, 3]


@virtually
async def test_no_more_than_the_window_is_on_its_way_while_one_reply_is_lost() -> None:
    """The reply to a command that somebody still waits for must not be forgotten."""
    async with cluster("a", latency=lambda: 0.001) as small:
        sending = session(small)
        await write(sending, 0)
        small.disturb("drop_reply", "request", ".cmd.")

        replies = await asyncio.gather(*(write(sending, n, timeout=60) for n in range(1, 4 * IN_FLIGHT)))

        assert small.disturbed()
        assert replies == list(range(2, 4 * IN_FLIGHT + 1))


@virtually
@pytest.mark.parametrize("timeout", [0, -1.0, float("inf"), float("nan")])
async def test_a_timeout_that_is_none_takes_no_number(timeout: float) -> None:
    async with cluster("a") as small:
        sending = session(small)
        with pytest.raises(InvalidInput):
            await write(sending, 1, timeout=timeout)

        assert await write(sending, 2) == 1


@virtually
async def test_a_query_of_a_forgotten_session_says_so() -> None:
    """It would wait for commands that are long done."""
    async with cluster("a", sessions_remembered=1) as small:
        old, new = session(small, 5), session(small, 6)
        await write(old, 1)
        await write(new, 2)

        with pytest.raises(SessionExpired) as caught:
            await old.query(KEY, "read")
        assert caught.value.floor == 5


@virtually
async def test_the_next_session_is_opened_above_the_floor_of_an_expired_one() -> None:
    """A sender whose clock was ahead must not keep all others out for as long as it was ahead."""
    async with cluster("a", sessions_remembered=1) as small:
        floors: list[int] = []
        ahead = Session(new_session_id(9_000_000), lambda: small.router)
        await write(ahead, 1)
        await write(Session(new_session_id(9_000_001), lambda: small.router), 2)
        late = Session(new_session_id(50), lambda: small.router, on_expired=floors.append)
        with pytest.raises(SessionExpired):
            await write(late, 3)

        assert await write(Session(new_session_id(floors[0] + 2), lambda: small.router), 4) == 3


@virtually
async def test_what_waits_behind_a_broken_order_ends_at_once() -> None:
    """It was never sent; waiting for its turn would last until its own deadline."""
    async with cluster("a") as small:
        sending = session(small)
        small.nodes["a"].cut()
        calls = [asyncio.create_task(write(sending, n, timeout=1.0 if n == 0 else 500.0)) for n in range(IN_FLIGHT + 3)]
        with pytest.raises(FerryError):
            await calls[0]

        with pytest.raises(NotApplicable):
            async with asyncio.timeout(1.0):
                await calls[IN_FLIGHT]
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


@virtually
async def test_a_refusal_after_an_unknown_try_is_in_doubt() -> None:
    """Applied, the reply lost, and the next owner's code lacks the command: the caller must not hear "unknown"."""

    class Ledger2(Ledger):
        actor_type = "ledger"
        handlers = {name: handler for name, handler in Ledger.handlers.items() if name != "touch"}  # noqa: RUF012

    async with cluster("a") as small:
        await small.add("b", classes=(Ledger2,))
        small.disturb("drop_reply", "append", ".ev.")
        small.disturb("drop_request", "publish", "_INBOX", times=1)
        asking = asyncio.create_task(small.send("k", "write", entry=1))
        await until(lambda: len(small.log("k")) == 1)
        await asking
        small.disturb("drop_reply", "request", ".cmd.")
        doubtful = asyncio.create_task(small.send("k", "touch"))
        await until(lambda: len(small.log("k")) == 2)
        small.nodes["a"].cut()
        await small.fail_over("b")

        with pytest.raises(InDoubt):
            await doubtful
