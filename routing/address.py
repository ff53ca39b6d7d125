"""Who is meant: actor ids, node ids, and the shard an actor belongs to."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar

import xxhash

from routing.errors import InvalidInput
from routing.jsonlike import shown

NodeId = str

IDS_RECALLED = 4_096  # parsed lately, by this process: to read one again costs as much as to answer a query
MAX_KEY_BYTES = 128  # a subject token of three times that, escaped, stays far below NATS' 4 KiB protocol line
_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_PLAIN_BYTES = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]+")

T = TypeVar("T")


class Recalled(dict["ActorId", T], Generic[T]):
    """What was worked out lately of actors, of IDS_RECALLED at most: `recalled[actor]` has it still or works it out.

    A cache of functools' takes twice as long for a key that is neither text nor a number.
    """

    def __init__(self, work_out: Callable[[ActorId], T]) -> None:
        super().__init__()
        self._work_out = work_out

    def __missing__(self, actor: ActorId) -> T:
        if len(self) >= IDS_RECALLED:
            self.clear()
        found = self[actor] = self._work_out(actor)
        return found


class _Words(NamedTuple):
    actor_type: str
    key: str


class ActorId(_Words):
    """`type/key`, for example `aircraft/N14228`.

    The type is a lower-case name; the key is 1 to 128 bytes of UTF-8 without control characters. `token`
    is the same id as one NATS subject token, escaped so that no key can reach another subject.
    """

    __slots__ = ()

    def __new__(cls, actor_type: str, key: str) -> ActorId:
        """Raises InvalidInput for anything else."""
        if not (isinstance(actor_type, str) and isinstance(key, str)):
            raise InvalidInput(f"actor type {shown(actor_type)} and key {shown(key)} are not both text: make them text")
        if not _NAME.fullmatch(actor_type):
            raise InvalidInput(
                f"actor type {shown(actor_type)} is malformed: use lower-case letters, digits and _, e.g. aircraft"
            )
        try:
            size = len(key.encode())
        except UnicodeEncodeError as error:
            raise InvalidInput(f"actor key {shown(key)} is not valid text: use UTF-8") from error
        if not 1 <= size <= MAX_KEY_BYTES:
            raise InvalidInput(f"actor key of {size} bytes: use 1 to {MAX_KEY_BYTES} bytes after {actor_type}/")
        if any(ord(character) < 32 or ord(character) == 127 for character in key):
            raise InvalidInput(f"actor key {shown(key)} has control characters: remove them")
        return super().__new__(cls, actor_type, key)

    @classmethod
    def of(cls, actor: str | ActorId) -> ActorId:
        """An id as it is, or read from `type/key`. Raises InvalidInput."""
        return actor if isinstance(actor, ActorId) else cls.parse(actor)

    @classmethod
    def parse(cls, text: str) -> ActorId:
        """Read `type/key`. Raises InvalidInput, naming the form, for anything else."""
        if not isinstance(text, str):
            raise InvalidInput(f"actor {shown(text)} is no text: write TYPE/KEY, e.g. aircraft/N14228")
        return _parsed(text)

    @classmethod
    def from_token(cls, token: str) -> ActorId:
        """The inverse of `token`. Raises InvalidInput when the token was not made by `token`."""
        actor_type, equals, escaped = token.partition("=")
        if not equals:
            raise InvalidInput(f"subject token {shown(token)} names no actor")
        try:
            key = re.sub(rb"=([0-9A-F]{2})", lambda m: bytes([int(m[1], 16)]), escaped.encode()).decode()
        except UnicodeDecodeError as error:
            raise InvalidInput(f"subject token {shown(token)} names no actor") from error
        return cls(actor_type, key)

    @property
    def token(self) -> str:
        if _PLAIN_KEY.fullmatch(self.key):
            return f"{self.actor_type}={self.key}"
        escaped = "".join(chr(b) if b in _PLAIN_BYTES else f"={b:02X}" for b in self.key.encode())
        return f"{self.actor_type}={escaped}"

    def __str__(self) -> str:
        return f"{self.actor_type}/{self.key}"


@lru_cache(maxsize=IDS_RECALLED)
def _parsed(text: str) -> ActorId:
    actor_type, slash, key = text.partition("/")
    if not slash:
        raise InvalidInput(f"actor {shown(text)} is malformed: write TYPE/KEY, e.g. aircraft/N14228")
    return ActorId(actor_type, key)


def shard_of(actor: ActorId, shards_total: int) -> int:
    """The shard of an actor: xxHash64 of its text modulo the number of shards, fixed at the cluster's birth."""
    return xxhash.xxh64_intdigest(str(actor).encode()) % shards_total


@lru_cache(maxsize=1_024)  # it stands in every answer
def check_node_id(text: str) -> NodeId:
    """Return `text` if it can name a node. Raises InvalidInput otherwise."""
    if not _NODE.fullmatch(text):
        raise InvalidInput(f"node id {shown(text)} is malformed: use 1 to 63 letters, digits, - and _")
    return text
