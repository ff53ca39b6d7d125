"""The real Link: NATS and JetStream through nats-py.

The connection and its traps are in `nats_connection`, watches in `nats_watch`; here is what the verbs of
`routing.link.Link` mean in JetStream's own requests. Which message is the last one of its subject is asked of the
stream's leader (`STREAM.MSG.GET`): direct gets may be served by followers and were stale 0.6-2 % of the time right
after an acknowledgement. What stands at a sequence is the same on all replicas that have it, so there they will do.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

import orjson
from msgspec import Struct
from msgspec.json import Decoder

from routing.errors import (
    HANDLER_ERRORS,
    FerryError,
    Incompatible,
    InDoubt,
    PayloadTooLarge,
    Timeout,
    Unavailable,
    WrongSequence,
)
from routing.link import Appended, Entry, EntryHandler, Handler, Message, StreamSpec
from routing.logs import get_logger
from routing.nats_connection import NatsConnection, Registration
from routing.nats_packing import FRAME_MARK, INBOX_MARK, unpack
from routing.nats_stored import entry_in_document, entry_in_message
from routing.nats_watch import Watch
from routing.typed import UNREADABLE, Count

log = get_logger("ferry.nats")

MARKER_TTL_S = 86_400  # removal markers; a watcher cut off for longer than this misses an expiry
MIN_TTL_S = 1  # JetStream's own minimum and granularity
DIRECT_SHARE = 0.5  # of the time of a read; then the leader is asked for what has not come
DIRECT_AGAIN_S = 10.0  # after a silence, until direct gets are tried again
EXPECTED = b"Nats-Expected-Last-Subject-Sequence: %d\r\n"
ROLLUP = b"Nats-Rollup: sub\r\n"
_NANOSECONDS = 1_000_000_000

# JetStream's err_code values (nats-server, server/errors.json).
_WRONG_SEQUENCE = (10071, 10164)  # refused; and "an append on this subject is still in flight", at three replicas
_TOO_LARGE = (10054, 10097)
_NOT_ALLOWED = (10111, 10165, 10166)  # rollup or time to live, on a stream made without
_NOT_SERVED = (10008, 10009, 10039, 10059, 10076)  # refused before anything was stored
_STREAM_EXISTS = 10058

_DIRECT = "allow_direct"


class _Acknowledgement(Struct):
    """The server's answer to an append."""

    seq: Count = 0  # counted from 1
    error: dict[str, Any] | None = None


_read_acknowledgement = Decoder(_Acknowledgement).decode


