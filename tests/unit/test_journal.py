"""The journal: every append on what was read, recovery from the last snapshot on, and answers that outlive memory."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from routing.address import ActorId
from routing.birth import found_or_join
from routing.errors import (
    FerryError,
    InDoubt,
    PayloadTooLarge,
    Rejected,
    StateNotPortable,
    Unavailable,
    WrongSequence,
    to_wire,
)
from routing.jsonlike import MAX_NESTING
from routing.settings import Settings
from runtime.codec import pack
from runtime.journal import History, Journal, Kind, Record, decode_record, encode_record
from runtime.testing import Fault, MemoryLink, MemoryNats
from runtime.testing import Kind as MessageKind
from tests.unit.cluster import cluster
from tests.unit.virtual_time import until, virtually

SETTINGS = Settings(shards=4)
ACTOR = ActorId("jar", "k")
OTHER = ActorId("jar", "other")
MEMORY = {"commands": [["m", 1]], "sessions": {"floor": 0, "known": [["5-00000000", 1, [[1, "one"]]]]}}
FRAME = pack(b'{"coins":[1]}', schema=1, max_bytes=1000, actor=ACTOR)
TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
TRAILS = st.lists(st.integers(1, 2**53), max_size=4).map(tuple)
EVENTS = st.lists(st.tuples(TEXT, st.dictionaries(TEXT, JSON, max_size=3)).map(list), max_size=3)
COMMON: dict[str, Any] = {"epoch": st.integers(1, 2**53), "incarnation": TEXT, "trail": TRAILS}
IN_SESSIONS: dict[str, Any] = {"session": st.just("5-00000000"), "number": st.integers(1, 2**53)}
ANSWERED: dict[str, Any] = {"message_id": TEXT.filter(bool), **COMMON}
APPLIED: dict[str, Any] = {"kind": st.just(Kind.COMMAND), "events": EVENTS, "reply": JSON, **ANSWERED}
REFUSED: dict[str, Any] = {"kind": st.just(Kind.REJECTION), "error": st.just(to_wire(Rejected("no"))), **ANSWERED}
RECORDS = st.one_of(
    st.builds(Record, **APPLIED),
    st.builds(Record, **APPLIED, **IN_SESSIONS),
    st.builds(Record, **REFUSED),
    st.builds(Record, **REFUSED, **IN_SESSIONS),
    st.builds(Record, kind=st.just(Kind.CLAIM), **COMMON),
    st.builds(Record, kind=st.just(Kind.SNAPSHOT), frame=st.just(FRAME), memory=st.just(MEMORY), **COMMON),
    st.builds(Record, kind=st.just(Kind.SNAPSHOT), pieces=TRAILS.filter(bool), **COMMON),
    st.builds(Record, kind=st.just(Kind.PIECE), piece=st.binary(min_size=1), **COMMON),
)


def applied(number: int, trail: tuple[int, ...] = (), **changes: Any) -> Record:
    record = Record(kind=Kind.COMMAND, epoch=1, incarnation="a-1", trail=trail, message_id=f"m-{number}",
                    events=[["dropped", {"coin": number}]], reply=number)  # fmt: skip
    return replace(record, **changes)


def snapshot(**changes: Any) -> Record:
    return replace(Record(kind=Kind.SNAPSHOT, epoch=1, incarnation="a-1", frame=FRAME, memory=MEMORY), **changes)


class Store:
    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.reads = 0
        self.stale = False
        self.on_read: Any = None
        self.nats = MemoryNats(on_message=self._on_message, late_s=6.0)

    def _on_message(self, kind: MessageKind, subject: str) -> Fault:
        if kind == "read":
            self.reads += 1
        if kind == "read" and self.stale:
            return "stale"
        return self.faults.pop(0) if kind == "append" and ".ev." in subject and self.faults else "deliver"

    async def journal(self, link: MemoryLink | None = None) -> Journal:
        link = link or self.nats.link("node")
        await found_or_join(link, SETTINGS)
        return Journal(link, SETTINGS.subjects, shards_total=SETTINGS.shards, append_timeout_s=2.0)

    async def filled(self, count: int) -> tuple[Journal, History]:
        journal = await self.journal()
        trail: tuple[int, ...] = ()
        version = 0
        for number in range(count):
            version = await journal.append(ACTOR, applied(number, trail), after=version)
            trail = (*trail, version)
        return journal, await journal.load(ACTOR)


@given(RECORDS)
def test_a_record_is_read_as_it_was_written(record: Record) -> None:
    """Decoding is the inverse of encoding, for every kind."""
    assert decode_record(encode_record(record)) == record


@given(st.binary(max_size=60))
def test_garbage_in_the_log_is_not_portable(payload: bytes) -> None:
    """And nothing else: it is what an operator sees about a damaged log."""
    with pytest.raises(StateNotPortable):
        decode_record(payload)


@given(st.data(), RECORDS, JSON, st.booleans())
def test_a_record_with_one_damaged_field_is_not_portable_or_well_formed(
    data: st.DataObject, record: Record, value: Any, drop: bool
) -> None:
    """What passes has the types that replaying relies on."""
    header, _, body = encode_record(record).partition(b"\n")
    document = orjson.loads(header)
    field = data.draw(st.sampled_from(sorted(document)))
    document[field] = value
    if drop:
        del document[field]
    try:
        read = decode_record(orjson.dumps(document) + b"\n" + body)
    except StateNotPortable:
        return

    assert type(read.epoch) is int
    assert all(type(sequence) is int for sequence in read.trail)
    assert isinstance(read.message_id, str)
    assert isinstance(read.incarnation, str)
    assert isinstance(read.session, str)
    assert type(read.number) is int
    assert bool(read.session) == (read.number > 0)
    assert read.error is None or isinstance(read.error, dict)
    assert all(len(event) == 2 and isinstance(event[0], str) and isinstance(event[1], dict) for event in read.events)


@pytest.mark.parametrize(
    "damage", [(b'"session"', b'"\xf3ession"'), (b'"session"', b'"sessiom"'), (b'"number"', b'"n"')]
)
def test_an_entry_that_has_lost_its_session_is_not_portable(damage: tuple[bytes, bytes]) -> None:
    """Read as a plain command's it would be applied again when its sender asks for it once more."""
    entry = encode_record(replace(applied(7), session="5-00000000", number=7))

    with pytest.raises(StateNotPortable):
        decode_record(entry.replace(*damage))


