"""nats-py's client with a short way for messages: delivered where they are read, written where they are sent.

nats-py connects, authenticates, upgrades to TLS, notices a dead link and closes. But it hands each message that comes
to a queue and a task of its subscription, and each one that goes to the queue and the task of its flusher: turns of the
event loop, and as much processor time as all that Ferry does with the message. So these verbs of the NATS protocol are
spoken here, between the transport and nats-py, which hears everything else the server says:

    SUB subject sid     UNSUB sid     PUB subject reply size     HPUB subject reply headers size
    MSG subject sid reply size        HMSG subject sid reply headers size

What this needs beyond nats-py 2.16's public interface is the transport that a client writes to;
tests/contract/test_nats_wire.py holds what is expected of it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

from nats import errors as nats_errors
from nats.aio.client import Client

from routing.errors import InvalidInput
from routing.logs import get_logger

log = get_logger("ferry.nats")

# subject, reply ("" when nobody waits), payload, headers as they came (b"" when there are none)
Receive = Callable[[str, str, bytes, bytes], None]

_VERSION, _LINE_END = b"NATS/1.0\r\n", b"\r\n"
HEADERS_BYTES = len(_VERSION + _LINE_END)  # around the lines of a message's headers
_MSG, _HMSG = b"MSG", b"HMSG"
_BLANK = re.compile(r"\s")


class NotEncryptedError(nats_errors.Error):
    """A server that was asked for by `tls://` goes on without."""


class WireClient(Client):
    """A nats-py client whose messages go the short way. Everything before and after them is nats-py's.

    While messages that came together are handed to their receivers, `delivering` is set; then `delivered` is called.
    """

    def __init__(self, delivered: Callable[[], object]) -> None:
        super().__init__()
        self.delivering = False
        self.receivers: dict[bytes, Receive] = {}
        self.delivered = delivered
        self._listened = 0
        self._loop = asyncio.get_running_loop()
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0
        self._out: asyncio.Transport

    async def connect(self, *arguments: Any, **options: Any) -> None:
        await super().connect(*arguments, **options)
        writer: asyncio.StreamWriter = self._transport._io_writer  # type: ignore[union-attr]
        self._out = cast(asyncio.Transport, writer.transport)  # after TLS has taken its place
        self._out.set_protocol(_Messages(self, cast(asyncio.Protocol, self._out.get_protocol())))

    def _connect_command(self) -> bytes:
        """nats-py's, in which user and password go to the server.

        nats-py encrypts where the server wants it, whatever the URL says: who asked for `tls://` would tell a server
        that does not, or somebody in between. Raises NotEncryptedError.
        """
        writer: asyncio.StreamWriter = self._transport._io_writer  # type: ignore[union-attr]
        server = self._current_server
        if server is not None and server.uri.scheme == "tls" and writer.get_extra_info("ssl_object") is None:
            raise NotEncryptedError("the server does not encrypt its connections")
        command: bytes = super()._connect_command()
        return command

    @property
    def unsent_bytes(self) -> int:
        return self._out.get_write_buffer_size() + self._gathered_bytes

    def listen(self, subject: str, receive: Receive) -> bytes:
        """Have `receive` called, in order, with whatever comes on `subject`. It must not raise.

        Returns what to stop it by. Raises BadSubjectError, UnicodeEncodeError, ConnectionClosedError.
        """
        tokens = subject.split(".")
        if "" in tokens or ">" in tokens[:-1] or not _is_subject(subject):
            raise nats_errors.BadSubjectError
        self._listened += 1
        sid = b"f%d" % self._listened  # nats-py's own are numbers
        self._gather(b"SUB %b %b\r\n" % (subject.encode(), sid))
        self.receivers[sid] = receive
        return sid

    def stop_listening(self, sid: bytes) -> None:
        """Idempotent; with the connection closed there is nobody to be told."""
        if self.receivers.pop(sid, None) is not None and not self._out.is_closing():
            self._gather(b"UNSUB %b\r\n" % sid)

    def send(self, subject: str, payload: bytes, reply: str = "", headers: bytes = b"") -> None:
        """Publish; `headers` are lines, each with its end. Leaves with all that is sent in this turn of the event loop.

        Raises BadSubjectError, UnicodeEncodeError, and ConnectionClosedError, when nothing was sent.
        """
        way, size = _way(subject, reply), len(payload)
        if headers:
            head = len(headers) + HEADERS_BYTES
            self._gather(b"HPUB %b %d %d\r\n%b%b\r\n%b\r\n" % (way, head, head + size, _VERSION, headers, payload))
        else:
            self._gather(b"PUB %b %d\r\n%b\r\n" % (way, size, payload))

    def send_several(self, subject: str, payloads: Sequence[bytes], reply: str) -> None:
        """As `send` for each of `payloads`, without headers: where they go is looked at once."""
        way = _way(subject, reply)
        self._gather(b"".join([b"PUB %b %d\r\n%b\r\n" % (way, len(payload), payload) for payload in payloads]))

    def abort(self) -> None:
        """Cut the connection, which nats-py has no public way to do; unsent bytes are dropped. Idempotent."""
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:  # else it never had one
            writer.transport.abort()

    def _gather(self, message: bytes) -> None:
        if self._out.is_closing():  # nobody else may have heard of it yet, and what is written now goes nowhere
            raise nats_errors.ConnectionClosedError
        if not self._gathered:
            self._loop.call_soon(self.write_out)
        self._gathered.append(message)
        self._gathered_bytes += len(message)

    def write_out(self) -> None:
        """Write what was sent in this turn, in one go: to write costs as much as all else about a message."""
        if self._gathered:
            messages, self._gathered, self._gathered_bytes = self._gathered, [], 0
            self._out.writelines(messages)


class _Messages(asyncio.Protocol):
    """Takes the messages out of what the server sends; nats-py's own protocol gets the rest, as if it came to it.

    What has not come whole waits in pieces, which are joined once: a large message comes in many.
    """

    def __init__(self, client: WireClient, rest: asyncio.Protocol) -> None:
        self._client, self._rest = client, rest
        self._pieces: list[bytes] = []
        self._held_bytes = self._needed_bytes = 0
        self.eof_received, self.connection_lost = rest.eof_received, rest.connection_lost  # type: ignore[method-assign]
        self.pause_writing, self.resume_writing = rest.pause_writing, rest.resume_writing  # type: ignore[method-assign]

    def data_received(self, data: bytes) -> None:
        """Ends the connection at what no NATS server sends: to go on from there would be to invent messages."""
        self._held_bytes += len(data)
        if self._pieces:
            self._pieces.append(data)
            if self._held_bytes < self._needed_bytes:
                return
            data, self._pieces = b"".join(self._pieces), []
        self._client.delivering = True
        try:
            at = self._take(data)
        except InvalidInput as error:
            log.error("connection ended", error=str(error))
            self._client.abort()
            return
        finally:
            self._client.delivering = False
        self._held_bytes = len(data) - at
        if self._held_bytes:
            self._pieces = [data[at:]]
        self._client.delivered()

    def _take(self, data: bytes) -> int:
        """Hand over everything that has come whole; returns where what has not begins."""
        at, size, self._needed_bytes, receivers = 0, len(data), 0, self._client.receivers
        while at < size and (line := data.find(_LINE_END, at)) >= 0:
            begin, words = line + 2, data[at:line].split(b" ")  # not at what else is blank: a subject may hold that
            if words[0] != _MSG and words[0] != _HMSG:
                self._rest.data_received(data[at:begin])
                at = begin
                continue
            subject, sid, reply, head_bytes, body_bytes = _read(words)
            end = begin + body_bytes
            if end + 2 > size:
                self._needed_bytes = end + 2 - at
                break
            at, body = end + 2, begin + head_bytes
            if (receive := receivers.get(sid)) is not None:  # else it crossed the end of its subscription
                # NATS lets anybody publish to a subject that is no text.
                to = subject.decode("utf-8", "replace")
                answer_to = reply.decode("utf-8", "replace") if reply else ""
                receive(to, answer_to, data[body:end], data[begin:body])
        return at


def _read(words: list[bytes]) -> tuple[bytes, bytes, bytes, int, int]:
    """(subject, sid, reply, bytes of headers, bytes of headers and payload) of a message's first line."""
    try:
        if words[0] == _MSG:
            replies, head_bytes = len(words) - 4, 0
        else:
            replies, head_bytes = len(words) - 5, int(words[-2])
        body_bytes = int(words[-1])
        if not (0 <= replies <= 1 and 0 <= head_bytes <= body_bytes):
            raise ValueError("more or fewer words, or more headers than message")
    except (ValueError, IndexError) as error:
        raise InvalidInput(f"the NATS server sent the malformed line {b' '.join(words)[:80]!r}") from error
    return words[1], words[2], words[3] if replies else b"", head_bytes, body_bytes


def _is_subject(text: str) -> bool:
    return text != "" and _BLANK.search(text) is None


def _way(subject: str, reply: str) -> bytes:
    """Where a message goes and its answer, as the server reads it. Raises BadSubjectError, UnicodeEncodeError."""
    words = f"{subject} {reply}"
    if not (subject and words.isprintable() and words.count(" ") == 1) and (  # nearly all are: then neither has a blank
        not _is_subject(subject) or (reply and not _is_subject(reply))
    ):
        raise nats_errors.BadSubjectError
    return words.encode()


def headers_of(raw: bytes) -> dict[str, str]:
    """The headers of a message; `Status` as well where the first line has one, as the server's own messages do."""
    first, *lines = raw.decode(errors="replace").split("\r\n")
    found = {name.strip(): value.strip() for name, colon, value in (line.partition(":") for line in lines) if colon}
    status = first.split()[1:2]
    return found | {"Status": status[0]} if status else found