class NatsLink:
    """One connection to NATS, as `routing.link.Link` describes it. Make it with `connect`.

    `handler_errors`, `client_errors` and `reconnects` count what went wrong and was survived.
    """

    def __init__(self, connection: NatsConnection) -> None:
        self._connection = connection
        self.in_doubt = False
        self._watches: set[_LinkWatch] = set()
        self._direct: dict[str, float] = {}  # streams that allow direct gets -> not before when, on the loop's clock
        # Every command's: not even a call more.
        self.request, self.answer, self.takes_more = connection.request, connection.answer, connection.takes_more

    @classmethod
    async def connect(
        cls, url: str, *, name: str, inbox_prefix: str = "_INBOX", connect_timeout_s: float = 5.0
    ) -> NatsLink:
        """Connect to one of the servers in `url` (several are separated by commas), and from then on for ever again.

        `name` shows in the server's monitoring. Server permissions must let the connection subscribe under
        `inbox_prefix`, and publish to the inboxes of those whom it answers. Raises Unavailable when none answers within
        `connect_timeout_s`, Incompatible when it refuses us, is older than 2.12.3, or has no JetStream.
        """
        connection = NatsConnection(url, name=name, inbox_prefix=inbox_prefix, connect_timeout_s=connect_timeout_s)
        await connection.open()
        try:
            await _check_jetstream(connection, connect_timeout_s)
        except BaseException:
            await connection.close()
            raise
        return cls(connection)

    # -- what `ferry doctor` asks ----------------------------------------------------------------------------------
    @property
    def connected(self) -> bool:
        return self._connection.connected

    @property
    def url(self) -> str:
        return self._connection.url

    @property
    def server_version(self) -> str:
        return self._connection.server_version

    @property
    def max_payload(self) -> int:
        """Largest message in bytes, headers included."""
        return self._connection.max_payload

    @property
    def handler_errors(self) -> int:
        return self._connection.handler_errors

    @property
    def client_errors(self) -> int:
        return self._connection.client_errors

    @property
    def reconnects(self) -> int:
        return self._connection.reconnects

    async def rtt(self) -> float:
        """Seconds to the server and back, behind everything already sent. Raises Unavailable."""
        return await self._connection.round_trip_s()

    # -- messages --------------------------------------------------------------------------------------------------
    async def publish(self, subject: str, payload: bytes, *, reply: str = "") -> None:
        await self._connection.publish(subject, payload, reply=reply)

    async def subscribe(self, subject: str, handler: Handler) -> _LinkSubscription:
        connection = self._connection

        def receive(to: str, reply: str, data: bytes, _headers: bytes) -> None:
            inbox, frame, _ = reply.rpartition(FRAME_MARK)
            if not frame:
                handler(Message(to, data, reply))
                return
            mark = f"{inbox}{INBOX_MARK}"
            for token, payload in unpack(data):
                try:
                    handler(Message(to, payload, f"{mark}{token}"))
                except HANDLER_ERRORS:  # what one is to the handler must not cost the others
                    connection.handler_failed(subject)

        return _LinkSubscription(connection, await connection.subscribe(subject, receive))

    # -- streams ---------------------------------------------------------------------------------------------------
    async def append(
        self, subject: str, payload: bytes, *, expected: int | None, timeout_s: float,
        rollup: bool = False, ttl_s: float | None = None, discard: bool = False,
    ) -> int:  # fmt: skip
        """See Link.append. WrongSequence also means that another append on the subject is still in flight (three
        replicas): either way, read again before deciding again."""
        self._check_certain(subject)
        headers = b"" if expected is None else EXPECTED % expected
        if rollup:
            headers += ROLLUP
        if ttl_s is not None:
            headers += b"Nats-TTL: %ds\r\n" % max(MIN_TTL_S, math.ceil(ttl_s))
        if discard:
            headers += b"KV-Operation: DEL\r\n"
            payload = b""
        try:
            acknowledged = await self._connection.request_alone(subject, payload, timeout_s=timeout_s, headers=headers)
        except Timeout as error:
            raise _append_in_doubt(subject, timeout_s) from error
        return _sequence_in(subject, expected, acknowledged)

    def append_then(
        self, subject: str, payload: bytes, *, expected: int, timeout_s: float, then: Appended, rollup: bool = False
    ) -> None:
        self._check_certain(subject)
        headers = EXPECTED % expected
        if rollup:
            headers += ROLLUP
        told = _Appending(subject, expected, timeout_s, then)
        self._connection.request_then(subject, payload, told, timeout_s=timeout_s, headers=headers)

    async def last(self, stream: str, subject: str, *, timeout_s: float) -> Entry | None:
        return (await self._stored(stream, [{"last_by_subj": subject}], timeout_s))[0]

    async def read(self, stream: str, sequences: Sequence[int], *, timeout_s: float) -> list[Entry | None]:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        found = await self._direct_gets(stream, sequences, timeout_s * DIRECT_SHARE)
        if missing := [sequence for sequence in sequences if sequence not in found]:
            left_s = max(deadline_s - loop.time(), 0.0)
            entries = await self._stored(stream, [{"seq": sequence} for sequence in missing], left_s)
            found |= dict(zip(missing, entries, strict=True))
        return [found[sequence] for sequence in sequences]

    async def purge(self, stream: str, subject: str, *, before: int, timeout_s: float) -> None:
        self._check_certain(subject)
        answer = await self._ask(f"STREAM.PURGE.{stream}", {"filter": subject, "seq": before}, timeout_s)
        if (error := answer.get("error")) is not None:
            raise Unavailable(f"{subject} was not purged: {_said(error)}")

    async def watch(self, stream: str, subject: str, handler: EntryHandler, *, timeout_s: float) -> _LinkWatch:
        watch = _LinkWatch(Watch(self._connection, stream, subject, handler), self._watches)
        await watch.start(timeout_s)
        return watch

    async def ensure_stream(self, spec: StreamSpec, *, timeout_s: float) -> None:
        wanted = _stream_config(spec)
        answer = await self._ask(f"STREAM.CREATE.{spec.name}", wanted, timeout_s)
        error = answer.get("error")
        if error is None:
            self._note(spec.name, answer["config"])
            return
        if error.get("err_code") in _NOT_SERVED:
            raise Unavailable(f"stream {spec.name} cannot be created now: {_said(error)}")
        if error.get("err_code") != _STREAM_EXISTS:
            raise Incompatible(f"stream {spec.name} cannot be created: {_said(error)}")
        found = (await self._ask(f"STREAM.INFO.{spec.name}", None, timeout_s)).get("config", {})
        differing = [
            f"{field} is {found.get(field)!r}, not {value!r}"
            for field, value in wanted.items()
            if found.get(field) != value and (found.get(field) or value)  # the server leaves out what is false or zero
            if field != _DIRECT  # a stream of an earlier version: read more slowly
        ]
        if differing:
            raise Incompatible(
                f"stream {spec.name} exists with other settings: {'; '.join(differing)}:"
                " edit it with `nats stream edit`, or choose another FERRY_CLUSTER"
            )
        self._note(spec.name, found)

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        self._connection.reconnect_callbacks.append(callback)

    async def close(self) -> None:
        for watch in tuple(self._watches):
            await watch.stop()
        await self._connection.close()

    def _check_certain(self, subject: str) -> None:
        if self.in_doubt:
            raise Unavailable(f"{subject} was not stored: not known yet whether this is the same cluster as before")

    async def _stored(self, stream: str, which: Sequence[dict[str, Any]], timeout_s: float) -> list[Entry | None]:
        questions = [orjson.dumps(one) for one in which]
        answers = await self._connection.request_all(f"$JS.API.STREAM.MSG.GET.{stream}", questions, timeout_s=timeout_s)
        return [entry_in_document(stream, answer) for answer in answers]

    async def _direct_gets(self, stream: str, sequences: Sequence[int], timeout_s: float) -> dict[int, Entry | None]:
        """Those of the messages that the replicas which were asked have; none where direct gets are of no use now."""
        now_s = asyncio.get_running_loop().time()
        if not sequences or self._direct.get(stream, math.inf) > now_s:
            return {}
        questions = [b'{"seq":%d}' % sequence for sequence in sequences]
        subject = f"$JS.API.DIRECT.GET.{stream}"
        try:
            answers = await self._connection.request_several(subject, questions, timeout_s=timeout_s)
        except Unavailable:
            return {}  # not connected, or nobody serves them just now: the leader's answer, or its silence, counts
        if len(answers) < len(questions):  # a replica that says nothing would hold up every read
            if self._direct[stream] <= now_s:  # else another read, begun as this one was, has said so
                log.warning("direct gets not answered, the leader is asked", stream=stream)
            self._direct[stream] = now_s + timeout_s + DIRECT_AGAIN_S
        entries = [entry_in_message(headers, payload) for headers, payload in answers]
        return {entry.sequence: entry for entry in entries if entry is not None}

    def _note(self, stream: str, config: dict[str, Any]) -> None:
        self._direct.pop(stream, None)
        if config.get(_DIRECT):
            self._direct[stream] = 0.0

    async def _ask(self, verb: str, document: dict[str, Any] | None, timeout_s: float) -> dict[str, Any]:
        payload = orjson.dumps(document) if document is not None else b""
        answered = await self._connection.request_alone(f"$JS.API.{verb}", payload, timeout_s=timeout_s)
        answer: dict[str, Any] = orjson.loads(answered)
        return answer


