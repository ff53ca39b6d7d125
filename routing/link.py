"""What Ferry needs of NATS, and nothing else: the seam between the protocol and the network.

`routing.nats_link.NatsLink` is the real one; `runtime.testing.MemoryNats` the in-memory stand-in. One contract
suite (tests/contract/) runs against both. Buckets are streams, so three stream verbs carry journal, map and leases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from msgspec import Struct

from routing.errors import FerryError


class Message(Struct):  # one for each message: see routing.envelope.Command
    """A message as delivered to a subscriber. `reply` is empty when nobody waits for an answer."""

    subject: str
    payload: bytes
    reply: str = ""


class Entry(Struct):  # one for each message: see routing.envelope.Command
    """A message as stored in a stream. `removed` marks a deletion or expiry; its payload is empty then."""

    sequence: int
    subject: str
    payload: bytes
    removed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSpec:
    """A stream as Ferry wants it.

    `ttl` allows messages that expire; `keep` is messages kept per subject (0: all); `direct`: every replica answers
    `read`, not only the leader.
    """

    name: str
    subjects: tuple[str, ...]
    keep: int = 0
    ttl: bool = False
    direct: bool = False
    replicas: int = 1
    max_message_bytes: int = -1
    extra: dict[str, object] = field(default_factory=dict)


Handler = Callable[[Message], None]
Appended = Callable[[int | FerryError], None]  # what to do when an append has ended
EntryHandler = Callable[[Entry], None]


class Subscription(Protocol):
    async def stop(self) -> None:
        """Stop delivery. Messages already on their way may still arrive."""


class Link(Protocol):
    """One connection. Every verb has a deadline; none retries by itself.

    Handlers are plain functions called in order on the event loop; they must not block, and what they raise is
    counted and logged, never lost with the subscription.
    """

    in_doubt: bool
    """Whether this may be another NATS than before (routing/identity.py): while it is set, nothing is stored through
    this link; `append`, `append_then` and `purge` raise Unavailable."""

    @property
    def connected(self) -> bool: ...

    def takes_more(self) -> bool:
        """Whether what is sent now leaves, as far as is known: connected, and not too much waits to be sent."""

    async def publish(self, subject: str, payload: bytes, *, reply: str = "") -> None:
        """Send at most once. Raises Unavailable when not connected, PayloadTooLarge over the server's limit."""

    def answer(self, reply: str, payload: bytes) -> None:
        """Publish to somebody's reply subject, without waiting for anything.

        Raises Unavailable when not connected or when too much waits to be sent, PayloadTooLarge.
        """

    async def request(self, subject: str, payload: bytes, *, timeout_s: float, alone: bool = False) -> bytes:
        """Send and await one answer. It may share its way with others, unless it is to go `alone`.

        Raises Unavailable when nobody listens or the link is down before sending, Timeout when no answer came.
        """

    async def subscribe(self, subject: str, handler: Handler) -> Subscription:
        """Deliver messages on `subject` (wildcards allowed) to `handler`, in order, until stopped.

        Returns once the server knows. Outlives reconnects. Raises Unavailable when not connected.
        """

    async def append(
        self, subject: str, payload: bytes, *, expected: int | None, timeout_s: float,
        rollup: bool = False, ttl_s: float | None = None, discard: bool = False,
    ) -> int:  # fmt: skip
        """Store one message and return its sequence.

        `expected` is the sequence of the subject's last message (0: none), or None for no condition. `rollup`
        replaces everything stored on the subject before it. `ttl_s` lets it expire (a removal marker follows);
        `discard` stores a removal marker instead of a value. Raises WrongSequence when the expectation was refused,
        InDoubt when no answer came (it may have landed, now or later), Unavailable when it was certainly not stored,
        PayloadTooLarge over the server's or the stream's limit, Incompatible when the stream does not allow it.
        """

    def append_then(
        self, subject: str, payload: bytes, *, expected: int, timeout_s: float, then: Appended, rollup: bool = False
    ) -> None:
        """As `append`, without anybody who waits: `then` is called once, with the sequence or what `append` raises.

        That may be within `close`. Raises Unavailable and PayloadTooLarge itself where nothing was sent; then `then` is
        not called. Nothing holds a sender back: ask `takes_more` before.
        """

    async def last(self, stream: str, subject: str, *, timeout_s: float) -> Entry | None:
        """The subject's last message, read from the leader. None when there is none.

        Raises Timeout, Unavailable; StreamMissing when the server says that there is no such stream.
        """

    async def read(self, stream: str, sequences: Sequence[int], *, timeout_s: float) -> list[Entry | None]:
        """The messages at `sequences`, in that order, all at once. None where one was removed, as the leader says.

        What the leader has removed may still be read from another replica. Raises Timeout, Unavailable.
        """

    async def purge(self, stream: str, subject: str, *, before: int, timeout_s: float) -> None:
        """Remove the subject's messages whose sequence is below `before`. May be asked again.

        Raises Timeout (it may still happen), Unavailable.
        """

    async def watch(self, stream: str, subject: str, handler: EntryHandler, *, timeout_s: float) -> Subscription:
        """Deliver the last message of every subject matching `subject`, then every later one, in order per subject.

        Returns when what was stored at the time of the call has been delivered. After a gap, a reconnect or a silent
        server the watch starts over by itself, so a handler sees entries again and must ignore old sequences. What the
        stream no longer holds when its turn comes (`keep` newer ones, a roll-up) is left out: only the last one of each
        subject is sure to arrive.
        Raises Timeout, Unavailable when the first round could not be had.
        """

    async def ensure_stream(self, spec: StreamSpec, *, timeout_s: float) -> None:
        """Create the stream, or leave an equal one. Raises Incompatible when it exists otherwise, or cannot be made."""

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call back each time the link is up again after having been down."""

    async def close(self) -> None:
        """Flush what was published, then disconnect. Idempotent."""
