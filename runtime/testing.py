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

import asyncio
import math
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import structlog

from routing.errors import (
    FerryError,
    Incompatible,
    InDoubt,
    PayloadTooLarge,
    Timeout,
    Unavailable,
)
from routing.link import Entry, EntryHandler, Handler, Message, StreamSpec
from runtime.memory_stream import MemoryStream, matches

log = structlog.get_logger("ferry.testing")

Kind = Literal["publish", "request", "append", "read"]
Fault = Literal["deliver", "drop_request", "drop_reply", "late"]
T = TypeVar("T")

SETUP_TIMEOUT_S = 5.0
DEFAULT_MAX_PAYLOAD = 2**20


class MemoryNats:
    """The server: streams, subscriptions, and the wires to its links.

    `latency` gives the seconds one message takes over one wire (a request and its answer cross four); messages on one
    wire never overtake each other. None means as soon as the loop comes round.

    `on_message(kind, subject)` is asked once for every publish, request, append and read, and says what becomes of
    it: "deliver"; "drop_request" (it never arrives); "drop_reply" (it takes effect, the sender never learns); "late"
    (it takes effect `late_s` seconds later, even when its sender is gone by then). Answers to requests are publishes
    of their own. Setting up (subscribe, watch, ensure_stream) is never disturbed.
    """

    def __init__(
        self, *, latency: Callable[[], float] | None = None, on_message: Callable[[Kind, str], Fault] | None = None,
        late_s: float = 3.0, max_payload: int = DEFAULT_MAX_PAYLOAD,
    ) -> None:  # fmt: skip
        self.latency, self.on_message, self.late_s, self.max_payload = latency, on_message, late_s, max_payload
        self._links_made = 0
        self._streams: dict[str, MemoryStream] = {}
        self._exact: dict[str, list[_MemorySubscription]] = {}
        self._wildcard: list[_MemorySubscription] = []

    def link(self, name: str) -> MemoryLink:
        """A new connection. Names are for people; two links may share one."""
        self._links_made += 1
        return MemoryLink(self, name, inbox=f"_INBOX.{self._links_made}")

    def entries(self, stream: str) -> list[Entry]:
        """What a stream holds now, in order, for assertions. Raises Unavailable when there is no such stream."""
        return list(self._stream(stream).entries.values())

    # -- called by links, when a message has arrived at the server -------------------------------------------------
    def _route(self, message: Message) -> bool:
        """Hand a message to every live subscription; whether there was any."""
        found = [
            *self._exact.get(message.subject, ()),
            *(one for one in self._wildcard if matches(one.tokens, message.subject)),
        ]
        live = [subscription for subscription in found if subscription.link.connected]
        for subscription in live:
            subscription.link._down.send(partial(subscription.deliver, message))
        return bool(live)

    def _add(self, subscription: _MemorySubscription) -> None:
        self._group(subscription).append(subscription)

    def _remove(self, subscription: _MemorySubscription) -> None:
        group = self._group(subscription)
        if subscription in group:
            group.remove(subscription)
        if not group:
            self._exact.pop(subscription.subject, None)

    def _group(self, subscription: _MemorySubscription) -> list[_MemorySubscription]:
        if {"*", ">"} & set(subscription.tokens):
            return self._wildcard
        return self._exact.setdefault(subscription.subject, [])

    def _stream(self, name: str) -> MemoryStream:
        if name not in self._streams:
            raise Unavailable(f"there is no stream {name}: call ensure_stream first")
        return self._streams[name]

    def _stream_of(self, subject: str) -> MemoryStream:
        for stream in self._streams.values():
            if any(matches(tokens, subject) for tokens in stream.patterns):
                return stream
        raise Unavailable(f"no stream stores {subject}: call ensure_stream first")

    def _ensure(self, spec: StreamSpec) -> None:
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


