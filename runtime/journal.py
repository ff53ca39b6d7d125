"""The journal: one subject per actor, one message per command. The log is the truth.

Each message names the sequences of all messages since the actor's latest snapshot (`trail`), and a snapshot rolls
the subject up. So recovery is one "last message of the subject" read and, at once, the reads of the sequences it
names, from any replica: its cost does not depend on how much else is in the stream, as replaying by consumer does.

    command     events, reply, command's id      applied
    rejection   error, command's id              decided "no"; logged, or a late duplicate would apply after a "no"
    claim       nothing                          "incarnation i owns this actor at epoch e": fences older owners
    snapshot    state and memory of commands     replaces all before it
    piece       a part of a snapshot             nothing: a snapshot that names pieces replaces all before them

A snapshot that is larger than a message should be is stored in pieces, each an append like any other, so whoever does
not own the actor any more cannot store one; the snapshot that names them follows, and then what it replaces is removed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, ClassVar, assert_never

from msgspec import UNSET, Meta, Raw, Struct, UnsetType
from msgspec.json import Decoder

from routing import jsonlike
from routing.address import ActorId, Recalled, shard_of
from routing.errors import InvalidInput, StateNotPortable, Unavailable
from routing.jsonlike import MAX_NESTING, shown
from routing.link import Appended, Entry, Link
from routing.session_id import opened_at
from routing.subjects import Subjects
from routing.typed import UNREADABLE, Count
from runtime.codec import Frame, aside, frame_header, join, split
from runtime.memory import read_memory
from runtime.turn import Turn

PIECES_AT_ONCE, ENTRIES_AT_ONCE = 16, 256  # messages that are read at once, each time with a deadline of its own
LOAD_ATTEMPTS = 8  # a snapshot landing while we read removes what we are about to read; then start over


class Kind(StrEnum):
    COMMAND = "command"
    REJECTION = "rejection"
    CLAIM = "claim"
    SNAPSHOT = "snapshot"
    PIECE = "piece"


EVENT_NESTING = 2  # levels around an event's values: it is a list in a list

_SNAPSHOT = Kind.SNAPSHOT  # to look a member up on its class takes a while


class Record(Struct):  # one for each append: see Command
    """One message of an actor's log, without its sequence."""

    kind: Kind
    epoch: int
    incarnation: str
    trail: tuple[int, ...] = ()
    message_id: str = ""
    session: str = ""
    number: int = 0
    events: list[list[Any]] = []
    reply: Any = None
    error: dict[str, Any] | None = None
    frame: Frame | None = None
    memory: dict[str, Any] = {}
    piece: bytes = b""
    pieces: tuple[int, ...] = ()  # of a snapshot: what it says is there, and it has neither frame nor memory itself


class _Entry(Struct, tag_field="kind"):
    """The header of an entry as it is read; the application's values in it are `jsonlike`'s to read."""

    kind: ClassVar[Kind]
    epoch: Count
    incarnation: str
    trail: tuple[Count, ...]


class _Answered(_Entry, kw_only=True):
    """What a command has come to."""

    id: Annotated[str, Meta(min_length=1)]
    session: str = ""
    number: Count = 0


class _Command(_Answered, tag="command"):
    kind = Kind.COMMAND
    events: Raw
    reply: Raw


class _Rejection(_Answered, tag="rejection"):
    kind = Kind.REJECTION
    error: Raw


class _Claim(_Entry, tag="claim"):
    kind = Kind.CLAIM


class _Snapshot(_Entry, tag="snapshot"):
    """Either says what is in its body, or in which pieces that was stored."""

    kind = Kind.SNAPSHOT
    pieces: tuple[Count, ...] | UnsetType = UNSET
    memory: Raw | UnsetType = UNSET
    schema: Count | UnsetType = UNSET
    codec: str | UnsetType = UNSET
    bytes: Count | UnsetType = UNSET
    digest: str | UnsetType = UNSET


class _Piece(_Entry, tag="piece"):
    kind = Kind.PIECE


_read_entry = Decoder(_Command | _Rejection | _Claim | _Snapshot | _Piece).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """An actor's log from its latest snapshot on: (sequence, record) in order. `version` is the last one, 0: none."""

    version: int
    epoch: int
    records: tuple[tuple[int, Record], ...]

    @property
    def trail(self) -> tuple[int, ...]:
        return tuple(sequence for sequence, _ in self.records)


