"""What an actor remembers of the commands it has answered, so that a repeated one is applied once.

All of it derives from the log: every entry carries its command's id and answer, every snapshot the whole memory.

Large replies are remembered while they are few; of older ones only that there was one, so that a repeated command is
still applied once, and told that it was.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from msgspec import Struct

from routing import errors
from routing.envelope import Answer
from routing.errors import InDoubt, InvalidInput
from routing.jsonlike import loads, shown
from routing.session_id import IN_FLIGHT, opened_at
from routing.settings import Settings
from routing.typed import Count, taken_as

REPLIES_BYTES = 4 * 2**20  # of large replies, remembered of plain commands, and as much of those in sessions
LARGE_BYTES = 1024  # smaller ones are few thousands at most
_NOT_LARGE = frozenset({int, float, bool, type(None)})


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one actor remembers: latest plain command ids, and sender sessions."""

    commands: int
    sessions: int

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        return cls(settings.dedup_window, settings.sessions_remembered)


class Memory:
    """The answers of one actor: to plain commands by id, to ordered commands by session and number."""

    __slots__ = ("commands", "sessions")

    def __init__(self, limits: Limits) -> None:
        self.commands = AnsweredCommands(limits.commands)
        self.sessions = AnsweredSessions(limits.sessions)

    def to_document(self) -> dict[str, Any]:
        """`{"commands": [[id, reply], [id, null, error], ...], "sessions": {...}}`, oldest first."""
        return {"commands": self.commands.to_document(), "sessions": self.sessions.to_document()}

    @classmethod
    def from_document(cls, document: dict[str, Any], limits: Limits) -> Memory:
        """The inverse of `to_document`, for what `check_memory` has let in; smaller limits keep the newest."""
        memory = cls(limits)
        memory.commands = AnsweredCommands.from_document(document["commands"], limits.commands)
        memory.sessions = AnsweredSessions.from_document(document["sessions"], limits.sessions)
        return memory


class AnsweredCommands:
    """The latest command ids and their answers, oldest first, at most `limit`.

    An id older than the window is forgotten; `limit` must exceed the commands one actor gets within a sender's
    longest retry.
    """

    __slots__ = ("_errors", "_ids", "_large", "_limit", "_replies")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # No object for each answer: a busy host remembers more of them than its processor's cache holds.
        self._replies: dict[str, Any] = {}  # by id; None for a refusal
        # The same, oldest first, once one has to go: a dict's first key is found the later the more have gone.
        self._ids: deque[str] | None = None
        self._errors: dict[str, dict[str, Any]] = {}  # of those that were refused
        self._large: _LargeReplies | None = None

    def __len__(self) -> int:
        return len(self._replies)

    def add(self, message_id: str, reply: Any, error: dict[str, Any] | None) -> None:
        if self._ids is not None and message_id not in self._replies:
            self._ids.append(message_id)
        self._replies[message_id] = reply
        if error is not None:
            self._errors[message_id] = error
        elif self._errors:
            self._errors.pop(message_id, None)
        if type(reply) not in _NOT_LARGE:
            self._large = self._large or _LargeReplies()
            for forgotten in self._large.add(message_id, reply):
                self._replies[forgotten], self._errors[forgotten] = None, _FORGOTTEN
        if len(self._replies) > self._limit:
            if self._ids is None:
                self._ids = deque(self._replies)
            oldest = self._ids.popleft()
            del self._replies[oldest]
            self._errors.pop(oldest, None)
            if self._large is not None:
                self._large.remove(oldest)

    def answer_to(self, message_id: str) -> Answer | None:
        if message_id not in self._replies:
            return None
        error = self._errors.get(message_id)
        return Answer(value=self._replies[message_id]) if error is None else Answer(error=errors.from_wire(error))

    def to_document(self) -> list[Sequence[Any]]:
        """`[[id, reply], [id, null, error], ...]`, oldest first."""
        if not self._errors:
            return list(self._replies.items())
        return [
            (message_id, reply) if message_id not in self._errors else (message_id, None, self._errors[message_id])
            for message_id, reply in self._replies.items()
        ]

    @classmethod
    def from_document(cls, document: Iterable[Sequence[Any]], limit: int) -> AnsweredCommands:
        """The inverse of `to_document`."""
        window = cls(limit)
        for message_id, reply, *error in document:
            window.add(message_id, reply, error[0] if error else None)
        return window


