"""Snapshots that are larger than one message should be: stored in pieces, which a crash may cut off anywhere."""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any
from unittest import mock

import pytest

from routing.address import ActorId
from routing.birth import found_or_join
from routing.errors import StateNotPortable, Unavailable, WrongSequence
from routing.link import Entry
from routing.settings import Settings
from runtime.codec import pack, unpack
from runtime.journal import PIECES_AT_ONCE, History, Journal, Kind, Record, decode_record, encode_record
from runtime.testing import Fault, MemoryNats
from tests.unit.cluster import SmallCluster, cluster
from tests.unit.virtual_time import until, virtually

PIECE_BYTES = 256
LOG = math.isqrt(20 * 500 // 4)  # how long a log at least has to be, for a state of twenty such entries
TEXT = [secrets.token_hex(250) for _ in range(20)]
ENTRIES = [*TEXT, *range(60)]


@contextlib.asynccontextmanager
async def large(*names: str, **settings: Any) -> AsyncIterator[SmallCluster]:
    """Node a has an actor whose log is nearly long enough for a snapshot in a hundred pieces."""
    async with cluster(*names, snapshot_every=LOG, snapshot_piece_bytes=PIECE_BYTES, **settings) as small:
        for entry in TEXT:
            await small.send("k", "write", entry=entry)
        yield small


async def write_on(small: SmallCluster) -> None:
    for entry in ENTRIES[len(TEXT) :]:
        await small.send("k", "write", entry=entry)


@contextlib.contextmanager
def second_piece(befall: Any) -> Iterator[list[Record]]:
    """Await `befall()` in place of the append of the second piece of all, and then append it."""
    append, pieces = Journal.append, []

    async def appending(self: Journal, actor: ActorId, record: Record, *, after: int) -> int:
        if record.kind is Kind.PIECE:
            pieces.append(record)
            if len(pieces) == 2:
                await befall()
        return await append(self, actor, record, after=after)

    with mock.patch.object(Journal, "append", appending):
        yield pieces
    assert len(pieces) >= 2


@virtually
async def test_a_large_state_is_rolled_up_in_pieces() -> None:
    """What they replace is removed; whoever is started anew puts them together."""
    async with large("a") as small:
        await write_on(small)
        await until(lambda: small.nodes["a"].node.host.counters["snapshots"] == 1)

        kinds = small.kinds("k")
        pieces = kinds.index("snapshot")
        assert kinds[:pieces] == ["piece"] * pieces
        assert pieces > PIECES_AT_ONCE
        assert set(kinds[pieces + 1 :]) == {"command"}

        await small.restart("a")
        await small.served_by("a")
        assert await small.send("k", "read") == ENTRIES


@virtually
async def test_the_log_stays_as_short_as_that_of_a_small_state() -> None:
    """Each snapshot removes the pieces of the one before, and every entry between them."""
    async with large("a") as small:
        for _ in range(4):
            await write_on(small)
        counters = small.nodes["a"].node.host.counters
        await until(lambda: counters["snapshots"] >= 3)

        assert small.kinds("k").count("snapshot") == 1
        assert small.kinds("k").count("command") <= 2 * LOG
        assert counters["snapshots_failed"] == 0


@virtually
async def test_a_piece_that_was_lost_ends_the_snapshot_and_nothing_else() -> None:
    """The log goes on behind the pieces that were stored, for this life of the node and for the next."""
    async with large("a", append_timeout_s=1.0) as small:

        async def lose() -> None:
            small.disturb("drop_request", "append", "=k")

        with second_piece(lose):
            await write_on(small)
        assert small.disturbed()
        assert await small.send("k", "read") == ENTRIES

        await small.restart("a")
        await small.served_by("a")
        assert await small.send("k", "read") == ENTRIES
        await until(lambda: small.kinds("k").count("snapshot") == 1)
        for entry in range(LOG + 1):
            await small.send("k", "write", entry=entry)
        await small.restart("a")
        await small.served_by("a")
        assert await small.send("k", "read") == [*ENTRIES, *range(LOG + 1)]


@virtually
async def test_a_node_that_dies_between_two_pieces_leaves_the_log_whole() -> None:
    """Half a snapshot is nothing: the next owner starts from what stands before it."""
    async with large("a", "b") as small:
        died = asyncio.Event()

        async def die() -> None:
            small.nodes["a"].cut()
            died.set()

        with second_piece(die):
            writing = asyncio.create_task(write_on(small))
            await died.wait()
            kinds = small.kinds("k")
            await small.fail_over("b")
            await writing

        assert kinds.count("piece") == 1
        assert "snapshot" not in kinds
        assert await small.send("k", "read") == ENTRIES


@virtually
async def test_a_deposed_owner_cannot_store_the_rest_of_its_pieces() -> None:
    """Each piece names what it follows; what the new owner has stored stays the end of the log."""
    async with large("a", "b") as small:
        stopped, goes_on = asyncio.Event(), asyncio.Event()
        ever: list[Entry] = []
        small.nats.on_append = ever.append

        async def stop() -> None:
            stopped.set()
            await goes_on.wait()

        with second_piece(stop) as pieces:
            writing = asyncio.create_task(write_on(small))
            await stopped.wait()
            await small.fail_over("b")
            await small.served_by("b")
            await small.send("k", "touch")
            goes_on.set()
            await writing

        by_a = small.nodes["a"].node.incarnation
        assert [piece.incarnation for piece in pieces].count(by_a) == 2
        stored = [decode_record(entry.payload) for entry in ever if entry.subject.endswith("=k")]
        assert [record.incarnation for record in stored if record.kind is Kind.PIECE].count(by_a) == 1
        assert await small.send("k", "read") == ENTRIES


@virtually
async def test_a_snapshot_in_pieces_gives_way_to_a_move() -> None:
    """Begun before the move it ends at the next piece; while the unit is locked none is begun."""
    async with large("a", "b") as small:
        requests = []

        async def lock() -> None:
            requests.append(await small.lock("m", "b"))
            unit = small.nodes["a"].node.host.units["shard.0"]
            await until(lambda: unit.ownership is not None and unit.ownership.move == "m")

        with second_piece(lock) as pieces:
            await write_on(small)
            assert len(pieces) == 2
            assert "snapshot" not in small.kinds("k")
            await small.steps(requests[0])

        assert await small.send("k", "read") == ENTRIES
        await small.send("k", "write", entry="there")
        await until(lambda: "snapshot" in small.kinds("k"))
        assert await small.send("k", "read") == [*ENTRIES, "there"]


@virtually
async def test_what_is_not_removed_harms_nobody() -> None:
    """A node that dies before it could remove what it has replaced, or is not answered."""
    async with large("a") as small:
        with mock.patch.object(Journal, "forget", side_effect=Unavailable("not now")):
            await write_on(small)
            await until(lambda: "snapshot" in small.kinds("k"))
        assert small.kinds("k")[0] == "command"

        await small.restart("a")
        await small.served_by("a")
        assert await small.send("k", "read") == ENTRIES
        for entry in range(2 * LOG):
            await small.send("k", "write", entry=entry)
        assert small.kinds("k")[0] == "piece"


# -- the journal alone -------------------------------------------------------------------------------------------------
ACTOR = ActorId("jar", "k")
STATE = b"0123456789" * 100
MEMORY = {"commands": [], "sessions": {"floor": 0, "known": []}}


def whole_of(state: bytes) -> bytes:
    frame = pack(state, schema=1, max_bytes=10_000, actor=ACTOR)
    return encode_record(Record(Kind.SNAPSHOT, 1, "a-1", frame=frame, memory=MEMORY))


async def store(journal: Journal, whole: bytes, *, after: int, count: int, actor: ActorId = ACTOR) -> tuple[int, ...]:
    """Store `whole` in `count` pieces; their sequences."""
    size, sequences = math.ceil(len(whole) / count), []
    for start in range(0, len(whole), size):
        after = await journal.append(
            actor, Record(Kind.PIECE, 1, "a-1", piece=whole[start : start + size]), after=after
        )
        sequences.append(after)
    return tuple(sequences)


async def journal_on(nats: MemoryNats) -> Journal:
    link, settings = nats.link("node"), Settings(shards=4)
    await found_or_join(link, settings)
    return Journal(link, settings.subjects, shards_total=settings.shards, append_timeout_s=2.0)


def state_of(history: History) -> bytes:
    frame = history.records[0][1].frame
    assert frame is not None
    return unpack(frame, max_bytes=10_000)


@virtually
async def test_pieces_that_are_removed_while_they_are_read_are_read_anew() -> None:
    """A newer snapshot has come meanwhile: it is what is loaded then."""
    reads = []

    def on_message(kind: str, subject: str) -> Fault:
        if kind == "read":
            reads.append(subject)
        return "deliver"

    nats = MemoryNats(on_message=on_message)
    journal = await journal_on(nats)
    pieces = await store(journal, whole_of(STATE), after=0, count=3)
    first = await journal.append(ACTOR, Record(Kind.SNAPSHOT, 1, "a-1", pieces=pieces), after=pieces[-1])
    newer = await store(journal, whole_of(STATE * 2), after=first, count=40)
    tail, asked = journal.tail, []

    async def once_late(actor: ActorId) -> tuple[int, Record] | None:
        asked.append(actor)
        if len(asked) > 1:
            return await tail(actor)
        await journal.append(ACTOR, Record(Kind.SNAPSHOT, 1, "a-1", pieces=newer), after=newer[-1])
        await journal.forget(ACTOR, before=newer[0])
        return first, Record(Kind.SNAPSHOT, 1, "a-1", pieces=pieces)

    with mock.patch.object(journal, "tail", once_late):
        history = await journal.load(ACTOR)

    assert len(asked) == 2
    assert history.version == newer[-1] + 1
    assert history.records[0][1] == decode_record(whole_of(STATE * 2))
    assert len(reads) > len(newer)


@virtually
async def test_pieces_of_another_actor_are_no_snapshot() -> None:
    """Nor is an entry that is no piece, or what they make together when one is missing: never another state."""
    journal = await journal_on(MemoryNats())
    shard_mate = next(
        other
        for other in (ActorId("jar", f"o{number}") for number in range(100))
        if journal._places[other][0] == journal._places[ACTOR][0]
    )
    theirs = await store(journal, whole_of(STATE), after=0, count=2, actor=shard_mate)
    ours = await store(journal, whole_of(STATE), after=0, count=3)
    version = await journal.append(ACTOR, Record(Kind.CLAIM, 1, "a-1"), after=ours[-1])

    for pieces in (theirs, (*ours[:2], version), ours[:2], ours[1:], (ours[1], ours[0], ours[2])):
        version = await journal.append(ACTOR, Record(Kind.SNAPSHOT, 1, "a-1", pieces=pieces), after=version)
        with pytest.raises(StateNotPortable):
            state_of(await journal.load(ACTOR))

    version = await journal.append(ACTOR, Record(Kind.SNAPSHOT, 1, "a-1", pieces=ours), after=version)
    assert (await journal.load(ACTOR)).records == ((version, decode_record(whole_of(STATE))),)
    with pytest.raises(WrongSequence):
        await store(journal, b"late", after=ours[-1], count=1)
