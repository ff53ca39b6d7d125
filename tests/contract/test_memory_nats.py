"""What only the NATS in memory can do: delays and faults on demand."""

from __future__ import annotations

import asyncio

import pytest

from routing.errors import InDoubt, Timeout, Unavailable, WrongSequence
from routing.link import Entry, Message, StreamSpec
from runtime.testing import Fault, Kind, MemoryNats
from tests.contract.waiting import WAIT_S, take

JOURNAL = StreamSpec(name="journal", subjects=("ev.>",))
BUCKET = StreamSpec(name="KV_map", subjects=("$KV.map.>",), keep=1)


async def test_delays_never_let_messages_overtake_each_other() -> None:
    """Property: order holds even when a later message is given a shorter delay."""
    delays = iter([0.0, 0.0, *[0.02, 0.0, 0.01, 0.0] * 10])
    nats = MemoryNats(latency=lambda: next(delays))
    alice, bob = nats.link("alice"), nats.link("bob")
    heard: asyncio.Queue[Message] = asyncio.Queue()
    await bob.subscribe("count", heard.put_nowait)

    for n in range(10):
        await alice.publish("count", b"%d" % n)

    assert [message.payload for message in await take(heard, 10)] == [b"%d" % n for n in range(10)]


async def test_a_watch_that_lags_never_hears_of_what_was_replaced() -> None:
    """Property: as a consumer of JetStream, it is sent what the stream holds when its turn comes."""
    nats = MemoryNats(watch_lag=lambda link: 0.02)
    alice, bob = nats.link("alice"), nats.link("bob")
    await alice.ensure_stream(BUCKET, timeout_s=WAIT_S)
    seen: asyncio.Queue[Entry] = asyncio.Queue()
    await bob.watch("KV_map", "$KV.map.>", seen.put_nowait, timeout_s=WAIT_S)

    writes = (alice.append(f"$KV.map.{key}", b"", expected=None, timeout_s=WAIT_S) for key in ("a", "a", "b"))
    await asyncio.gather(*writes)

    async with asyncio.timeout(WAIT_S):
        assert [(await seen.get()).sequence for _ in range(2)] == [2, 3]
    assert seen.empty()


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

    assert [message.payload for message in await take(heard, 1)] == [b"heard"]


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

    assert [message.payload for message in await take(heard, 1)] == [b"kept"]


async def test_a_doubled_message_is_heard_twice() -> None:
    """Property: "double" delivers a message again, later, whatever is sent in between."""
    nats = MemoryNats(on_message=lambda kind, subject: "double" if kind == "publish" else "deliver", late_s=0.02)
    alice, bob = nats.link("alice"), nats.link("bob")
    heard: asyncio.Queue[Message] = asyncio.Queue()
    await bob.subscribe("news", heard.put_nowait)

    await alice.publish("news", b"1")

    assert [message.payload for message in await take(heard, 2)] == [b"1", b"1"]


async def test_a_stale_read_is_answered_from_before_the_latest_entry() -> None:
    """Property: a deposed leader lacks what came after it; the stream itself has it."""
    fates: dict[Kind, Fault] = {"read": "stale"}
    nats = MemoryNats(on_message=lambda kind, subject: fates.get(kind, "deliver"))
    link = nats.link("alice")
    await link.ensure_stream(JOURNAL, timeout_s=WAIT_S)
    for payload in (b"1", b"2"):
        await link.append("ev.a", payload, expected=None, timeout_s=WAIT_S)

    stale = await link.last("journal", "ev.a", timeout_s=WAIT_S)
    fates.clear()
    fresh = await link.last("journal", "ev.a", timeout_s=WAIT_S)

    assert stale is not None
    assert fresh is not None
    assert (stale.payload, fresh.payload) == (b"1", b"2")


async def test_a_stale_read_by_sequence_still_has_what_was_removed() -> None:
    """Property: a replica that lags has not removed it yet; what never was is None there as well."""
    fates: dict[Kind, Fault] = {}
    nats = MemoryNats(on_message=lambda kind, subject: fates.get(kind, "deliver"))
    link = nats.link("alice")
    await link.ensure_stream(JOURNAL, timeout_s=WAIT_S)
    first = await link.append("ev.a", b"1", expected=0, timeout_s=WAIT_S)
    await link.append("ev.a", b"all", expected=first, timeout_s=WAIT_S, rollup=True)

    assert await link.read("journal", [first], timeout_s=WAIT_S) == [None]
    fates["read"] = "stale"
    assert await link.read("journal", [first, 99], timeout_s=WAIT_S) == [Entry(first, "ev.a", b"1"), None]


async def test_a_partition_is_noticed_by_nobody_until_it_heals() -> None:
    """Property: verbs time out instead of failing, nothing is heard, and a reconnect brings all of it back."""
    nats = MemoryNats()
    alice, bob = nats.link("alice"), nats.link("bob")
    heard: asyncio.Queue[Message] = asyncio.Queue()
    await bob.subscribe("news", heard.put_nowait)
    await alice.ensure_stream(JOURNAL, timeout_s=WAIT_S)

    bob.partition()
    assert bob.connected
    with pytest.raises(InDoubt):
        await bob.append("ev.a", b"1", expected=0, timeout_s=0.02)
    await alice.publish("news", b"missed")
    await alice.last("journal", "ev.a", timeout_s=WAIT_S)  # by now the news has reached the server
    bob.reconnect()
    await alice.publish("news", b"heard")

    assert [message.payload for message in await take(heard, 1)] == [b"heard"]
    assert nats.entries("journal") == []


async def test_a_truncated_stream_gives_its_sequences_out_anew() -> None:
    """Property: what a server lost with its disk's tail is gone, and nobody is told."""
    nats = MemoryNats()
    link = nats.link("alice")
    await link.ensure_stream(JOURNAL, timeout_s=WAIT_S)
    for payload in (b"1", b"2", b"3"):
        await link.append("ev.a", payload, expected=None, timeout_s=WAIT_S)

    lost = nats.truncate("journal", 1)
    anew = await link.append("ev.a", b"other", expected=1, timeout_s=WAIT_S)

    assert [entry.payload for entry in lost] == [b"2", b"3"]
    assert anew == 2
    assert [entry.payload for entry in nats.entries("journal")] == [b"1", b"other"]


async def test_every_append_that_landed_is_told_although_a_roll_up_removes_it() -> None:
    """Property: an observer of appends has the whole history; refused ones are no part of it."""
    stored: list[Entry] = []
    nats = MemoryNats(on_append=stored.append)
    link = nats.link("alice")
    await link.ensure_stream(JOURNAL, timeout_s=WAIT_S)
    await link.append("ev.a", b"1", expected=0, timeout_s=WAIT_S)
    with pytest.raises(WrongSequence):
        await link.append("ev.a", b"refused", expected=0, timeout_s=WAIT_S)
    await link.append("ev.a", b"2", expected=1, timeout_s=WAIT_S, rollup=True)

    assert [entry.payload for entry in nats.entries("journal")] == [b"2"]
    assert [(entry.sequence, entry.payload) for entry in stored] == [(1, b"1"), (2, b"2")]