def test_what_an_entry_carries_can_go_out_again() -> None:
    """Values nested as deep as anybody may send are read; deeper ones would make a snapshot that nobody reads."""
    deepest: Any = 0
    for _ in range(MAX_NESTING - 1):
        deepest = [deepest]
    entry = applied(7, events=[["dropped", {"coin": deepest}]], reply=[deepest])

    assert decode_record(encode_record(entry)) == entry
    for deeper in (replace(entry, reply=[[deepest]]), replace(entry, events=[["dropped", {"coin": [deepest]}]])):
        with pytest.raises(StateNotPortable, match="nested"):
            decode_record(encode_record(deeper))


@virtually
async def test_an_actor_without_a_log_has_no_history() -> None:
    """Version 0."""
    journal = await Store().journal()

    assert await journal.tail(ACTOR) is None
    assert await journal.load(ACTOR) == History(version=0, epoch=0, records=())


@virtually
async def test_a_history_is_every_record_in_order() -> None:
    """With the sequence of each, and the version and epoch of the last."""
    journal, history = await Store().filled(5)
    await journal.append(OTHER, applied(99), after=0)

    assert [record.reply for _, record in history.records] == [0, 1, 2, 3, 4]
    assert history.version == history.records[-1][0]
    assert history.epoch == 1
    assert (await journal.load(ACTOR)) == history


@virtually
async def test_the_trail_is_what_the_next_record_names() -> None:
    """All sequences since the snapshot: following it, recovery needs no consumer."""
    journal, history = await Store().filled(3)
    sequences = tuple(sequence for sequence, _ in history.records)

    assert history.trail == sequences
    version = await journal.append(ACTOR, applied(3, history.trail), after=history.version)
    assert (await journal.load(ACTOR)).trail == (*sequences, version)


@virtually
async def test_recovery_costs_as_many_reads_as_there_are_records() -> None:
    """However much else is in the stream."""
    store = Store()
    journal, history = await store.filled(5)
    for number in range(200):
        await journal.append(ActorId("jar", f"n{number}"), applied(number), after=0)
    store.reads = 0

    assert await journal.load(ACTOR) == history

    assert store.reads <= 6


@virtually
async def test_an_append_after_another_version_is_refused() -> None:
    """Somebody wrote: read, then decide again. Neither too old nor too new a version passes."""
    journal, history = await Store().filled(2)

    for after in (0, history.records[0][0], history.version + 1):
        with pytest.raises(WrongSequence):
            await journal.append(ACTOR, applied(9), after=after)

    assert await journal.load(ACTOR) == history


@virtually
async def test_of_two_appends_after_one_version_exactly_one_lands() -> None:
    """Two nodes that both believe they own the actor."""
    store = Store()
    one, history = await store.filled(1)
    other = await store.journal(store.nats.link("other"))

    results = await asyncio.gather(
        one.append(ACTOR, applied(1, history.trail), after=history.version),
        other.append(ACTOR, applied(2, history.trail), after=history.version),
        return_exceptions=True,
    )

    assert sorted(type(result).__name__ for result in results) == ["WrongSequence", "int"]


