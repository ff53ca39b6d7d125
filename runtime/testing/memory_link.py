"""One connection to a NATS in memory: the verbs of `routing.link.Link`, over two wires that can be cut."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import structlog

from routing.errors import FerryError, InDoubt, PayloadTooLarge, Timeout, Unavailable
from routing.link import Appended, Entry, EntryHandler, Handler, Message, StreamSpec
from runtime.testing.memory_stream import MemoryStream, matches

if TYPE_CHECKING:
    from runtime.testing.memory_nats import Fault, Kind, MemoryNats

log = structlog.get_logger("ferry.testing")

T = TypeVar("T")

SETUP_TIMEOUT_S = 5.0


class MemoryLink:
    """One connection to a MemoryNats; implements `routing.link.Link`.

        disconnect, reconnect   a dead link, and everybody knows: what is on the wire is lost, verbs fail at once
        partition, reconnect    nothing passes any more, and nobody is told
        die                     its process was killed: what it has sent arrives, nothing comes back

    What had arrived at the server stands in any case.
    """

    def __init__(self, server: MemoryNats, name: str, *, inbox: str, context: Context) -> None:
        self.name = name
        self.handler_errors = 0
        self._server, self._inbox = server, inbox
        self._connected, self._closed = True, False
        self.in_doubt = False
        self._up, self._down = _Wire(server, server.context), _Wire(server, context)
        self._waiting: dict[str, asyncio.Future[bytes]] = {}
        self._in_flight: set[asyncio.Future[Any] | _Told[Any]] = set()
        self._requests = 0
        self._watches: list[_MemoryWatch] = []
        self._reconnect_callbacks: list[Callable[[], None]] = []
        server.add_inbox(inbox, MemorySubscription(self, f"{inbox}.*", self._on_answer))

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

    def partition(self) -> None:
        """From now on nothing passes in either direction, although both sides believe that they are connected."""
        if self._connected:
            self._up.block()
            self._down.block()

    def die(self) -> None:
        """The process at this end is gone: nobody listens, and what it had sent already goes on its way."""
        self._connected, self._closed = False, True
        self._down.cut()
        for watch in self._watches:
            watch.detach()
        self._server.remove_link(self, self._inbox)

    def receive(self, arrive: Callable[[], object]) -> None:
        """Called by the server: something is on its way to this end."""
        self._down.send(arrive)

    def reconnect(self) -> None:
        """Heal the link: subscriptions are back, watches start over, then the reconnect callbacks run."""
        if self._closed:
            return
        if self._connected:
            if not self._up.blocked:
                return
            self.disconnect()  # how a client ends a silence that it has noticed
        self._connected = True
        self._up.unblock()
        self._down.unblock()
        for watch in self._watches:
            self._up.send(watch.attach)
        for callback in self._reconnect_callbacks:
            self._down.call_soon(self._guard, "on_reconnect", callback)

    # -- messages --------------------------------------------------------------------------------------------------
    def takes_more(self) -> bool:
        return self._connected

    async def publish(self, subject: str, payload: bytes, *, reply: str = "") -> None:
        self._publish(subject, payload, reply)

    def answer(self, reply: str, payload: bytes) -> None:
        self._publish(reply, payload, "")

    def _publish(self, subject: str, payload: bytes, reply: str) -> None:
        self._check(subject, payload)
        message = Message(subject, payload, reply)
        self._send(self._fate("publish", subject), partial(self._server.route, message), message=True)

    async def request(self, subject: str, payload: bytes, *, timeout_s: float, alone: bool = False) -> bytes:
        self._check(subject, payload)
        self._requests += 1
        inbox = f"{self._inbox}.{self._requests}"
        message = Message(subject, payload, inbox)
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        fate = self._fate("request", subject)
        if fate != "drop_reply":
            self._waiting[inbox] = future

        def arrive() -> None:
            if not self._server.route(message) and fate != "drop_reply":
                nobody = Unavailable(f"nobody listens on {subject}: is its node there?")
                self._down.send(partial(_fail, future, nobody))

        self._send(fate, arrive, message=True)
        try:
            return await self._answer(future, subject, timeout_s)
        finally:
            self._waiting.pop(inbox, None)

    async def subscribe(self, subject: str, handler: Handler) -> MemorySubscription:
        subscription = MemorySubscription(self, subject, handler)
        await self._call("deliver", subject, partial(self._server.add, subscription), SETUP_TIMEOUT_S)
        return subscription

    # -- streams ---------------------------------------------------------------------------------------------------
    async def append(
        self, subject: str, payload: bytes, *, expected: int | None, timeout_s: float,
        rollup: bool = False, ttl_s: float | None = None, discard: bool = False,
    ) -> int:  # fmt: skip
        payload = b"" if discard else payload
        store = partial(self._store, subject, payload, expected=expected, rollup=rollup, ttl_s=ttl_s, discard=discard)
        self._check_stored(subject, payload)
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._ask(self._fate("append", subject), store, future)
        try:
            return await self._answer(future, subject, timeout_s)
        except Timeout as error:
            raise _in_doubt(subject, timeout_s) from error

    def append_then(
        self, subject: str, payload: bytes, *, expected: int, timeout_s: float, then: Appended, rollup: bool = False
    ) -> None:
        def ended(outcome: int | FerryError) -> None:
            timer.cancel()
            self._in_flight.discard(told)
            then(_in_doubt(subject, timeout_s) if isinstance(outcome, Timeout) else outcome)

        store = partial(self._store, subject, payload, expected=expected, rollup=rollup, ttl_s=None, discard=False)
        self._check_stored(subject, payload)
        told = _Told(ended)
        timer = asyncio.get_running_loop().call_later(timeout_s, _fail, told, _too_late(subject, timeout_s))
        self._in_flight.add(told)
        self._ask(self._fate("append", subject), store, told)

    def _store(self, subject: str, payload: bytes, *, discard: bool, **how: Any) -> int:
        server, stream = self._server, self._server.stream_of(subject)
        stored = stream.append(subject, payload, discard=discard, **how)
        if server.on_append is not None:
            server.on_append(Entry(sequence=stored, subject=subject, payload=payload, removed=discard))
        return stored

    async def last(self, stream: str, subject: str, *, timeout_s: float) -> Entry | None:
        fate = self._fate("read", subject)

        def look() -> Entry | None:
            stored = self._server.stream(stream)
            return stored.earlier(subject, self._server.stale_by) if fate == "stale" else stored.last(subject)

        return await self._call(fate, subject, look, timeout_s)

    async def read(self, stream: str, sequences: Sequence[int], *, timeout_s: float) -> list[Entry | None]:
        """Each is a question of its own, as with the real one: they may see different moments of the stream, and ask
        different replicas."""

        def look(sequence: int, fate: Fault) -> Entry | None:
            return self._server.stream(stream).at(sequence, lagging=fate == "stale")

        fates = [(one, self._fate("read", stream)) for one in sequences]
        return await asyncio.gather(
            *(self._call(fate, stream, partial(look, one, fate), timeout_s) for one, fate in fates)
        )

    async def purge(self, stream: str, subject: str, *, before: int, timeout_s: float) -> None:
        def remove() -> None:
            self._server.stream(stream).purge(subject, before=before)

        self._check_stored(subject, b"")
        await self._call(self._fate("append", subject), subject, remove, timeout_s)

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
        await self._call("deliver", spec.name, partial(self._server.ensure, spec), timeout_s)

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
        self._server.remove_link(self, self._inbox)
        for future in tuple(self._in_flight):
            _fail(future, Timeout("the link was closed while waiting for an answer"))

    # -- over the wires --------------------------------------------------------------------------------------------
    async def _call(
        self, fate: Fault, subject: str, operation: Callable[[], T], timeout_s: float, *, closing: bool = False
    ) -> T:
        """Run `operation` at the server and bring back what it returns or raises."""
        if not closing:
            self._check(subject, b"")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._ask(fate, operation, future)
        return await self._answer(future, subject, timeout_s)

    def _ask(self, fate: Fault, operation: Callable[[], T], future: asyncio.Future[T] | _Told[T]) -> None:
        """Send `operation` to the server; what it returns or raises there will be in the future."""

        def arrive() -> None:
            try:
                answer = partial(_resolve, future, operation())
            except FerryError as error:
                answer = partial(_fail, future, error)
            if fate != "drop_reply":
                self._down.send(answer)

        self._send(fate, arrive)

    async def _answer(self, future: asyncio.Future[T], subject: str, timeout_s: float) -> T:
        timer = asyncio.get_running_loop().call_later(timeout_s, _fail, future, _too_late(subject, timeout_s))
        self._in_flight.add(future)
        try:
            return await future
        finally:
            timer.cancel()
            self._in_flight.discard(future)

    def _send(self, fate: Fault, arrive: Callable[[], object], *, message: bool = False) -> None:
        if fate == "late":
            self._up.send_late(arrive)
        elif fate != "drop_request":
            self._up.send(arrive)
            if message and fate == "double":
                self._up.send_late(arrive)

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

    def _check_stored(self, subject: str, payload: bytes) -> None:
        if self.in_doubt:
            raise Unavailable(f"{subject} was not stored: not known yet whether this is the same cluster as before")
        self._check(subject, payload)

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
    """One direction of one connection: first in, first out, each after the latency of its moment.

    What arrives is run in `context`: that of the process at this end, or the network's.
    """

    def __init__(self, server: MemoryNats, context: Context, latency: Callable[[], float] | None = None) -> None:
        self.blocked = False
        self._server, self._context, self._own_latency = server, context, latency
        self._queue: deque[Callable[[], object]] = deque()
        self._ready_at = -math.inf
        self._cuts = 0

    def send(self, arrive: Callable[[], object]) -> None:
        if self.blocked:
            return
        loop = asyncio.get_running_loop()
        latency = self._own_latency or self._server.latency
        latency_s = latency() if latency is not None else 0.0
        self._ready_at = max(self._ready_at, loop.time() + latency_s)
        self._queue.append(arrive)
        # Timers of equal time run in any order, so each takes the head of the queue rather than its own message.
        if self._ready_at <= loop.time():
            loop.call_soon(self._arrive, self._cuts, context=self._context)
        else:
            loop.call_at(self._ready_at, self._arrive, self._cuts, context=self._context)

    def send_late(self, arrive: Callable[[], object]) -> None:
        """Something that strays through the network, behind what is sent after it, whatever becomes of the wire."""
        if not self.blocked:
            asyncio.get_running_loop().call_later(self._server.late_s, arrive, context=self._context)

    def call_soon(self, call: Callable[..., object], *arguments: Any) -> None:
        asyncio.get_running_loop().call_soon(call, *arguments, context=self._context)

    def cut(self) -> None:
        self._queue.clear()
        self._cuts += 1
        self._ready_at = -math.inf

    def block(self) -> None:
        self.cut()
        self.blocked = True

    def unblock(self) -> None:
        self.blocked = False

    def _arrive(self, cuts: int) -> None:
        if cuts == self._cuts:
            self._queue.popleft()()


class MemorySubscription:
    def __init__(self, link: MemoryLink, subject: str, handler: Handler) -> None:
        self.link, self.subject, self.tokens = link, subject, tuple(subject.split("."))
        self._handler, self._stopped = handler, False

    def deliver(self, message: Message) -> None:
        if not self._stopped:
            self.link._guard(self.subject, self._handler, message)

    async def stop(self) -> None:
        self._stopped = True
        self.link._server.remove(self)


class _MemoryWatch:
    """A watch on one stream; attached at the server while its link is up."""

    def __init__(self, link: MemoryLink, server: MemoryNats, stream: str, subject: str, handler: EntryHandler) -> None:
        self._link, self._server, self._stream_name = link, server, stream
        self.tokens = tuple(subject.split("."))
        self._subject, self._handler, self._stopped = subject, handler, False
        self._stream: MemoryStream | None = None
        lag = server.watch_lag
        self._lagging = _Wire(server, server.context, partial(lag, link.name)) if lag is not None else None

    def attach(self) -> None:
        """Send what is stored, then follow. Runs at the server; raises Unavailable without the stream."""
        if self._stopped or self._stream is not None:
            return
        stream = self._server.stream(self._stream_name)
        newest = sorted(by_subject[-1] for by_subject in stream.by_subject.values())
        for sequence in newest:
            if matches(self.tokens, stream.entries[sequence].subject):
                self._link.receive(partial(self._deliver, stream.entries[sequence]))
        stream.watches.append(self)
        self._stream = stream

    def detach(self) -> None:
        if self._lagging is not None:
            self._lagging.cut()
        if self._stream is not None:
            self._stream.watches.remove(self)
            self._stream = None

    def send(self, entry: Entry) -> None:
        if self._lagging is None:
            self._link.receive(partial(self._deliver, entry))
        else:
            self._lagging.send(partial(self._send_if_stored, entry))

    def _send_if_stored(self, entry: Entry) -> None:
        if self._stream is not None and self._stream.entries.get(entry.sequence) is entry:
            self._link.receive(partial(self._deliver, entry))

    async def stop(self) -> None:
        self._stopped = True
        self.detach()
        if self in self._link._watches:
            self._link._watches.remove(self)

    def _deliver(self, entry: Entry) -> None:
        if not self._stopped:
            self._link._guard(self._subject, self._handler, entry)


class _Told(Generic[T]):
    """In a future's place where nobody awaits one: who is to be told, once."""

    def __init__(self, then: Callable[[T | FerryError], None]) -> None:
        self._then, self._done = then, False

    def done(self) -> bool:
        return self._done

    def set_result(self, outcome: T | FerryError) -> None:
        self._done = True
        self._then(outcome)

    set_exception = set_result


def _too_late(subject: str, timeout_s: float) -> Timeout:
    return Timeout(f"no answer from {subject} within {timeout_s:g} s: try again")


def _in_doubt(subject: str, timeout_s: float) -> InDoubt:
    return InDoubt(f"no acknowledgement for {subject} within {timeout_s:g} s: read its last message")


def _resolve(future: asyncio.Future[T] | _Told[T], value: T) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[Any] | _Told[Any], error: FerryError) -> None:
    if not future.done():
        future.set_exception(error)
