"""The short way of messages: nothing of what the server sends is lost, reordered or kept from nats-py."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st
from nats.errors import BadSubjectError, ConnectionClosedError

from routing.nats_wire import WireClient, _Messages, _way, headers_of
from tests.contract.waiting import WAIT_S

if TYPE_CHECKING:
    from tests.contract.conftest import NatsServer


SUBJECTS = st.sampled_from([b"a", b"ferry.default.cmd.a", "grün".encode()])
MESSAGES = st.tuples(SUBJECTS, st.sampled_from([b"", b"_INBOX.x.~1"]), st.binary(max_size=60), st.booleans())
LINES = st.sampled_from([b"PING\r\n", b"+OK\r\n", b'INFO {"server_id":"MSG a f1 0"}\r\n', b"-ERR 'slow'\r\n"])


WORDS = st.text(st.characters(codec="utf-8") | st.sampled_from(" \t\r\n\x0b\x1c\x85\u2028\u200b\u3000"), max_size=8)


@given(WORDS, WORDS)
def test_neither_subject_nor_reply_has_a_blank_of_any_kind(subject: str, reply: str) -> None:
    """The quick look at both agrees with the rule for each."""
    if subject and not any(character.isspace() for character in subject + reply):
        assert _way(subject, reply) == f"{subject} {reply}".encode()
    else:
        with pytest.raises(BadSubjectError):
            _way(subject, reply)


class Heard:
    """What a client's receivers are told, and what is left to nats-py's own protocol."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, str, bytes, bytes]] = []
        self.rest = b""
        self.runs = 0
        self.delivering = self.aborted = False
        self.receivers = {b"f1": self._receive}
        rest: Any = self
        client: Any = self
        self.protocol = _Messages(client, rest)

    def _receive(self, subject: str, reply: str, payload: bytes, headers: bytes) -> None:
        assert self.delivering
        self.messages.append((subject, reply, payload, headers))

    def delivered(self) -> None:
        assert not self.delivering
        self.runs += 1

    def write_out(self) -> None: ...

    def abort(self) -> None:
        self.aborted = True

    def data_received(self, data: bytes) -> None:
        self.rest += data

    def eof_received(self) -> bool:
        return True

    def connection_lost(self, error: Exception | None) -> None: ...

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...


def sent(message: tuple[bytes, bytes, bytes, bool], *, sid: bytes = b"f1") -> bytes:
    subject, reply, payload, with_headers = message
    to = b" ".join(part for part in (subject, sid, reply) if part)
    if not with_headers:
        return b"MSG %b %d\r\n%b\r\n" % (to, len(payload), payload)
    headers = b"NATS/1.0\r\nA: b\r\n\r\n"
    return b"HMSG %b %d %d\r\n%b%b\r\n" % (to, len(headers), len(headers) + len(payload), headers, payload)