class Journal:
    """Appends to and reads the logs of actors. Every append names the sequence it follows."""

    def __init__(self, link: Link, subjects: Subjects, *, shards_total: int, append_timeout_s: float) -> None:
        self._link, self._timeout_s = link, append_timeout_s
        self.takes_more = link.takes_more  # whether an append would leave now, not wait for what was sent before

        def place_of(actor: ActorId) -> tuple[str, str]:
            shard = shard_of(actor, shards_total)
            return subjects.log_of(shard), subjects.events(shard, actor)

        self._places = Recalled(place_of)  # (stream, subject) of an actor's log

    async def append(self, actor: ActorId, record: Record, *, after: int) -> int:
        """Store `record` after version `after`; returns the new version.

        Raises WrongSequence (read the tail, then decide again), InDoubt (as well: it may land even later),
        Unavailable (nothing was stored), PayloadTooLarge.
        """
        _, subject = self._places[actor]
        return await self._link.append(
            subject, encode_record(record), expected=after, timeout_s=self._timeout_s,
            rollup=record.kind is _SNAPSHOT and not record.pieces,
        )  # fmt: skip

    async def append_snapshot(self, actor: ActorId, whole: bytes, *, after: int) -> int:
        """As `append`, for a snapshot that `encode_record` has been asked for already, to see how large it is."""
        _, subject = self._places[actor]
        return await self._link.append(subject, whole, expected=after, timeout_s=self._timeout_s, rollup=True)

    async def forget(self, actor: ActorId, *, before: int) -> None:
        """Remove what a snapshot in pieces has replaced. Raises Timeout, Unavailable."""
        stream, subject = self._places[actor]
        await self._link.purge(stream, subject, before=before, timeout_s=self._timeout_s)

    def append_then(self, actor: ActorId, record: Record, *, after: int, then: Appended) -> None:
        """As `append`, without anybody who waits; see Link.append_then."""
        _, subject = self._places[actor]
        self._link.append_then(
            subject, encode_record(record), expected=after, timeout_s=self._timeout_s, then=then,
            rollup=record.kind is _SNAPSHOT,
        )  # fmt: skip

    async def tail(self, actor: ActorId) -> tuple[int, Record] | None:
        """The last message of the actor's log, from the leader. Raises Timeout, Unavailable, StateNotPortable."""
        stream, subject = self._places[actor]
        entry = await self._link.last(stream, subject, timeout_s=self._timeout_s)
        return None if entry is None else (entry.sequence, decode_record(entry.payload))

    async def load(self, actor: ActorId) -> History:
        """The log from its latest snapshot on. Raises Timeout, Unavailable, StateNotPortable for a damaged log."""
        for _ in range(LOAD_ATTEMPTS):
            tail = await self.tail(actor)
            if tail is None:
                return History(version=0, epoch=0, records=())
            version, last = tail
            if (earlier := await self._earlier(actor, last.trail, last)) is None:
                continue
            first, *others = [*earlier, tail]
            if first[1].pieces:
                if (whole := await self._put_together(actor, first[1])) is None:
                    continue
                first = first[0], whole
            return History(version=version, epoch=last.epoch, records=(first, *others))
        raise Unavailable(
            f"log of {actor} changed {LOAD_ATTEMPTS} times while being read, or lacks what it names: try again"
        )

    async def after(self, actor: ActorId, version: int, tail: tuple[int, Record]) -> History | None:
        """What the log has after `version`, up to its last message `tail`. Raises as `load`.

        None when a snapshot has replaced messages after `version`: then only the whole log will do.
        """
        last_sequence, last = tail
        if version not in last.trail:
            return None
        between = [sequence for sequence in last.trail if sequence > version]
        if (earlier := await self._earlier(actor, between, last)) is None:
            return None
        return History(version=last_sequence, epoch=last.epoch, records=(*earlier, tail))

    async def _put_together(self, actor: ActorId, snapshot: Record) -> Record | None:
        """What a snapshot in pieces says; None when one of them was removed."""
        if (entries := await self._read(actor, snapshot.pieces, PIECES_AT_ONCE)) is None:
            return None
        parts = []
        for entry in entries:
            record = decode_record(entry.payload)
            if record.kind is not Kind.PIECE:
                raise self._damaged(actor, entry)
            parts.append(record.piece)
        whole = await aside(sum(map(len, parts)), lambda: decode_record(b"".join(parts)))
        if whole.frame is None:
            raise self._damaged(actor, entries[0])
        return whole

    async def _earlier(self, actor: ActorId, sequences: Sequence[int], last: Record) -> list[tuple[int, Record]] | None:
        """The records at those of `last.trail`, which are its end; None when one was removed.

        Each names those before it, so what was read must fit: another actor's message, or one of another place in the
        log, which only a damaged replica gives, is an error and not another state.
        """
        if (entries := await self._read(actor, sequences, ENTRIES_AT_ONCE)) is None:
            return None
        records, turn = [], Turn(asyncio.get_running_loop().time)
        for place, entry in enumerate(entries, start=len(last.trail) - len(sequences)):
            record = decode_record(entry.payload)
            if len(record.trail) != place or record.trail[-1:] != last.trail[max(place - 1, 0) : place]:
                raise self._damaged(actor, entry)
            records.append((entry.sequence, record))
            if turn.over():  # a long log must not hold up the commands of others
                await turn.next()
        return records

    async def _read(self, actor: ActorId, sequences: Sequence[int], at_once: int) -> list[Entry] | None:
        """The messages of an actor's log at `sequences`; None when one was removed."""
        stream, subject = self._places[actor]
        entries = []
        for first in range(0, len(sequences), at_once):
            wanted = sequences[first : first + at_once]
            for entry in await self._link.read(stream, wanted, timeout_s=self._timeout_s):
                if entry is None:
                    return None
                if entry.subject != subject:
                    raise self._damaged(actor, entry)
                entries.append(entry)
        return entries

    def _damaged(self, actor: ActorId, entry: Entry) -> StateNotPortable:
        stream, _ = self._places[actor]
        return StateNotPortable(
            f"log of {actor} names message {entry.sequence} of stream {stream}, and what is read there is another:"
            " a replica is damaged, or the stream was restored in part"
        )


