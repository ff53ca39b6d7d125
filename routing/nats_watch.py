"""A watch over stored subjects: an ephemeral ordered consumer, thrown away and begun again at the first doubt.

nats-py's own KV watch stays silent for about 19 s after a server restart. This one counts the consumer's sequence
numbers, expects a heartbeat twice a second, and begins again after a gap, three missed heartbeats or a reconnect.
"""

from __future__ import annotations

import asyncio
import uuid

import orjson

from routing.errors import Timeout, Unavailable
from routing.link import EntryHandler
from routing.logs import get_logger
from routing.nats_connection import NatsConnection, Registration
from routing.nats_stored import stored_entry
from routing.nats_wire import headers_of

log = get_logger("ferry.watch")

HEARTBEAT_S = 0.5
SILENCE_S = 3 * HEARTBEAT_S
INACTIVE_S = 10.0  # then the server removes a consumer nobody listens to; it outlasts a reconnect
RESTART_TIMEOUT_S = 5.0
RESTART_WAIT_S = 0.2
DELETE_TIMEOUT_S = 1.0
_NANOSECONDS = 1_000_000_000


class Watch:
    """Follows `subject` in `stream` until stopped. `start` once, `stop` at the end."""

    def __init__(self, connection: NatsConnection, stream: str, subject: str, handler: EntryHandler) -> None:
        self._connection, self._stream, self._subject, self._handler = connection, stream, subject, handler
        self.restarts = 0
        self._round = self._new_round()
        self._follower: asyncio.Task[None] | None = None
        self._on_reconnect = lambda: self._round.broken.set()  # consumers in server memory may be gone

    async def start(self, timeout_s: float) -> None:
        """Deliver what is stored, then follow. Raises Timeout, Unavailable; leaves nothing behind when it does."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._round.begin(timeout_s)
                await self._round.caught_up.wait()
        except TimeoutError as error:
            await self._round.end()
            raise Timeout(f"watching {self._subject} took more than {timeout_s:g} s: try again") from error
        except BaseException:
            await self._round.end()
            raise
        self._connection.reconnect_callbacks.append(self._on_reconnect)
        self._follower = asyncio.create_task(self._follow(), name=f"watch-{self._subject}")

    async def stop(self) -> None:
        """Stop delivery and remove the consumer. Idempotent."""
        follower, self._follower = self._follower, None
        if follower is None:
            return
        self._connection.reconnect_callbacks.remove(self._on_reconnect)
        follower.cancel()
        await asyncio.wait([follower])
        await self._round.end()

    async def _follow(self) -> None:
        while True:
            await self._round.until_broken()
            try:
                await self._round.end()
                self.restarts += 1
                self._round = self._new_round()
                await self._round.begin(RESTART_TIMEOUT_S)
            except Exception as error:  # a follower that ended here would leave its handler stale and silent
                log.warning("watch not back yet", subject=self._subject, error=f"{type(error).__name__}: {error}")
                self._round.broken.set()
                await asyncio.sleep(RESTART_WAIT_S)

    def _new_round(self) -> _Round:
        return _Round(self._connection, self._stream, self._subject, self._handler)


class _Round:
    """One consumer, from its creation to the first doubt about it.

    Invariant: entries reach the handler in the consumer's order without a gap; after a gap nothing more does.
    """

    def __init__(self, connection: NatsConnection, stream: str, subject: str, handler: EntryHandler) -> None:
        self.caught_up, self.broken = asyncio.Event(), asyncio.Event()
        self._connection, self._stream, self._subject, self._handler = connection, stream, subject, handler
        self._loop = asyncio.get_running_loop()
        self._consumer = f"ferry_{uuid.uuid4().hex}"
        self._registration: Registration | None = None
        self._created = False
        self._delivered = 0
        self._stored_at_begin: int | None = None  # entries to come before the handler is up to date
        self._heard_at = self._loop.time()

    async def begin(self, timeout_s: float) -> None:
        deliver_subject = f"{self._connection.inbox}.watch.{self._consumer}"
        self._registration = await self._connection.subscribe(deliver_subject, self._receive)
        config = {
            "name": self._consumer,
            "deliver_subject": deliver_subject,
            "deliver_policy": "last_per_subject",
            "filter_subject": self._subject,
            "ack_policy": "none",
            "replay_policy": "instant",
            "mem_storage": True,
            "num_replicas": 1,
            "max_deliver": 1,
            "idle_heartbeat": int(HEARTBEAT_S * _NANOSECONDS),
            "inactive_threshold": int(INACTIVE_S * _NANOSECONDS),
        }
        self._created = True  # from here on it may exist, whatever the answer says
        answered = await self._connection.request_alone(
            f"$JS.API.CONSUMER.CREATE.{self._stream}.{self._consumer}.{self._subject}",
            orjson.dumps({"stream_name": self._stream, "config": config, "action": "create"}), timeout_s=timeout_s,
        )  # fmt: skip
        answer = orjson.loads(answered)
        if "error" in answer:
            error = answer["error"]
            raise Unavailable(
                f"stream {self._stream} cannot be watched: {error.get('description')} ({error.get('err_code')}):"
                " start a node first, or check FERRY_CLUSTER"
            )
        self._heard_at = self._loop.time()
        self._stored_at_begin = int(answer["num_pending"]) + int(answer["delivered"]["consumer_seq"])
        self._note_progress()

    async def end(self) -> None:
        """Stop listening and remove the consumer, as far as the connection allows; the server removes it otherwise."""
        self.broken.set()
        registration, self._registration = self._registration, None
        if registration is not None:
            self._connection.unsubscribe(registration)
        created, self._created = self._created, False
        if not created:
            return
        try:
            await self._connection.request_alone(
                f"$JS.API.CONSUMER.DELETE.{self._stream}.{self._consumer}", b"", timeout_s=DELETE_TIMEOUT_S
            )
        except (Timeout, Unavailable) as error:
            log.debug("consumer left to expire", consumer=self._consumer, error=str(error))

    async def until_broken(self) -> None:
        while not self.broken.is_set():
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await self.broken.wait()
            except TimeoutError:
                silent_s = self._loop.time() - self._heard_at
                if silent_s > SILENCE_S and self._connection.connected:  # else the reconnect will break this round
                    log.warning("watch went silent", subject=self._subject, silent_s=round(silent_s, 2))
                    self.broken.set()

    def _receive(self, subject: str, reply: str, payload: bytes, raw_headers: bytes) -> None:
        self._heard_at = self._loop.time()
        if self.broken.is_set():
            return
        headers = headers_of(raw_headers) if raw_headers else {}
        if headers.get("Status"):  # a heartbeat, which names the last entry the server has sent
            if int(headers.get("Nats-Last-Consumer", self._delivered)) != self._delivered:
                self._lost(f"heartbeat after {headers['Nats-Last-Consumer']}")
            return
        sequence, consumer_sequence, pending = _positions(reply)
        if consumer_sequence != self._delivered + 1:
            self._lost(f"entry {consumer_sequence}")
            return
        try:
            self._handler(stored_entry(sequence, subject, payload, raw_headers))
        finally:  # an entry whose handler raised counts as delivered
            self._delivered = consumer_sequence
            if pending == 0:
                self.caught_up.set()
            self._note_progress()

    def _note_progress(self) -> None:
        if self._stored_at_begin is not None and self._delivered >= self._stored_at_begin:
            self.caught_up.set()

    def _lost(self, what: str) -> None:
        log.warning("watch has a gap", subject=self._subject, expected=self._delivered + 1, got=what)
        self.broken.set()


def _positions(reply: str) -> tuple[int, int, int]:
    """(stream sequence, consumer sequence, entries still to come) of a delivery, from its acknowledgement subject.

    `$JS.ACK.<stream>.<consumer>.<deliveries>.<stream seq>.<consumer seq>.<time>.<pending>`, newer servers put the
    domain and account behind `ACK` and a random token at the end.
    """
    tokens = reply.split(".")
    first = 5 if len(tokens) == 9 else 7
    return int(tokens[first]), int(tokens[first + 1]), int(tokens[first + 3])