@virtually
async def test_a_snapshot_rolls_the_log_up() -> None:
    """It replaces all before it, of this actor alone, and the trail begins anew."""
    store = Store()
    journal, history = await store.filled(4)
    await journal.append(OTHER, applied(7), after=0)

    version = await journal.append(ACTOR, snapshot(), after=history.version)
    after = await journal.load(ACTOR)
    next_version = await journal.append(ACTOR, applied(5, after.trail), after=version)

    assert [record.kind for _, record in after.records] == [Kind.SNAPSHOT]
    assert [record.kind for _, record in (await journal.load(ACTOR)).records] == [Kind.SNAPSHOT, Kind.COMMAND]
    assert (await journal.load(ACTOR)).version == next_version
    assert (await journal.load(OTHER)).records[0][1].reply == 7


@virtually
async def test_a_refused_snapshot_removes_nothing() -> None:
    """A zombie's roll-up after somebody else's append must not erase it."""
    journal, history = await Store().filled(3)

    with pytest.raises(WrongSequence):
        await journal.append(ACTOR, snapshot(), after=history.records[1][0])

    assert await journal.load(ACTOR) == history


@virtually
async def test_a_load_during_a_snapshot_sees_all_or_the_snapshot() -> None:
    """The records it was about to read are rolled up under its hands: it begins again, never with a hole."""
    for delay_s in (0.0, 0.005, 0.015, 0.025, 0.035, 0.045):
        latency_s = 0.0
        nats = MemoryNats(latency=lambda: latency_s)  # noqa: B023
        store = Store()
        store.nats = nats
        writer, history = await store.filled(5)
        reader = await store.journal(nats.link("reader"))
        latency_s = 0.01

        loading = asyncio.create_task(reader.load(ACTOR))
        await asyncio.sleep(delay_s)
        version = await writer.append(ACTOR, snapshot(), after=history.version)
        seen = await loading

        assert seen == history or (seen.version == version and seen.records[0][1].kind is Kind.SNAPSHOT)


@virtually
async def test_a_load_while_snapshots_and_commands_go_on_is_always_whole() -> None:
    """Whatever the timing: the records read are contiguous from a snapshot, or from the first command."""
    latencies = iter([n % 7 / 1000 for n in range(1, 100_000)])
    nats = MemoryNats(latency=lambda: next(latencies))
    store = Store()
    store.nats = nats
    writer = await store.journal(nats.link("writer"))
    reader = await store.journal(nats.link("reader"))
    landed: list[int] = []

    async def write() -> None:
        trail: tuple[int, ...] = ()
        version = 0
        for number in range(60):
            record = snapshot() if number % 5 == 4 else applied(number, trail)
            version = await writer.append(ACTOR, record, after=version)
            trail = (version,) if record.kind is Kind.SNAPSHOT else (*trail, version)
            landed.append(version)

    writing = asyncio.create_task(write())
    loads = 0
    while not writing.done():
        try:
            history = await reader.load(ACTOR)
        except Unavailable:  # it changed too often while being read: the bound on retries, and no hole either
            continue
        loads += 1
        sequences = [sequence for sequence, _ in history.records]
        if sequences:
            assert history.version == sequences[-1]
            await until(lambda: history.version in landed)  # noqa: B023
            first, last = landed.index(sequences[0]), landed.index(sequences[-1])
            assert landed[first : last + 1] == sequences
            assert first == 0 or history.records[0][1].kind is Kind.SNAPSHOT
    await writing

    assert loads > 3


@virtually
async def test_an_append_of_unknown_fate_is_in_doubt() -> None:
    """Lost, or landed unnoticed, or landing later: the sender cannot tell."""
    for fault in ("drop_request", "drop_reply", "late"):
        store = Store()
        journal, history = await store.filled(1)
        store.faults = [fault]

        with pytest.raises(InDoubt):
            await journal.append(ACTOR, applied(1, history.trail), after=history.version)


@virtually
async def test_a_late_append_is_fenced_by_a_claim() -> None:
    """What is still under way when somebody claims the actor can never land."""
    store = Store()
    journal, history = await store.filled(1)
    store.faults = ["late"]
    with pytest.raises(InDoubt):
        await journal.append(ACTOR, applied(1, history.trail), after=history.version)

    claim = Record(kind=Kind.CLAIM, epoch=2, incarnation="b-1", trail=history.trail)
    await journal.append(ACTOR, claim, after=history.version)
    await asyncio.sleep(10)

    kinds = [record.kind for _, record in (await journal.load(ACTOR)).records]
    assert kinds == [Kind.COMMAND, Kind.CLAIM]


@virtually
async def test_without_a_link_nothing_was_stored() -> None:
    """Unavailable is a promise: it may be decided again without reading."""
    store = Store()
    link = store.nats.link("node")
    journal = await store.journal(link)
    link.disconnect()

    with pytest.raises(Unavailable):
        await journal.append(ACTOR, applied(1), after=0)
    with pytest.raises(Unavailable):
        await journal.load(ACTOR)