def encode_record(record: Record) -> bytes:
    header: dict[str, Any] = {
        "kind": record.kind, "epoch": record.epoch, "incarnation": record.incarnation, "trail": record.trail,
    }  # fmt: skip
    if record.message_id:  # whose command it answers, so that a repeated one is found again
        header["id"] = record.message_id
    if record.session:
        header["session"], header["number"] = record.session, record.number
    match record.kind:
        case Kind.COMMAND:
            header["events"], header["reply"] = record.events, record.reply
        case Kind.REJECTION:
            header["error"] = record.error
        case Kind.PIECE:
            return join(header, record.piece)
        case Kind.SNAPSHOT if record.pieces:
            header["pieces"] = record.pieces
        case Kind.SNAPSHOT:
            assert record.frame is not None
            header |= {"memory": record.memory, **frame_header(record.frame)}
            return join(header, record.frame.body)
    return join(header, b"")


def decode_record(payload: bytes) -> Record:
    """Raises StateNotPortable for anything `encode_record` of this or an older version did not write."""
    try:
        line, body = split(payload)
        entry = _read_entry(line)
        record = Record(entry.kind, entry.epoch, entry.incarnation, entry.trail)
        match entry:
            case _Command():
                _answers(record, entry)
                record.events = _events(bytes(entry.events))
                record.reply = jsonlike.loads(bytes(entry.reply), nesting=MAX_NESTING)
            case _Rejection():
                _answers(record, entry)
                record.error = _error(bytes(entry.error))
            case _Piece():
                record.piece = body
            case _Snapshot():
                _replaces(record, entry, body)
            case _Claim():
                pass
            case _:
                assert_never(entry)
        return record
    except (InvalidInput, *UNREADABLE) as error:
        raise StateNotPortable(
            f"log entry {payload[:80]!r} cannot be read by this version: {shown(error, 200)}"
        ) from error


def _answers(record: Record, entry: _Answered) -> None:
    """Say which command it is that the entry answers."""
    record.message_id = entry.id
    if entry.session or entry.number:
        opened_at(entry.session)
        if entry.number < 1:
            raise InvalidInput("the commands of a session are numbered from 1")
        record.session, record.number = entry.session, entry.number


def _replaces(record: Record, entry: _Snapshot, body: bytes) -> None:
    """Say what the snapshot puts in the place of all before it."""
    if entry.pieces is not UNSET:
        record.pieces = entry.pieces
        if not record.pieces:
            raise InvalidInput("a snapshot in no pieces")
        return
    if (
        entry.memory is UNSET or entry.schema is UNSET or entry.codec is UNSET
        or entry.bytes is UNSET or entry.digest is UNSET
    ):  # fmt: skip
        raise InvalidInput("a snapshot that does not say what is in it")
    record.memory = read_memory(bytes(entry.memory))
    record.frame = Frame(
        schema=entry.schema, codec=entry.codec, state_bytes=entry.bytes, digest=entry.digest, body=body
    )  # fmt: skip


def _events(text: bytes) -> list[list[Any]]:
    events = jsonlike.loads(text, nesting=MAX_NESTING + EVENT_NESTING)
    if type(events) is not list:
        raise InvalidInput(f"{shown(events)} are no events: expected a list")
    for event in events:
        if not (type(event) is list and len(event) == 2 and type(event[0]) is str and type(event[1]) is dict):
            raise InvalidInput(f"{shown(event)} is no event: expected [name, values]")
    return events


def _error(text: bytes) -> dict[str, Any]:
    error = jsonlike.loads(text)
    if type(error) is not dict:
        raise InvalidInput(f"rejection with {shown(error)} for its error")
    return error