class MemoryLink:
    """One connection to a MemoryNats; implements `routing.link.Link`. `disconnect` and `reconnect` play a dead link.

    A cut loses what is on the wire in both directions; what had arrived at the server stands.
    """

    def __init__(self, server: MemoryNats, name: str, *, inbox: str) -> None:
        self.name = name
        self.handler_errors = 0
        self._server, self._inbox = server, inbox
        self._connected, self._closed = True, False
        self._up, self._down = _Wire(server), _Wire(server)
        self._waiting: dict[str, asyncio.Future[bytes]] = {}
        self._in_flight: set[asyncio.Future[Any]] = set()
        self._requests = 0
        self._watches: list[_MemoryWatch] = []
        self._reconnect_callbacks: list[Callable[[], None]] = []
        server._add(_MemorySubscription(self, f"{inbox}.*", self._on_answer))

    @property
    def connected(self) -> bool:
        return self._connected

    def disconnect(self) -> None:
        """Cut the link: verbs fail at once, handlers hear nothing, requests under way will time out."""
        self._connected = False
        self._up.cut()
        self._down.cut()
        for watch in self._watches:
            watch.detach()

    def reconnect(self) -> None:
        """Heal the link: subscriptions are back, watches start over, then the reconnect callbacks run."""
        if self._closed or self._connected:
            return
        self._connected = True
        for watch in self._watches:
            self._up.send(watch.attach)
        for callback in self._reconnect_callbacks:
            asyncio.get_running_loop().call_soon(self._guard, "on_reconnect", callback)

    # -- messages --------------------------------------------------------------------------------------------------
    async def publish(self, subject: str, payload: bytes, *, reply: str = "") -> None:
        self._check(subject, payload)
        message = Message(subject=subject, payload=payload, reply=reply)
        self._send(self._fate("publish", subject), partial(self._server._route, message))

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> bytes:
        self._check(subject, payload)
        self._requests += 1
        inbox = f"{self._inbox}.{self._requests}"
        message = Message(subject=subject, payload=payload, reply=inbox)
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        fate = self._fate("request", subject)
        if fate != "drop_reply":
            self._waiting[inbox] = future

        def arrive() -> None:
            if not self._server._route(message) and fate != "drop_reply":
                nobody = Unavailable(f"nobody listens on {subject}: is its node there?")
                self._down.send(partial(_fail, future, nobody))

        self._send(fate, arrive)
        try:
            return await self._answer(future, subject, timeout_s)
        finally:
            self._waiting.pop(inbox, None)

    async def subscribe(self, subject: str, handler: Handler) -> _MemorySubscription:
        subscription = _MemorySubscription(self, subject, handler)
        await self._call("deliver", subject, partial(self._server._add, subscription), SETUP_TIMEOUT_S)
        return subscription

    # -- streams ---------------------------------------------------------------------------------------------------
    async def append(
        self, subject: str, payload: bytes, *, expected: int | None, timeout_s: float,
        rollup: bool = False, ttl_s: float | None = None, discard: bool = False,
    ) -> int:  # fmt: skip
        payload = b"" if discard else payload
        self._check(subject, payload)

        def store() -> int:
            stream = self._server._stream_of(subject)
            return stream.append(subject, payload, expected=expected, rollup=rollup, ttl_s=ttl_s, discard=discard)

        try:
            return await self._call(self._fate("append", subject), subject, store, timeout_s)
        except Timeout as error:
            raise InDoubt(f"no acknowledgement for {subject} within {timeout_s:g} s: read its last message") from error

    async def last(self, stream: str, subject: str, *, timeout_s: float) -> Entry | None:
        def look() -> Entry | None:
            return self._server._stream(stream).last(subject)

        return await self._call(self._fate("read", subject), subject, look, timeout_s)

    async def read(self, stream: str, sequence: int, *, timeout_s: float) -> Entry | None:
        def look() -> Entry | None:
            return self._server._stream(stream).entries.get(sequence)

        return await self._call(self._fate("read", stream), stream, look, timeout_s)

    async def watch(self, stream: str, subject: str, handler: EntryHandler, *, timeout_s: float) -> _MemoryWatch:
        watch = _MemoryWatch(self, self._server, stream, subject, handler)
        try:
            await self._call("deliver", subject, watch.attach, timeout_s)
        except BaseException:
            await watch.stop()
            raise
        self._watches.append(watch)
        return watch

    async def ensure_stream(self, spec: StreamSpec, *, timeout_s: float) -> None:
        await self._call("deliver", spec.name, partial(self._server._ensure, spec), timeout_s)

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        self._reconnect_callbacks.append(callback)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._connected:
            try:
                await self._call("deliver", "close", lambda: None, SETUP_TIMEOUT_S, closing=True)
            except Timeout:
                log.warning("closed without flushing", link=self.name)
        self.disconnect()
        for subscription in [s for group in self._server._exact.values() for s in group] + self._server._wildcard:
            if subscription.link is self:
                self._server._remove(subscription)
        for future in self._in_flight:
            _fail(future, Timeout("the link was closed while waiting for an answer"))

    # -- over the wires --------------------------------------------------------------------------------------------
    async def _call(
        self, fate: Fault, subject: str, operation: Callable[[], T], timeout_s: float, *, closing: bool = False
    ) -> T:
        """Run `operation` at the server and bring back what it returns or raises."""
        if not closing:
            self._check(subject, b"")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def arrive() -> None:
            try:
                answer = partial(_resolve, future, operation())
            except FerryError as error:
                answer = partial(_fail, future, error)
            if fate != "drop_reply":
                self._down.send(answer)

        self._send(fate, arrive)
        return await self._answer(future, subject, timeout_s)

    async def _answer(self, future: asyncio.Future[T], subject: str, timeout_s: float) -> T:
        expired = Timeout(f"no answer from {subject} within {timeout_s:g} s: try again")
        timer = asyncio.get_running_loop().call_later(timeout_s, _fail, future, expired)
        self._in_flight.add(future)
        try:
            return await future
        finally:
            timer.cancel()
            self._in_flight.discard(future)

    def _send(self, fate: Fault, arrive: Callable[[], object]) -> None:
        if fate == "late":
            asyncio.get_running_loop().call_later(self._server.late_s, arrive)
        elif fate != "drop_request":
            self._up.send(arrive)

    def _fate(self, kind: Kind, subject: str) -> Fault:
        return self._server.on_message(kind, subject) if self._server.on_message is not None else "deliver"

    def _check(self, subject: str, payload: bytes) -> None:
        if self._closed:
            raise Unavailable(f"the link {self.name} is closed")
        if not self._connected:
            raise Unavailable(f"the link {self.name} is not connected: try again")
        if len(payload) > self._server.max_payload:
            limit = self._server.max_payload
            raise PayloadTooLarge(f"{len(payload)} bytes for {subject}: the server takes at most {limit}")

    def _on_answer(self, message: Message) -> None:
        future = self._waiting.pop(message.subject, None)
        if future is not None:
            _resolve(future, message.payload)

    def _guard(self, where: str, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except (Exception, asyncio.CancelledError):  # a plain function is not ours to cancel
            self.handler_errors += 1
            log.exception("handler failed", where=where, link=self.name)


class _Wire:
    """One direction of one connection: first in, first out, each after the latency of its moment."""

    def __init__(self, server: MemoryNats) -> None:
        self._server = server
        self._queue: deque[Callable[[], object]] = deque()
        self._ready_at = -math.inf
        self._cuts = 0

    def send(self, arrive: Callable[[], object]) -> None:
        loop = asyncio.get_running_loop()
        latency_s = self._server.latency() if self._server.latency is not None else 0.0
        self._ready_at = max(self._ready_at, loop.time() + latency_s)
        self._queue.append(arrive)
        # Timers of equal time run in any order, so each takes the head of the queue rather than its own message.
        if self._ready_at <= loop.time():
            loop.call_soon(self._arrive, self._cuts)
        else:
            loop.call_at(self._ready_at, self._arrive, self._cuts)

    def cut(self) -> None:
        self._queue.clear()
        self._cuts += 1
        self._ready_at = -math.inf

    def _arrive(self, cuts: int) -> None:
        if cuts == self._cuts:
            self._queue.popleft()()


class _MemorySubscription:
    def __init__(self, link: MemoryLink, subject: str, handler: Handler) -> None:
        self.link, self.subject, self.tokens = link, subject, tuple(subject.split("."))
        self._handler, self._stopped = handler, False

    def deliver(self, message: Message) -> None:
        if not self._stopped:
            self.link._guard(self.subject, self._handler, message)

    async def stop(self) -> None:
        self._stopped = True
        self.link._server._remove(self)


class _MemoryWatch:
    """A watch on one stream; attached at the server while its link is up."""

    def __init__(self, link: MemoryLink, server: MemoryNats, stream: str, subject: str, handler: EntryHandler) -> None:
        self._link, self._server, self._stream_name = link, server, stream
        self.tokens = tuple(subject.split("."))
        self._subject, self._handler, self._stopped = subject, handler, False
        self._stream: MemoryStream | None = None

    def attach(self) -> None:
        """Send what is stored, then follow. Runs at the server; raises Unavailable without the stream."""
        if self._stopped or self._stream is not None:
            return
        stream = self._server._stream(self._stream_name)
        newest = sorted(by_subject[-1] for by_subject in stream.by_subject.values())
        for sequence in newest:
            if matches(self.tokens, stream.entries[sequence].subject):
                self.send(stream.entries[sequence])
        stream.watches.append(self)
        self._stream = stream

    def detach(self) -> None:
        if self._stream is not None:
            self._stream.watches.remove(self)
            self._stream = None

    def send(self, entry: Entry) -> None:
        self._link._down.send(partial(self._deliver, entry))

    async def stop(self) -> None:
        self._stopped = True
        self.detach()
        if self in self._link._watches:
            self._link._watches.remove(self)

    def _deliver(self, entry: Entry) -> None:
        if not self._stopped:
            self._link._guard(self._subject, self._handler, entry)


def _resolve(future: asyncio.Future[T], value: T) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[Any], error: FerryError) -> None:
    if not future.done():
        future.set_exception(error)