@virtually
async def test_a_record_over_the_servers_limit_is_refused() -> None:
    """Nothing is stored, and the reason is clear."""
    store = Store()
    store.nats = MemoryNats(max_payload=2000)
    journal = await store.journal()

    with pytest.raises(PayloadTooLarge):
        await journal.append(ACTOR, applied(1, reply="x" * 3000), after=0)

    assert await journal.tail(ACTOR) is None


@virtually
async def test_a_damaged_log_is_not_portable_and_not_an_empty_one() -> None:
    """Somebody wrote into the subject by hand: never mistaken for a fresh actor."""
    store = Store()
    journal, _ = await store.filled(2)
    subject = next(
        entry.subject for stream, _ in SETTINGS.subjects.log_streams() for entry in store.nats.entries(stream)
    )
    await store.nats.link("hand").append(subject, b"garbage", expected=None, timeout_s=1)

    with pytest.raises(StateNotPortable):
        await journal.load(ACTOR)


@virtually
@pytest.mark.parametrize("other", [applied(7), applied(1, (1, 9)), snapshot(), None])
async def test_what_does_not_fit_into_the_log_is_an_error_and_not_another_state(other: Record | None) -> None:
    """A replica that holds another message at a sequence, or another actor's: the records name one another."""
    store = Store()
    journal, history = await store.filled(3)
    place = history.records[1][0]
    [stream] = [name for name, _ in SETTINGS.subjects.log_streams() if store.nats.entries(name)]
    entry = store.nats.stream(stream).entries[place]
    if other is None:
        entry.subject += "x"
    else:
        entry.payload = encode_record(other)

    with pytest.raises(StateNotPortable, match="is another"):
        await journal.load(ACTOR)
    with pytest.raises(StateNotPortable, match="is another"):
        await journal.after(ACTOR, history.records[0][0], history.records[-1])


@virtually
async def test_a_replica_that_lags_gives_the_same_history() -> None:
    """What a snapshot has just removed, and another replica still has, is the log as it was when its end was read."""
    store = Store()
    journal, history = await store.filled(3)
    tail = await journal.tail(ACTOR)
    assert tail is not None
    await journal.append(ACTOR, snapshot(), after=history.version)

    assert await journal.after(ACTOR, history.records[0][0], tail) is None
    store.stale = True
    found = await journal.after(ACTOR, history.records[0][0], tail)

    assert found is not None
    assert found.records == history.records[1:]


@virtually
async def test_a_trail_into_nothing_is_an_error_and_not_a_shorter_history() -> None:
    """A record it names is gone without a snapshot in its place: state would be silently incomplete."""
    store = Store()
    journal = await store.journal()
    await journal.append(OTHER, applied(1), after=0)
    await journal.append(ACTOR, applied(2, (777,)), after=0)

    with pytest.raises(FerryError):
        await journal.load(ACTOR)


# What follows is the journal seen through a node.


@virtually
async def test_a_rejection_is_logged_and_answered_from_the_log_after_re_activation() -> None:
    """The ledger was reopened meanwhile: the same id is still a "no" [T11], also on another node."""
    async with cluster("a", "b") as small:
        await small.send("k", "close")
        with pytest.raises(Rejected):
            await small.send("k", "write", "m-no", entry=1)
        await small.send("k", "reopen")
        assert small.kinds("k") == ["command", "rejection", "command"]

        await small.move("m", "b")
        with pytest.raises(Rejected):
            await small.send("k", "write", "m-no", entry=1)
        await small.restart("b")
        await small.served_by("b")

        with pytest.raises(Rejected):
            await small.send("k", "write", "m-no", entry=1)
        assert await small.send("k", "read") == []
        assert await small.send("k", "write", "m-yes", entry=1) == 1


@virtually
async def test_a_failed_handler_is_logged_and_stays_failed() -> None:
    """What it had emitted is not applied, now or later."""
    async with cluster("a") as small:
        for _ in range(2):
            with pytest.raises(FerryError, match="mistake"):
                await small.send("k", "write_and_fail", "m-1", entry=1)
        assert await small.send("k", "read") == []
        assert small.kinds("k") == ["rejection"]


@virtually
async def test_the_log_is_rolled_up_every_so_many_commands() -> None:
    """So activation reads a bounded number of records; nothing is lost by it."""
    async with cluster("a", snapshot_every=4) as small:
        for number in range(21):
            await small.send("k", "write", f"m-{number}", entry=number)
            assert len(small.log("k")) <= 6

        await small.restart("a", snapshot_every=4)
        await small.served_by("a")

        assert await small.send("k", "read") == list(range(21))
        assert "snapshot" in small.kinds("k")