class _Appending:
    """An append on its way, which tells `then` how it has ended: one object for each command, no closures."""

    __slots__ = ("_expected", "_subject", "_then", "_timeout_s")

    def __init__(self, subject: str, expected: int, timeout_s: float, then: Appended) -> None:
        self._subject, self._expected, self._timeout_s, self._then = subject, expected, timeout_s, then

    def done(self) -> bool:
        return False

    def set_result(self, acknowledged: bytes, /) -> None:
        try:
            outcome: int | FerryError = _sequence_in(self._subject, self._expected, acknowledged)
        except FerryError as error:
            outcome = error
        self._then(outcome)

    def set_exception(self, error: FerryError, /) -> None:
        self._then(_append_in_doubt(self._subject, self._timeout_s) if isinstance(error, Timeout) else error)


class _LinkSubscription:
    def __init__(self, connection: NatsConnection, registration: Registration) -> None:
        self._connection, self._registration = connection, registration

    async def stop(self) -> None:
        self._connection.unsubscribe(self._registration)


class _LinkWatch:
    """A running watch that its link can end."""

    def __init__(self, watch: Watch, running: set[_LinkWatch]) -> None:
        self._watch, self._running = watch, running

    async def start(self, timeout_s: float) -> None:
        await self._watch.start(timeout_s)
        self._running.add(self)

    async def stop(self) -> None:
        self._running.discard(self)
        await self._watch.stop()


