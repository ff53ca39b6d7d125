"""What only the NATS in memory can do: delays and faults on demand."""

from __future__ import annotations

import asyncio

import pytest

from routing.errors import InDoubt, Timeout, Unavailable
from routing.link import Entry, Message, StreamSpec
from runtime.testing import Fault, Kind, MemoryNats

WAIT_S = 10.0
JOURNAL = StreamSpec(name="journal", subjects=("ev.>",))


async def take(queue: asyncio.Queue[Message], count: int) -> list[bytes]:
    async with asyncio.timeout(WAIT_S):
        return [(await queue.get()).payload for _ in range(count)]


async def test_delays_never_let_messages_overtake_each_other() -> None:
    """Property: order holds even when a later message is given a shorter delay."""
    delays = iter([0.0, 0.0, *[0.02, 0.0, 0.01, 0.0] * 10])
    nats = MemoryNats(latency=lambda: next(delays))
    alice, bob = nats.link("alice"), nats.link("bob")
    heard: asyncio.Queue[Message] = asyncio.Queue()
    await bob.subscribe("count", heard.put_nowait)

    for n in range(10):
        await alice.publish("count", b"%d" % n)

    assert await take(heard, 10) == [b"%d" % n for n in range(10)]


@pytest.mark.parametrize(("fault", "stored"), [("drop_request", False), ("drop_reply", True)])
async def test_a_lost_append_is_in_doubt_whichever_way_it_was_lost(fault: Fault, stored: bool) -> None:
    """Property: the sender cannot tell a lost request from a lost answer."""
    faults: dict[Kind, Fault] = {"append": fault}
    nats = MemoryNats(on_message=lambda kind, subject: faults.get(kind, "deliver"))
    link = nats.link("alice")
    await link.ensure_stream(JOURNAL, timeout_s=WAIT_S)

    with pytest.raises(InDoubt):
        await link.append("ev.a", b"1", expected=0, timeout_s=0.02)

    assert (await link.last("journal", "ev.a", timeout_s=WAIT_S) is not None) == stored


@pytest.mark.parametrize(("fault", "arrived"), [("drop_request", 0), ("drop_reply", 1)])
async def test_a_lost_request_times_out_whichever_way_it_was_lost(fault: Fault, arrived: int) -> None:
    """Property: a request may have been served although its sender saw a Timeout."""
    faults: dict[Kind, Fault] = {"request": fault}
    nats = MemoryNats(on_message=lambda kind, subject: faults.get(kind, "deliver"))
    alice, bob = nats.link("alice"), nats.link("bob")
    heard: asyncio.Queue[Message] = asyncio.Queue()
    tasks = set()

    def answer(message: Message) -> None:
        heard.put_nowait(message)
        tasks.add(asyncio.create_task(bob.publish(message.reply, b"")))

    await bob.subscribe("ask", answer)

    with pytest.raises(Timeout):
        await alice.request("ask", b"", timeout_s=0.02)

    assert heard.qsize() == arrived


async def test_a_late_append_lands_after_its_sender_is_gone() -> None:
    """Property: "late" outlives timeout and link, as a stray packet does."""
    nats = MemoryNats(on_message=lambda kind, subject: "late" if kind == "append" else "deliver", late_s=0.05)
    alice, bob = nats.link("alice"), nats.link("bob")
    await alice.ensure_stream(JOURNAL, timeout_s=WAIT_S)
    seen: asyncio.Queue[Entry] = asyncio.Queue()
    await bob.watch("journal", "ev.>", seen.put_nowait, timeout_s=WAIT_S)

    with pytest.raises(InDoubt):
        await alice.append("ev.a", b"stray", expected=0, timeout_s=0.01)
    alice.disconnect()
    assert nats.entries("journal") == []

    async with asyncio.timeout(WAIT_S):
        assert (await seen.get()).payload == b"stray"


async def test_a_disconnected_link_is_no_listener() -> None:
    """Property: the server knows at once that a link is gone, and keeps nothing for it."""
    nats = MemoryNats()
    alice, bob = nats.link("alice"), nats.link("bob")
    heard: asyncio.Queue[Message] = asyncio.Queue()
    await bob.subscribe("news", heard.put_nowait)

    bob.disconnect()
    with pytest.raises(Unavailable):
        await alice.request("news", b"missed", timeout_s=WAIT_S)
    bob.reconnect()
    await alice.publish("news", b"heard")

    assert await take(heard, 1) == [b"heard"]


async def test_a_cut_loses_what_is_on_the_wire_and_keeps_what_arrived() -> None:
    """Property: after a cut and a healing, only messages sent since arrive, in order."""
    nats = MemoryNats(latency=lambda: 0.01)
    alice, bob = nats.link("alice"), nats.link("bob")
    heard: asyncio.Queue[Message] = asyncio.Queue()
    await bob.subscribe("news", heard.put_nowait)
    await alice.publish("news", b"lost")

    alice.disconnect()
    alice.reconnect()
    await alice.publish("news", b"kept")

    assert await take(heard, 1) == [b"kept"]
