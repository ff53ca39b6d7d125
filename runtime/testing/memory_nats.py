"""NATS in memory, for unit tests of actors and for the simulation: no server, no socket, no thread.

    async def test_greeting() -> None:
        nats = MemoryNats()
        alice, bob = nats.link("alice"), nats.link("bob")
        answers = set()

        def greet(message: Message) -> None:
            answers.add(asyncio.create_task(bob.publish(message.reply, b"hello " + message.payload)))

        await bob.subscribe("greet", greet)
        assert await alice.request("greet", b"alice", timeout_s=1) == b"hello alice"

`MemoryLink` keeps the same contract as the real `routing.nats_link.NatsLink` (tests/contract/ runs against both).
Time is the running loop's: on a virtual-time loop everything here is deterministic and waits cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from functools import partial
from typing import Literal

from routing.errors import Incompatible, StreamMissing, Unavailable
from routing.link import Entry, Message, StreamSpec
from runtime.testing.memory_link import MemoryLink, MemorySubscription
from runtime.testing.memory_stream import MemoryStream, matches
from runtime.testing.process import Process

Kind = Literal["publish", "request", "append", "read"]
Fault = Literal["deliver", "drop_request", "drop_reply", "late", "double", "stale"]

DEFAULT_MAX_PAYLOAD = 2**20


class MemoryNats:
    """The server: streams, subscriptions, and the wires to its links.

    `latency` gives the seconds one message takes over one wire (a request and its answer cross four); messages on one
    wire never overtake each other. None means as soon as the loop comes round.

    `on_message(kind, subject)` is asked once for every publish, request, append and read, and says what becomes of
    it: "deliver"; "drop_request" (it never arrives); "drop_reply" (it takes effect, the sender never learns); "late"
    (it takes effect `late_s` seconds later, even when its sender is gone by then); "double" (a message arrives a
    second time, `late_s` seconds later); "stale" (a subject's last message is answered by a deposed leader, which
    lacks the latest `stale_by`; a message asked for by its sequence by a replica that still has what was removed
    lately). Answers to requests are publishes of their own. Setting up (subscribe, watch, ensure_stream) is never
    disturbed.

    `watch_lag(link)` gives the seconds by which a watch's news is late at its moment, in order per watch: a consumer
    may lag behind what the same client is answered directly. It never hears of what was replaced by then.

    `on_append(entry)` is told of everything that clients have stored, which a roll-up may remove soon after.
    """

    def __init__(
        self, *, latency: Callable[[], float] | None = None, on_message: Callable[[Kind, str], Fault] | None = None,
        late_s: float = 3.0, max_payload: int = DEFAULT_MAX_PAYLOAD, on_append: Callable[[Entry], None] | None = None,
        watch_lag: Callable[[str], float] | None = None,
    ) -> None:  # fmt: skip
        self.latency, self.on_message, self.late_s, self.max_payload = latency, on_message, late_s, max_payload
        self.on_append, self.watch_lag = on_append, watch_lag
        self.stale_by = 1
        self.context = Context()  # of no process: what is on the wire outlives its sender
        self._links_made = 0
        self._streams: dict[str, MemoryStream] = {}
        self._subscriptions: list[MemorySubscription] = []
        self._inboxes: dict[str, MemorySubscription] = {}
        self._listening: dict[
            str, list[MemorySubscription]
        ] = {}  # subject -> who gets it, until somebody comes or goes

    def link(self, name: str, process: Process | None = None) -> MemoryLink:
        """A new connection, of `process` if it can be killed or stopped. Names are for people; two may share one."""
        self._links_made += 1
        context = process.context() if process is not None else self.context
        return MemoryLink(self, name, inbox=f"_INBOX.{self._links_made}", context=context)

    def truncate(self, stream: str, sequence: int) -> list[Entry]:
        """Lose everything stored in a stream after `sequence`, as a server that lost its disk's tail; returns that.

        Sequences are given out anew from there. Nobody is told.
        """
        return self.stream(stream).truncate(sequence)

    def lose_everything(self) -> None:
        """Have no stream any more, as a server that was given an empty disk. Links have to be cut before."""
        self._streams.clear()

    def entries(self, stream: str) -> list[Entry]:
        """What a stream holds now, in order, for assertions. Raises Unavailable when there is no such stream."""
        return list(self.stream(stream).entries.values())

    def expire(self, subject: str) -> None:
        """Put a removal marker on a subject, as an expiry does: a lease that ends before its time, say."""
        stream = self.stream_of(subject)
        stream.append(subject, b"", expected=None, rollup=False, ttl_s=None, discard=True)

    # -- called by links, when a message has arrived at the server -------------------------------------------------
    def route(self, message: Message) -> bool:
        """Hand a message to every live subscription; whether there was any."""
        live = [listener for listener in self._listeners(message.subject) if listener.link.connected]
        for listener in live:
            listener.link.receive(partial(listener.deliver, message))
        return bool(live)

    def _listeners(self, subject: str) -> list[MemorySubscription]:
        if subject.startswith("_INBOX."):
            inbox = self._inboxes.get(subject.rpartition(".")[0])
            if inbox is not None:
                return [inbox]
        found = self._listening.get(subject)
        if found is None:
            found = [one for one in self._subscriptions if matches(one.tokens, subject)]
            self._listening[subject] = found
        return found

    def add(self, subscription: MemorySubscription) -> None:
        self._listening.clear()
        self._subscriptions.append(subscription)

    def add_inbox(self, inbox: str, subscription: MemorySubscription) -> None:
        self._inboxes[inbox] = subscription

    def remove(self, subscription: MemorySubscription) -> None:
        self._listening.clear()
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)

    def remove_link(self, link: MemoryLink, inbox: str) -> None:
        self._listening.clear()
        self._inboxes.pop(inbox, None)
        self._subscriptions = [one for one in self._subscriptions if one.link is not link]

    def stream(self, name: str) -> MemoryStream:
        if name not in self._streams:
            raise StreamMissing(f"there is no stream {name}: call ensure_stream first")
        return self._streams[name]

    def stream_of(self, subject: str) -> MemoryStream:
        for stream in self._streams.values():
            if any(matches(tokens, subject) for tokens in stream.patterns):
                return stream
        raise Unavailable(f"no stream stores {subject}: call ensure_stream first")

    def ensure(self, spec: StreamSpec) -> None:
        known = self._streams.get(spec.name)
        if known is None:
            self._streams[spec.name] = MemoryStream(spec)
            return
        differing = [
            f"{field} is {getattr(known.spec, field)!r}, not {getattr(spec, field)!r}"
            for field in ("subjects", "keep", "ttl", "replicas", "max_message_bytes", "extra")
            if getattr(known.spec, field) != getattr(spec, field)
        ]
        if differing:
            raise Incompatible(f"stream {spec.name} exists with other settings: {'; '.join(differing)}")
