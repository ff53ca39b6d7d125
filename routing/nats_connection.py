"""One connection to NATS that comes back by itself, and a request multiplexer on top of it.

nats-py 2.16 reconnects on its own, but its reconnect can hang on a dead peer (nats-py #671), delivers what was
published before or during the outage afterwards, and gives up for good when the server closes with an error. So each
nats-py client here lives for one TCP connection only; when it dies, for whatever reason, the supervisor aborts it
and makes a new one:

    attached -> dead (noticed at once, or by unanswered pings after 1.5 s) -> attaching, for ever -> attached

Two more of its traps shape this file: `flush()` sends its ping *ahead* of what waits in the client's buffer, and a
ping given up on kills the read loop when its pong comes late. So the barrier is a message to our own inbox.

Messages go past nats-py's queues (routing/nats_wire.py), questions and answers of one turn of the event loop travel
together (routing/nats_packing.py), and all answers come to one inbox (routing/nats_answers.py).
"""

from __future__ import annotations

import asyncio
import ssl
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from nats import errors as nats_errors

from routing.errors import HANDLER_ERRORS, FerryError, Incompatible, InvalidInput, PayloadTooLarge, Timeout, Unavailable
from routing.logs import get_logger
from routing.nats_answers import Answers, Headed, Told
from routing.nats_packing import FRAME_BYTES, FRAME_MESSAGES, INBOX_MARK, PACKED_BYTES, TOKEN_DIGITS, Outbox, Parcel
from routing.nats_url import parts, with_secrets_of, without_secrets
from routing.nats_wire import HEADERS_BYTES, NotEncryptedError, Receive, WireClient

log = get_logger("ferry.nats")

MIN_SERVER_VERSION = (2, 12, 3)  # earlier ones lose acknowledged messages or lack per-message time to live
PING_INTERVAL_S = 0.5  # with two pings unanswered a dead link is noticed in 1.5 s; a lease lasts 5 s by default
MAX_PINGS_UNANSWERED = 2
RECONNECT_WAIT_S = 0.15  # longer adds to every blackout, shorter hammers a server that is starting
WATCHDOG_S = 0.1  # how late a client that hangs while closing is noticed
BARRIER_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 1.0
MAX_UNSENT_BYTES = 8 * 2**20  # beyond it senders wait for the server; the transport would buffer without end
NO_RESPONDERS = b"NATS/1.0 503"
SEND_ERRORS = (nats_errors.Error, UnicodeEncodeError)  # of a connection that is closed, of what is no subject


@dataclass(slots=True, eq=False)
class Registration:
    """A subscription that outlives clients: made again on each new one."""

    subject: str
    receive: Receive
    current: tuple[WireClient, bytes] | None = None