class AnsweredSessions:
    """The last number and the latest replies of each sender session, at most `limit` sessions.

    The session unused for longest is forgotten first; `floor` is the latest opening of any forgotten one.
    """

    __slots__ = ("_large", "_limit", "_sessions", "floor")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._sessions: OrderedDict[str, tuple[int, OrderedDict[int, list[Any]]]] = OrderedDict()
        self._large: _LargeReplies | None = None
        self.floor = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def add(self, session: str, number: int, reply: Any, error: dict[str, Any] | None) -> None:
        """Raises InvalidInput for a session that is none."""
        opened_at(session)
        _, replies = self._sessions.pop(session, (0, OrderedDict()))
        replies[number] = [reply] if error is None else [None, error]
        while len(replies) > IN_FLIGHT:
            oldest, _ = replies.popitem(last=False)
            if self._large is not None:
                self._large.remove((session, oldest))
        self._sessions[session] = (number, replies)
        if type(reply) not in _NOT_LARGE:
            self._large = self._large or _LargeReplies()
            for of, earlier in self._large.add((session, number), reply):
                self._sessions[of][1][earlier] = [None, _FORGOTTEN]
        while len(self._sessions) > self._limit:
            forgotten, (_, its_replies) = self._sessions.popitem(last=False)
            self.floor = max(self.floor, opened_at(forgotten))
            if self._large is not None:
                for earlier in its_replies:
                    self._large.remove((forgotten, earlier))

    def last(self, session: str) -> int | None:
        """The latest number decided for a session; None when it is not known (any more)."""
        known = self._sessions.get(session)
        return None if known is None else known[0]

    def answer_to(self, session: str, number: int) -> Answer | None:
        """None when the number was never answered, or so long ago that its sender cannot be waiting any more."""
        _, replies = self._sessions.get(session, (0, OrderedDict()))
        known = replies.get(number)
        return None if known is None else _answer(known)

    def to_document(self) -> dict[str, Any]:
        """`{"floor": opened, "known": [[session, last, [[number, reply], [number, null, error], ...]], ...]}`."""
        known = [
            [session, last, [[number, *answer] for number, answer in replies.items()]]
            for session, (last, replies) in self._sessions.items()
        ]
        return {"floor": self.floor, "known": known}

    @classmethod
    def from_document(cls, document: dict[str, Any], limit: int) -> AnsweredSessions:
        """The inverse of `to_document`."""
        sessions = cls(limit)
        sessions.floor = document["floor"]
        for session, _, replies in document["known"]:
            for number, reply, *error in replies:
                sessions.add(session, number, reply, error[0] if error else None)
        return sessions


class _LargeReplies:
    """The large replies that are remembered, oldest first, by a key of their own."""

    __slots__ = ("_bytes", "_sizes")

    def __init__(self) -> None:
        self._sizes: dict[Any, int] = {}
        self._bytes = 0

    def add(self, key: Any, reply: Any) -> list[Any]:
        """Returns whose replies are to be forgotten for that; the newest never is."""
        self.remove(key)
        size = len(reply) if type(reply) is str else len(orjson.dumps(reply))
        if size < LARGE_BYTES:
            return []
        self._sizes[key] = size
        self._bytes += size
        forgotten = []
        while self._bytes > REPLIES_BYTES and len(self._sizes) > 1:
            forgotten.append(next(iter(self._sizes)))
            self.remove(forgotten[-1])
        return forgotten

    def remove(self, key: Any) -> None:
        self._bytes -= self._sizes.pop(key, 0)


_FORGOTTEN = errors.to_wire(
    InDoubt("this command was applied when it was first sent; its reply was large and is no longer remembered")
)


def read_memory(text: bytes) -> dict[str, Any]:
    """What an actor remembers, from JSON text. Raises InvalidInput."""
    try:
        document = loads(text)
    except ValueError as error:
        raise InvalidInput(f"what an actor remembers of its commands is malformed: {shown(error)}") from error
    return check_memory(document)


class _Sessions(Struct, forbid_unknown_fields=True):
    floor: Count
    known: list[Any]


class _Document(Struct, forbid_unknown_fields=True):
    commands: list[Any]
    sessions: _Sessions


def check_memory(document: Any) -> dict[str, Any]:
    """Return `document` if `Memory.to_document` can have made it. Raises InvalidInput otherwise."""
    read = taken_as(_Document, document, "what an actor remembers of its commands")
    _check_answers(read.commands, read.sessions.known)
    known: dict[str, Any] = document
    return known


def _check_answers(commands: list[Any], sessions: list[Any]) -> None:
    for entry in commands:
        _check_answer(entry, str)
    for session in sessions:
        match session:
            case [str(name), int(), [_, *_] as replies]:
                opened_at(name)
                numbers = [_check_answer(entry, int)[0] for entry in replies]
            case _:
                raise InvalidInput(f"{shown(session)} is no session: expected [id, last, replies]")
        if numbers != sorted(set(numbers)) or numbers[0] < 1 or numbers[-1] != session[1]:
            raise InvalidInput(f"session {name} ends at {session[1]}, its replies at {numbers[-1]}")


def _answer(known: list[Any]) -> Answer:
    return Answer(value=known[0]) if len(known) == 1 else Answer(error=errors.from_wire(known[1]))


def _check_answer(entry: Any, key: type) -> list[Any]:
    match entry:
        case [name, _] | [name, None, dict()] if isinstance(name, key) and not isinstance(name, bool):
            return list(entry)
        case _:
            raise InvalidInput(f"{shown(entry)} is no answered command: expected [id, reply] or [id, null, error]")