async def _check_jetstream(connection: NatsConnection, timeout_s: float) -> None:
    mend = f"enable JetStream on the NATS server at {connection.url} (nats-server -js -sd DIRECTORY) for this account"
    try:
        answered = await connection.request_alone("$JS.API.INFO", b"", timeout_s=timeout_s)
    except Unavailable as error:
        if not connection.connected:
            raise
        raise Incompatible(f"NATS server {connection.server_version} has no JetStream: {mend}") from error
    except Timeout as error:
        raise Unavailable(f"JetStream at {connection.url} does not answer within {timeout_s:g} s: try again") from error
    refusal = orjson.loads(answered).get("error")
    if refusal is not None and refusal.get("err_code") == _NOT_SERVED[0]:
        raise Unavailable(f"JetStream at {connection.url} has no leader yet: try again")
    if refusal is not None:
        raise Incompatible(f"NATS server {connection.server_version} has no JetStream ({_said(refusal)}): {mend}")


def _sequence_in(subject: str, expected: int | None, acknowledged: bytes) -> int:
    """The sequence in the answer to an append. Raises what `Link.append` does where that is a refusal, or none."""
    try:
        answer = _read_acknowledgement(acknowledged)
        if answer.error is not None:
            raise _append_refused(subject, expected, answer.error)
        if not answer.seq:
            raise ValueError("no sequence")
        return answer.seq
    except UNREADABLE as error:
        raise InDoubt(f"unreadable acknowledgement {acknowledged[:80]!r} for {subject}: read again") from error


def _append_in_doubt(subject: str, timeout_s: float) -> InDoubt:
    return InDoubt(
        f"no acknowledgement for {subject} within {timeout_s:g} s: read its last message to learn the outcome"
    )


def _append_refused(subject: str, expected: int | None, error: dict[str, Any]) -> FerryError:
    code = error.get("err_code")
    if code in _WRONG_SEQUENCE:
        return WrongSequence(f"{subject} is no longer at sequence {expected} ({_said(error)}): read it again")
    if code in _TOO_LARGE:
        return PayloadTooLarge(f"message for {subject} exceeds its stream's limit: {_said(error)}")
    if code in _NOT_ALLOWED:
        return Incompatible(f"the stream of {subject} does not allow this append: {_said(error)}")
    if code in _NOT_SERVED:
        return Unavailable(f"{subject} was not stored: {_said(error)}")
    # Of any other refusal we do not know that it came before storing on every replica.
    return InDoubt(f"{subject} may not have been stored ({_said(error)}): read its last message")


def _said(error: dict[str, Any]) -> str:
    return f"{error.get('description')} [{error.get('err_code')}]"


def _stream_config(spec: StreamSpec) -> dict[str, Any]:
    config: dict[str, Any] = {
        "name": spec.name,
        "subjects": list(spec.subjects),
        "retention": "limits",
        "storage": "file",
        "discard": "new",  # never drop the oldest to make room: it may be the only copy
        "num_replicas": spec.replicas,
        "max_msgs_per_subject": spec.keep or -1,
        "max_msg_size": spec.max_message_bytes,
        _DIRECT: spec.direct,
        "allow_rollup_hdrs": True,  # which forbids deny_purge
        "deny_delete": True,
    }
    if spec.ttl:
        config["allow_msg_ttl"] = True
        config["subject_delete_marker_ttl"] = MARKER_TTL_S * _NANOSECONDS
    return config | spec.extra