@given(st.lists(MESSAGES | LINES, max_size=12), st.data())
def test_however_it_is_cut_everything_arrives_once_and_in_order(parts: list[Any], data: st.DataObject) -> None:
    """A read of the transport begins and ends anywhere, in the midst of a line or of a payload that looks like one."""
    stream = b"".join(part if isinstance(part, bytes) else sent(part) for part in parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    heard = Heard()

    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        heard.protocol.data_received(stream[begin:end])

    wanted = [part for part in parts if not isinstance(part, bytes)]
    assert [(s.encode(), r.encode(), p, bool(h)) for s, r, p, h in heard.messages] == wanted
    assert heard.rest == b"".join(part for part in parts if isinstance(part, bytes))


def test_a_message_for_nobody_any_more_is_passed_over() -> None:
    """It crossed the end of its subscription; the one behind it arrives."""
    heard = Heard()
    last = (b"a", b"", b"last", False)

    heard.protocol.data_received(sent((b"a", b"", b"first", False), sid=b"f2") + sent(last))

    assert [payload for _, _, payload, _ in heard.messages] == [b"last"]


def test_a_subject_that_is_no_text_costs_nobody_the_connection() -> None:
    """Anybody who may publish can publish to one, and a subscription with a wildcard hears it."""
    heard = Heard()

    heard.protocol.data_received(sent((b"a.\xff", b"\xff", b"odd", False)))

    assert heard.messages == [("a.\ufffd", "\ufffd", b"odd", b"")]


@pytest.mark.parametrize(
    "line",
    [b"MSG a f1 x\r\n", b"MSG 1\r\n", b"HMSG a 3 3\r\n", b"HMSG a f1 4 3\r\n", b"MSG a f1 b x 3\r\nabc\r\n"],
)
def test_what_no_server_sends_ends_the_connection(line: bytes) -> None:
    """To go on in the middle of something would be to invent messages."""
    heard = Heard()

    heard.protocol.data_received(line)

    assert heard.aborted
    assert heard.messages == []
    assert not heard.delivering


@pytest.mark.parametrize(
    ("raw", "headers"),
    [
        (b"NATS/1.0\r\nA: b\r\nC:d\r\n\r\n", {"A": "b", "C": "d"}),
        (b"NATS/1.0 503\r\n\r\n", {"Status": "503"}),
        (
            b"NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: 7\r\n\r\n",
            {"Status": "100", "Nats-Last-Consumer": "7"},
        ),
    ],
)
def test_headers_are_read_as_the_server_writes_them(raw: bytes, headers: dict[str, str]) -> None:
    """A status stands in the first line, without a name."""
    assert headers_of(raw) == headers


async def connected(server: NatsServer) -> WireClient:
    client = WireClient(lambda: None)
    await client.connect(server.url, allow_reconnect=False)
    return client


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_nats_py_hears_all_that_is_no_message(nats_server: NatsServer, loop: str) -> None:
    """Its own ping is answered beside our messages, a large one comes whole, and the end of the connection is heard."""

    async def talk() -> list[bytes]:
        ended = asyncio.Event()

        async def on_closed() -> None:
            ended.set()

        client = WireClient(lambda: None)
        await client.connect(nats_server.url, allow_reconnect=False, closed_cb=on_closed)
        heard: list[bytes] = []
        client.listen("news", lambda subject, reply, payload, headers: heard.append(payload))
        for payload in (b"small", bytes(200_000)):
            client.send("news", payload, headers=b"A: b\r\n")
            client.write_out()
            await client.flush(timeout=int(WAIT_S))
        client.abort()
        async with asyncio.timeout(WAIT_S):
            await ended.wait()
        return heard

    heard = await (talk() if loop == "asyncio" else asyncio.to_thread(uvloop.run, talk()))

    assert heard == [b"small", bytes(200_000)]


async def test_what_is_sent_in_one_turn_leaves_at_its_end_and_is_counted_until_then(nats_server: NatsServer) -> None:
    """To write costs as much as all else about a message."""
    client = await connected(nats_server)
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    client.listen("news", lambda subject, reply, payload, headers: heard.put_nowait(payload))

    for number in range(3):
        client.send("news", b"%d" % number)
    waiting = client.unsent_bytes
    await asyncio.sleep(0)

    assert waiting > 0
    assert client.unsent_bytes == 0
    async with asyncio.timeout(WAIT_S):
        assert [await heard.get() for _ in range(3)] == [b"0", b"1", b"2"]
    await client.close()


@pytest.mark.parametrize("subject", ["", "a b", "a\r\nPUB b 0\r\n", "a\tb"])
async def test_no_subject_ends_its_line(nats_server: NatsServer, subject: str) -> None:
    """Nor is it taken for two words: what is no subject is refused before anything is sent."""
    client = await connected(nats_server)

    with pytest.raises(BadSubjectError):
        client.send(subject, b"")
    with pytest.raises(BadSubjectError):
        client.send("a", b"", f"x{subject or ' '}")
    with pytest.raises(BadSubjectError):
        client.listen(subject, lambda *_: None)

    assert client.unsent_bytes == 0
    await client.close()


async def test_after_the_end_nothing_is_sent(nats_server: NatsServer) -> None:
    """Whoever sends over a connection that has just closed is told, also before nats-py knows."""
    client = await connected(nats_server)
    sid = client.listen("news", lambda *_: None)

    client.abort()

    with pytest.raises(ConnectionClosedError):
        client.send("news", b"")
    client.stop_listening(sid)
    client.write_out()
    await client.close()


@pytest.mark.parametrize("blank", ["\x0b", "\x0c", "\x1c", "\x85", "\xa0", "\u2028"])
async def test_what_only_python_takes_for_blank_may_stand_in_a_subject(nats_server: NatsServer, blank: str) -> None:
    """The server delivers such a subject as it is. Taken apart there, it would reach whom its sender names in it."""
    client = await connected(nats_server)
    heard: dict[str, list[str]] = {"answers": [], "odd": []}
    client.listen("answers", lambda subject, *_: heard["answers"].append(subject))
    client.listen("odd.*", lambda subject, *_: heard["odd"].append(subject))
    client.write_out()

    for subject in (f"odd.{blank}f1", f"odd.x{blank}f1{blank}y", "odd.last"):
        client._out.write(f"PUB {subject} 0\r\n\r\n".encode())
    await client.flush(timeout=int(WAIT_S))

    assert heard == {"answers": [], "odd": [f"odd.{blank}f1", f"odd.x{blank}f1{blank}y", "odd.last"]}
    await client.close()