class NatsConnection:
    """Publish, request and subscribe over whichever client is attached now.

    Invariant: nothing is handed to a client that is not attached, so nothing waits for a reconnect. What a client
    still held when its connection died is dropped with it; only bytes already in the kernel may arrive late.
    """

    def __init__(self, url: str, *, name: str, inbox_prefix: str, connect_timeout_s: float) -> None:
        self.url = ",".join(without_secrets(part) for part in parts(url))
        self.inbox = f"{inbox_prefix}.{uuid.uuid4().hex}"
        self.server_version, self.max_payload = "", 0
        self._last_error = ""
        self.handler_errors = self.client_errors = self.reconnects = 0
        self.reconnect_callbacks: list[Callable[[], None]] = []
        self._servers, self._name, self._connect_timeout_s = parts(url), name, connect_timeout_s
        self._loop = asyncio.get_running_loop()
        self._client: WireClient | None = None
        self._died = asyncio.Event()
        self._answers = Answers(self.inbox)
        self._outbox = Outbox()
        self._flush_is_due = False
        self._barriers: set[asyncio.Future[bytes]] = set()
        self._registrations: dict[Registration, None] = {}
        self._supervisor: asyncio.Task[None] | None = None
        self._endings: set[asyncio.Task[None]] = set()
        self._closed = False

    # -- life ------------------------------------------------------------------------------------------------------
    async def open(self) -> None:
        """Connect once. Raises Unavailable when no server answers in time, Incompatible for a server we cannot use."""
        try:
            await self._attach()
        except (nats_errors.NoServersError, RuntimeError, OSError) as error:
            if isinstance(error, ssl.SSLCertVerificationError) and len(self._servers) == 1:  # another may be well
                raise Incompatible(
                    f"the NATS server at {self.url} shows a certificate that is not accepted here"
                    f" ({error.verify_message}): correct it, or the name in FERRY_NATS_URL, or name its authority's"
                    " certificate in SSL_CERT_FILE"
                ) from error
            raise Unavailable(
                f"no NATS server answers at {self.url} ({self._last_error or 'no answer'}):"
                " start one (`ferry up`, or nats-server -js), or correct FERRY_NATS_URL"
            ) from error
        except NotEncryptedError as error:
            raise Incompatible(
                f"the NATS server at {self.url} does not encrypt its connections: let it use TLS, or say nats:// in"
                " FERRY_NATS_URL"
            ) from error
        except nats_errors.Error as error:
            raise Incompatible(
                f"the NATS server at {self.url} refused the connection ({error}): check the user, password and"
                " permissions in FERRY_NATS_URL"
            ) from error
        self._supervisor = asyncio.create_task(self._supervise(), name=f"nats-supervisor-{self._name}")

    @property
    def connected(self) -> bool:
        return self._client is not None and self._client.is_connected

    async def close(self) -> None:
        """Wait until the server has what was published, at most CLOSE_TIMEOUT_S, then disconnect. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
        self._flush()
        client, self._client = self._client, None
        if client is not None:
            if client.is_connected:
                try:
                    await self._barrier(client, CLOSE_TIMEOUT_S)
                except Unavailable as error:
                    log.warning("closed without flushing", url=self.url, error=str(error))
            self._end(client)
        self._answers.close()
        if self._endings:
            await asyncio.wait(self._endings, timeout=2 * CLOSE_TIMEOUT_S)

    async def _supervise(self) -> None:
        while True:
            await self._until_dead()
            client, self._client = self._client, None
            if client is not None:
                log.warning("nats connection lost", url=self.url, error=str(client.last_error))
                self._end(client)
            for barrier in self._barriers:
                if not barrier.done():
                    barrier.set_exception(Unavailable(f"the connection to {self.url} was lost"))
            await self._attach_for_ever()
            self.reconnects += 1
            log.info("nats connection back", url=self.url, reconnects=self.reconnects)
            for callback in tuple(self.reconnect_callbacks):
                self.guard("on_reconnect", callback)

    async def _until_dead(self) -> None:
        # A client that hangs while closing never calls back, so its state is looked at as well.
        while self.connected:
            try:
                async with asyncio.timeout(WATCHDOG_S):
                    await self._died.wait()
            except TimeoutError:
                continue

    async def _attach_for_ever(self) -> None:
        reported = ""
        while True:
            try:
                return await self._attach()
            except Exception as error:  # whatever a starting or broken server makes nats-py raise, for ever is for ever
                reason = f"{type(error).__name__}: {error}"
            if reason != reported:  # several times a second the same is no news
                log.warning("nats not back yet", url=self.url, error=reason)
                reported = reason
            await asyncio.sleep(RECONNECT_WAIT_S)

    async def _attach(self) -> None:
        """Connect a new client and make every registration on it. Leaves nothing behind when it fails."""
        client, died = WireClient(self._flush), asyncio.Event()
        each_s = self._connect_timeout_s / len(self._servers)  # so that one silent server leaves time for the others

        async def on_closed() -> None:
            died.set()

        async def on_error(error: Exception) -> None:
            self._on_error(error, quiet=client is not self._client)

        try:
            async with asyncio.timeout(self._connect_timeout_s):
                # One life per client: no reconnect, and no buffering while not connected (pending_size=0). The
                # flusher's queue has no bound, because a full one would block the ping loop that notices a dead link.
                await client.connect(
                    self._servers, name=self._name, allow_reconnect=False, max_reconnect_attempts=1,
                    reconnect_time_wait=0.05, connect_timeout=each_s,
                    ping_interval=PING_INTERVAL_S, max_outstanding_pings=MAX_PINGS_UNANSWERED,
                    pending_size=0, flusher_queue_size=0, closed_cb=on_closed, error_cb=on_error,
                )  # fmt: skip
                self._check_version(client)
                client.listen(f"{self.inbox}.*", self._on_answer)
                for registration in self._registrations:
                    self._register_on(client, registration)
                await self._barrier(client, self._connect_timeout_s)
        except BaseException:
            self._end(client)
            raise
        discovered = [with_secrets_of(self._servers[0], server.geturl()) for server in client.discovered_servers]
        self._servers = list(dict.fromkeys([*self._servers, *discovered]))
        self.max_payload = client.max_payload
        self._outbox.frame_bytes = min(FRAME_BYTES, client.max_payload)
        self._client, self._died = client, died

    def _check_version(self, client: WireClient) -> None:
        version = client.connected_server_version
        found = (version.major, version.minor, version.patch)
        self.server_version = ".".join(str(number) for number in found)
        if found < MIN_SERVER_VERSION:
            raise Incompatible(
                f"the NATS server at {self.url} is version {self.server_version}: install"
                f" {'.'.join(str(number) for number in MIN_SERVER_VERSION)} or later"
            )

    def _end(self, client: WireClient) -> None:
        """Cut a client's connection and let its tasks finish in the background."""
        task = asyncio.create_task(_end_client(client), name=f"nats-ending-{self._name}")
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    # -- messages --------------------------------------------------------------------------------------------------
    def takes_more(self) -> bool:
        client = self._client
        if client is None or not client.is_connected:
            return False
        return client.unsent_bytes + self._outbox.waiting_bytes <= MAX_UNSENT_BYTES

    async def publish(self, subject: str, payload: bytes, *, reply: str = "") -> None:
        if self._too_much_waits(client := self._attached()):
            await self._barrier(client, BARRIER_TIMEOUT_S)
        self._hand_over(client, subject, payload, reply)

    def answer(self, reply: str, payload: bytes) -> None:
        """Publish to a reply subject without waiting. What is short leaves at the end of this turn, with others."""
        client = self._attached()
        if self._too_much_waits(client):
            raise Unavailable(f"the NATS server at {self.url} takes too little: {len(payload)} bytes not sent")
        if len(payload) > self.max_payload:
            raise self._too_large(reply, len(payload))
        inbox, mark, token = reply.rpartition(INBOX_MARK)
        if mark and token.isdecimal() and len(token) < TOKEN_DIGITS:
            self._pack(inbox + mark, int(token), payload)
        else:
            self._outbox.add_alone(reply, payload)
            self._flush_soon()

    async def request(self, subject: str, payload: bytes, *, timeout_s: float, alone: bool = False) -> bytes:
        """Ask another link; the first answer. Leaves at the end of this turn, perhaps together with others.

        Raises Unavailable when certainly nobody got the question, Timeout when nobody answered.
        """
        if alone or len(payload) > PACKED_BYTES:
            self._flush()  # it must not overtake what was asked before
            return await self.request_alone(subject, payload, timeout_s=timeout_s)
        if self._too_much_waits(client := self._attached()):
            await self._barrier(client, timeout_s)
        if subject.endswith(INBOX_MARK):  # it would be taken for an answer
            raise _translated(nats_errors.BadSubjectError(), subject, self.url)
        token, future = self._answers.expect(subject, timeout_s)
        try:
            if len(self._answers) > 1:
                self._pack(subject, token, payload)
            else:  # whoever is alone gains nothing by waiting for company
                self._hand_over(client, subject, payload, self._answers.reply_to(token))
                client.write_out()
            return await future
        finally:
            self._answers.forget(token)

    async def request_alone(self, subject: str, payload: bytes, *, timeout_s: float, headers: bytes = b"") -> bytes:
        """As `request`, in a message of its own: what the server itself answers does not come in frames.

        `headers` are lines, each with its end.
        """
        if self._too_much_waits(client := self._attached()):
            await self._barrier(client, timeout_s)
        token, future = self._answers.expect(subject, timeout_s)
        try:
            self._hand_over(client, subject, payload, self._answers.reply_to(token), headers)
            return await future
        finally:
            self._answers.forget(token)

    def request_then(self, subject: str, payload: bytes, told: Told, *, timeout_s: float, headers: bytes) -> None:
        """As `request_alone`, without anybody who waits: `told` hears of the answer or the error, and must not raise.

        What certainly was not sent is raised here.
        """
        client = self._attached()
        token = self._answers.expect_then(subject, timeout_s, told)
        try:
            self._hand_over(client, subject, payload, self._answers.reply_to(token), headers)
        except FerryError:
            self._answers.forget(token)
            raise

    async def request_several(self, subject: str, payloads: Sequence[bytes], *, timeout_s: float) -> list[Headed]:
        """As `request_all`, where the answers have headers that tell what they answer: headers and payload of each.

        In any order; when the time is up those that have come, however few. One token, one reply subject and one future
        do for all of them. There must be one question at least.
        """
        if self._too_much_waits(client := self._attached()):
            await self._barrier(client, timeout_s)
        token, future = self._answers.expect_several(subject, len(payloads), timeout_s)
        try:
            self._hand_over_several(client, subject, payloads, self._answers.reply_to_several(token))
            return await future
        finally:
            self._answers.forget(token)

    async def request_all(self, subject: str, payloads: Sequence[bytes], *, timeout_s: float) -> list[bytes]:
        """As `request_alone` for each of `payloads`, all at once; the answers in the same order."""
        if self._too_much_waits(client := self._attached()):
            await self._barrier(client, timeout_s)
        expected = [self._answers.expect(subject, timeout_s) for _ in payloads]
        try:
            for (token, _), payload in zip(expected, payloads, strict=True):
                self._hand_over(client, subject, payload, self._answers.reply_to(token))
            return [await future for _, future in expected]
        finally:
            for token, future in expected:
                self._answers.forget(token)
                if future.done() and not future.cancelled():
                    future.exception()  # of two that failed, the caller is told of one

    async def subscribe(self, subject: str, receive: Receive) -> Registration:
        """Returns once the server knows. Raises Unavailable when not connected."""
        client = self._attached()
        registration = Registration(subject, receive)
        self._registrations[registration] = None
        try:
            self._register_on(client, registration)
            await self._barrier(client, BARRIER_TIMEOUT_S)
        except SEND_ERRORS as error:
            self.unsubscribe(registration)
            raise _translated(error, subject, self.url) from error
        except BaseException:
            self.unsubscribe(registration)
            raise
        return registration

    def unsubscribe(self, registration: Registration) -> None:
        """Idempotent; a connection that is down forgets without asking."""
        self._registrations.pop(registration, None)
        current, registration.current = registration.current, None
        if current is None:
            return
        client, sid = current
        client.stop_listening(sid)

    async def round_trip_s(self, timeout_s: float = BARRIER_TIMEOUT_S) -> float:
        """Seconds for a message to the server and back, after everything sent before it."""
        began = time.perf_counter()  # uvloop's own clock ticks in milliseconds
        await self._barrier(self._attached(), timeout_s)
        return time.perf_counter() - began

    def guard(self, where: str, call: Callable[..., None], *arguments: Any) -> None:
        """Call a user's function; what it raises is counted and logged."""
        try:
            call(*arguments)
        except HANDLER_ERRORS:
            self.handler_failed(where)

    def handler_failed(self, where: str) -> None:
        """Count and log what a user's function has just raised."""
        self.handler_errors += 1
        log.exception("handler failed", where=where)

    def _attached(self) -> WireClient:
        client = self._client
        if client is None or not client.is_connected:
            if self._closed:
                raise Unavailable(f"the link to {self.url} is closed")
            raise Unavailable(f"not connected to NATS at {self.url}: reconnecting, try again")
        return client

    def _too_much_waits(self, client: WireClient) -> bool:
        """Whether the server has to take some of what was sent before more is."""
        return client.unsent_bytes + self._outbox.waiting_bytes > MAX_UNSENT_BYTES

    def _hand_over(
        self, client: WireClient, subject: str, payload: bytes, reply: str = "", headers: bytes = b""
    ) -> None:
        size = len(payload) + (len(headers) + HEADERS_BYTES if headers else 0)
        if size > self.max_payload:
            raise self._too_large(subject, size)
        try:
            client.send(subject, payload, reply, headers)
        except SEND_ERRORS as error:
            raise _translated(error, subject, self.url) from error

    def _hand_over_several(self, client: WireClient, subject: str, payloads: Sequence[bytes], reply: str) -> None:
        if (size := max(map(len, payloads))) > self.max_payload:
            raise self._too_large(subject, size)
        try:
            client.send_several(subject, payloads, reply)
        except SEND_ERRORS as error:
            raise _translated(error, subject, self.url) from error

    def _too_large(self, subject: str, size: int) -> PayloadTooLarge:
        """What is raised instead of sending what the server would close the connection for."""
        return PayloadTooLarge(f"{size} bytes for {subject}: the NATS server takes at most {self.max_payload}")

    def _register_on(self, client: WireClient, registration: Registration) -> None:
        receive = partial(self.guard, registration.subject, registration.receive)
        registration.current = client, client.listen(registration.subject, receive)

    async def _barrier(self, client: WireClient, timeout_s: float) -> None:
        """Return when the server has handled everything handed to `client` before. Raises Unavailable."""
        self._flush()
        token, future = self._answers.expect("the server", timeout_s)
        self._barriers.add(future)
        try:
            async with asyncio.timeout(timeout_s):
                client.send(self._answers.reply_to(token), b"")
                await future
        except (Timeout, TimeoutError, *SEND_ERRORS) as error:
            raise Unavailable(f"the NATS server at {self.url} took nothing for {timeout_s:g} s: try again") from error
        finally:
            self._barriers.discard(future)
            self._answers.forget(token)

    # -- messages that travel together -----------------------------------------------------------------------------
    def _pack(self, subject: str, token: int, payload: bytes) -> None:
        if self._outbox.add(subject, token, payload) >= FRAME_MESSAGES:
            self._flush()  # a frame is full, and whoever gets it can begin
        else:
            self._flush_soon()

    def _flush_soon(self) -> None:
        """At the end of this turn, or of this run of messages that are being delivered."""
        delivering = self._client is not None and self._client.delivering
        if not delivering and not self._flush_is_due:
            self._flush_is_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Send what waits in the outbox. A connection that was lost in this very turn drops it, as its own buffer."""
        self._flush_is_due = False
        for subject, parcel in self._outbox.take():
            to, reply, asking = self._envelope(subject, parcel)
            try:
                if self._client is None:
                    raise nats_errors.ConnectionClosedError
                self._client.send(to, parcel.payload, reply)
            except SEND_ERRORS as error:  # one that cannot go must not keep the others
                for token in asking:
                    self._answers.fail(token, _translated(error, subject, self.url))
                log.warning("not sent", subject=to, messages=len(parcel.tokens), error=str(error))
        if self._client is not None:
            self._client.write_out()

    def _envelope(self, subject: str, parcel: Parcel) -> tuple[str, str, tuple[int, ...]]:
        """(subject, reply, the tokens of the questions) of a parcel; an answer has neither of the latter."""
        if not parcel.tokens:
            return subject, "", ()
        if subject.endswith(INBOX_MARK):
            return (subject if parcel.is_frame else f"{subject}{parcel.tokens[0]}"), "", ()
        return subject, self._answers.reply_to_all(parcel.tokens), parcel.tokens

    def _on_answer(self, subject: str, _: str, payload: bytes, headers: bytes) -> None:
        try:
            if headers.startswith(NO_RESPONDERS):
                self._answers.nobody_listens(subject)
            else:
                self._answers.arrived(subject, payload, headers)
        except (InvalidInput, ValueError) as error:
            self.client_errors += 1
            log.warning("answer ignored", subject=subject, error=str(error))

    def _on_error(self, error: Exception, *, quiet: bool) -> None:
        self._last_error = str(error) or type(error).__name__
        if quiet:  # the client is on its way in or out; whoever attaches it reports
            return
        self.client_errors += 1
        log.warning("nats client error", url=self.url, error=f"{type(error).__name__}: {error}")


async def _end_client(client: WireClient) -> None:
    client.abort()  # or closing would wait for unsent bytes to leave, which on a dead link is for ever
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await client.close()
    except Exception as error:  # a client that never connected, or hangs: it is off the wire either way
        log.debug("nats client did not close", error=f"{type(error).__name__}: {error}")


def _translated(error: Exception, subject: str, url: str) -> FerryError:
    if isinstance(error, (nats_errors.BadSubjectError, UnicodeEncodeError)):
        return InvalidInput(f"{subject!r} is no NATS subject: remove blanks and empty tokens")
    return Unavailable(f"not connected to NATS at {url} ({error}): try again")
