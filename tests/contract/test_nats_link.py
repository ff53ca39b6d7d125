"""What only the real link can show: servers it cannot use, dead peers, and consumers that go wrong."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import uvloop
from nats.aio.client import Client

from routing.errors import Incompatible, InDoubt, InvalidInput, PayloadTooLarge, Timeout, Unavailable
from routing.link import Entry, Message, StreamSpec
from routing.nats_link import NatsLink, _sequence_in
from tests.contract.waiting import WAIT_S, handled

if TYPE_CHECKING:
    from tests.contract.conftest import NatsServer

BUCKET = StreamSpec(name="KV_map", subjects=("$KV.map.>",), keep=1)


class Proxy:
    """A way to the server that can go dead without closing: connections stall, new ones work."""

    def __init__(self, port: int) -> None:
        self.port = 0
        self._server_port = port
        self._listener: asyncio.Server | None = None
        self._flowing: list[asyncio.Event] = []
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> str:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = int(self._listener.sockets[0].getsockname()[1])
        return f"nats://127.0.0.1:{self.port}"

    def stall(self) -> None:
        for flowing in self._flowing:
            flowing.clear()

    def say(self, garbage: bytes) -> None:
        """To the client, as if the server had."""
        self._writers[-2].write(garbage)

    def resume(self) -> None:
        for flowing in self._flowing:
            flowing.set()

    async def stop(self) -> None:
        assert self._listener is not None
        self._listener.close()
        self.resume()
        await abort_all(self._writers)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        flowing = asyncio.Event()
        flowing.set()
        self._flowing.append(flowing)
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        self._writers += [writer, up_writer]
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_pump(reader, up_writer, flowing))
                group.create_task(_pump(up_reader, writer, flowing))
        except* OSError:
            pass  # one of the two sides is gone, which is what the test is about


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flowing: asyncio.Event) -> None:
    while await flowing.wait() and (data := await reader.read(65_536)):
        await flowing.wait()
        writer.write(data)
        await writer.drain()
    writer.transport.abort()


@pytest.fixture
async def proxy(nats_server: NatsServer) -> AsyncIterator[Proxy]:
    proxy = Proxy(nats_server.port)
    yield proxy
    await proxy.stop()


async def until_back(link: NatsLink) -> None:
    async with asyncio.timeout(WAIT_S):
        while link.reconnects == 0:  # noqa: ASYNC110 - no link tells when it is back
            await asyncio.sleep(0)


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_a_dead_server_is_reported_at_once_without_secrets() -> None:
    """Property: the first connect fails instead of retrying for minutes, and says where and what to do."""
    port = unused_port()

    async with asyncio.timeout(WAIT_S):
        with pytest.raises(Unavailable, match=f"127.0.0.1:{port}.*ferry up") as raised:
            await NatsLink.connect(f"nats://me:secret@127.0.0.1:{port}", name="test", connect_timeout_s=3_600)

    assert "secret" not in str(raised.value)


@asynccontextmanager
async def listening(
    script: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    """A peer that follows `script` on each connection; gives its port."""
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await script(reader, writer)

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield int(listener.sockets[0].getsockname()[1])
    finally:
        listener.close()
        await abort_all(writers)


async def abort_all(writers: list[asyncio.StreamWriter]) -> None:
    for writer in writers:
        writer.transport.abort()
    async with asyncio.timeout(WAIT_S):
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)


async def test_a_silent_server_is_given_up_after_the_connect_timeout() -> None:
    """Property: a peer that accepts and says nothing costs `connect_timeout_s`, no more."""

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with listening(say_nothing) as port, asyncio.timeout(WAIT_S):
        with pytest.raises(Unavailable, match=str(port)):
            await NatsLink.connect(f"nats://127.0.0.1:{port}", name="test", connect_timeout_s=0.2)


async def test_one_live_server_among_dead_ones_is_enough(nats_server: NatsServer) -> None:
    """Property: every server named is tried."""
    url = f"nats://127.0.0.1:{unused_port()}, {nats_server.url}"

    link = await NatsLink.connect(url, name="test")

    assert link.connected
    await link.close()


async def test_a_server_without_jetstream_is_incompatible(nats_server_without_jetstream: NatsServer) -> None:
    """Property: the error says how to switch JetStream on."""
    with pytest.raises(Incompatible, match=r"no JetStream.*-js"):
        await NatsLink.connect(nats_server_without_jetstream.url, name="test")


async def test_an_old_server_is_incompatible() -> None:
    """Property: the error names the version found and the one needed."""

    async def play_old_server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        document = {"server_id": "OLD", "version": "2.12.2", "headers": True, "max_payload": 1_048_576}
        writer.write(b"INFO " + json.dumps(document).encode() + b"\r\n")
        while line := await reader.readline():
            if line.startswith(b"PING"):
                writer.write(b"PONG\r\n")

    async with listening(play_old_server) as port:
        with pytest.raises(Incompatible, match=r"2\.12\.2.*2\.12\.3"):
            await NatsLink.connect(f"nats://127.0.0.1:{port}", name="test")


async def test_it_reports_what_doctor_shows(nats_server: NatsServer) -> None:
    """Property: version, limit and round trip of the server are known."""
    link = await nats_server.link("test")

    assert tuple(int(part) for part in link.server_version.split(".")) >= (2, 12, 3)
    assert link.max_payload == 256 * 1024
    assert await link.rtt() > 0
    assert link.url == nats_server.url


async def test_a_stalled_link_with_unsent_bytes_reconnects_and_drops_them(
    nats_server: NatsServer, proxy: Proxy
) -> None:
    """Property: a peer that went dead without closing, bytes still unsent (nats-py #671), is left for a new connection,
    and what waited for the dead one is not delivered after."""
    heard: asyncio.Queue[Message] = asyncio.Queue()
    bob = await nats_server.link("bob")
    await bob.subscribe("news", heard.put_nowait)
    alice = await NatsLink.connect(await proxy.start(), name="alice")
    back = asyncio.Event()
    alice.on_reconnect(back.set)

    proxy.stall()
    for _ in range(30):  # 7.5 MB, more than the kernel takes
        await alice.publish("news", bytes(250_000))
    await alice.publish("news", b"unsent")

    async with asyncio.timeout(WAIT_S):
        await back.wait()
        await alice.publish("news", b"after")
        received = [(await heard.get()).payload]
        while received[-1] != b"after":
            received.append((await heard.get()).payload)
    assert b"unsent" not in received
    assert len([c for c in psutil.Process().net_connections("tcp") if c.raddr and c.raddr.port == proxy.port]) == 1
    await alice.close()


async def test_senders_wait_for_a_stalled_link_no_longer_than_it_lives(nats_server: NatsServer, proxy: Proxy) -> None:
    """Property: a sender held back by unsent bytes gets Unavailable when the link is found dead."""
    alice = await NatsLink.connect(await proxy.start(), name="alice")

    proxy.stall()
    with pytest.raises(Unavailable):
        async with asyncio.timeout(WAIT_S):
            while True:
                await alice.publish("news", bytes(250_000))

    await alice.close()


async def test_garbage_from_the_server_costs_the_connection_and_nothing_else(
    nats_server: NatsServer, proxy: Proxy
) -> None:
    """Property: what cannot be read ends this connection, and the next one works."""
    alice = await NatsLink.connect(await proxy.start(), name="alice")
    back = asyncio.Event()
    alice.on_reconnect(back.set)

    proxy.say(b"MSG a f1 x\r\n")

    async with asyncio.timeout(WAIT_S):
        await back.wait()
    assert await alice.rtt() > 0
    await alice.close()


async def test_closing_waits_for_a_slow_server(nats_server: NatsServer, proxy: Proxy) -> None:
    """Property: bytes that the kernel did not take yet are delivered before the link closes."""
    heard: asyncio.Queue[Message] = asyncio.Queue()
    bob = await nats_server.link("bob")
    await bob.subscribe("news", heard.put_nowait)
    alice = await NatsLink.connect(await proxy.start(), name="alice")

    proxy.stall()
    for n in range(30):
        await alice.publish("news", bytes([n]) * 250_000)
    proxy.resume()
    await alice.close()

    async with asyncio.timeout(WAIT_S):
        assert [(await heard.get()).payload[0] for _ in range(30)] == list(range(30))


async def test_everything_goes_by_tls_and_comes_back(
    tls_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Property: an encrypted connection carries large messages, streams and watches, and is made again."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    alice, bob = await tls_server.link("alice"), await tls_server.link("bob")
    heard: asyncio.Queue[Message] = asyncio.Queue()
    seen: asyncio.Queue[Entry] = asyncio.Queue()
    await alice.ensure_stream(BUCKET, timeout_s=WAIT_S)
    await bob.subscribe("large", heard.put_nowait)
    await bob.watch("KV_map", "$KV.map.>", seen.put_nowait, timeout_s=WAIT_S)
    large = random.Random(1).randbytes(200_000)

    for life in range(2):
        await alice.publish("large", large)
        sequence = await alice.append("$KV.map.a", large, expected=life, timeout_s=WAIT_S)
        async with asyncio.timeout(WAIT_S):
            assert (await heard.get()).payload == large
            entry = await seen.get()
            while entry.sequence < sequence:  # stored before the connection was lost, and seen again
                entry = await seen.get()
        assert entry.payload == large
        if life == 0:
            await tls_server.kill()
            await tls_server.restart()
            await until_back(alice)
            await until_back(bob)


async def test_a_server_of_an_unknown_authority_is_incompatible(tls_server: NatsServer) -> None:
    """Property: nothing is said to a server that nobody vouches for; the error says what to do."""
    with pytest.raises(Incompatible, match="SSL_CERT_FILE"):
        await tls_server.link("alice")


async def test_a_bad_certificate_among_several_servers_is_no_reason_to_give_up(tls_server: NatsServer) -> None:
    """Property: the other servers may only be starting, so whoever waits for one goes on waiting."""
    with pytest.raises(Unavailable):
        await NatsLink.connect(f"{tls_server.url},tls://127.0.0.1:{unused_port()}", name="test")


async def test_what_is_to_be_encrypted_is_never_said_in_clear() -> None:
    """Property: a server that offers no TLS hears neither user nor password of a `tls://` URL."""
    said: list[bytes] = []

    async def offer_no_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        document = {"server_id": "PLAIN", "version": "2.15.1", "headers": True, "max_payload": 1_048_576}
        writer.write(b"INFO " + json.dumps(document).encode() + b"\r\n")
        while line := await reader.readline():
            said.append(line)
            writer.write(b"PONG\r\n")

    async with listening(offer_no_tls) as port:
        with pytest.raises(Incompatible, match="does not encrypt"):
            await NatsLink.connect(f"tls://me:secret@127.0.0.1:{port}", name="test")

    assert said == []


async def test_headers_count_towards_the_limit(nats_server: NatsServer) -> None:
    """Property: a message that exceeds the server's limit by its headers is refused here, and costs no connection."""
    link = await nats_server.link("test")
    await link.ensure_stream(BUCKET, timeout_s=WAIT_S)

    with pytest.raises(PayloadTooLarge):
        await link.append("$KV.map.a", bytes(link.max_payload - 10), expected=0, timeout_s=WAIT_S)

    assert await link.last("KV_map", "$KV.map.a", timeout_s=WAIT_S) is None
    assert link.reconnects == 0


async def test_an_append_without_acknowledgement_is_in_doubt(nats_server: NatsServer) -> None:
    """Property: silence after sending is InDoubt, never Unavailable or Timeout."""
    alice, bob = await nats_server.link("alice"), await nats_server.link("bob")
    heard: asyncio.Queue[Message] = asyncio.Queue()
    await bob.subscribe("ev.a", heard.put_nowait)  # takes the append, as a stream that dies before answering

    with pytest.raises(InDoubt, match=r"ev\.a"):
        await alice.append("ev.a", b"1", expected=0, timeout_s=0.1)


async def test_closing_leaves_an_append_in_doubt(nats_server: NatsServer) -> None:
    """Property: a link closed while an append is under way does not call it failed."""
    alice, bob = await nats_server.link("alice"), await nats_server.link("bob")
    heard: asyncio.Queue[Message] = asyncio.Queue()
    await bob.subscribe("ev.a", heard.put_nowait)
    append = asyncio.create_task(alice.append("ev.a", b"1", expected=0, timeout_s=3_600))
    async with asyncio.timeout(WAIT_S):
        await heard.get()

    await alice.close()

    with pytest.raises(InDoubt):
        await append


async def test_over_a_transport_that_closed_unnoticed_nothing_is_sent(nats_server: NatsServer) -> None:
    """Property: a connection that has just broken ends no process, and whoever sends learns that nothing was sent."""

    async def send_over_a_closed_transport() -> None:
        link = await NatsLink.connect(nats_server.url, name="alice")
        try:
            subscription = await link.subscribe("ev.b", lambda _: None)
            await close_unnoticed(link)
            await subscription.stop()
            with pytest.raises(Unavailable, match="not connected"):
                await link.append("ev.a", b"1", expected=0, timeout_s=WAIT_S)
            with pytest.raises(Unavailable, match="not connected"):
                await link.publish("ev.a", b"1")
            with pytest.raises(Unavailable, match="not connected"):
                await link.request("ev.a", b"1", timeout_s=WAIT_S)
            await until_back(link)
        finally:
            await link.close()

    await asyncio.to_thread(uvloop.run, send_over_a_closed_transport())


async def test_a_watch_that_begins_again_on_a_transport_that_closed_unnoticed_lives_on(nats_server: NatsServer) -> None:
    """Property: a watch that cannot even end its old consumer hears of what is stored after the reconnect."""

    async def watch_over_a_closed_transport() -> list[bytes]:
        link = await NatsLink.connect(nats_server.url, name="alice")
        try:
            await link.ensure_stream(StreamSpec(name="ev", subjects=("ev.>",)), timeout_s=WAIT_S)
            heard: asyncio.Queue[Entry] = asyncio.Queue()
            watch = await link.watch("ev", "ev.a", heard.put_nowait, timeout_s=WAIT_S)
            end = watch._watch._round.end

            async def end_late() -> None:
                await close_unnoticed(link)
                await end()

            watch._watch._round.end = end_late  # type: ignore[method-assign]
            watch._watch._round.broken.set()
            await until_back(link)
            await link.append("ev.a", b"1", expected=0, timeout_s=WAIT_S)
            async with asyncio.timeout(WAIT_S):
                return [(await heard.get()).payload]
        finally:
            await link.close()

    assert await asyncio.to_thread(uvloop.run, watch_over_a_closed_transport()) == [b"1"]


async def close_unnoticed(link: NatsLink) -> None:
    """Close a link's connection as a failed write does, when its reader has yet to hear of it. On uvloop only."""
    client = link._connection._client
    assert client is not None
    client._flusher_task.cancel()
    await asyncio.sleep(0)
    client._transport._io_writer.transport.abort()


async def consumers_of(admin: Client, stream: str) -> list[dict[str, Any]]:
    answer = await admin.request(f"$JS.API.CONSUMER.LIST.{stream}", b"{}", timeout=WAIT_S)
    found: list[dict[str, Any]] = json.loads(answer.data)["consumers"]
    return found


async def test_a_watch_begins_again_when_its_consumer_is_gone(nats_server: NatsServer, admin: Client) -> None:
    """Property: silence beyond three heartbeats is noticed and mended."""
    link = await nats_server.link("test")
    await link.ensure_stream(BUCKET, timeout_s=WAIT_S)
    await link.append("$KV.map.a", b"stored", expected=0, timeout_s=WAIT_S)
    seen: asyncio.Queue[Entry] = asyncio.Queue()
    await link.watch("KV_map", "$KV.map.>", seen.put_nowait, timeout_s=WAIT_S)
    (consumer,) = await consumers_of(admin, "KV_map")

    await admin.request(f"$JS.API.CONSUMER.DELETE.KV_map.{consumer['name']}", b"", timeout=WAIT_S)
    await link.append("$KV.map.b", b"unseen", expected=0, timeout_s=WAIT_S)

    async with asyncio.timeout(WAIT_S):
        payloads = [(await seen.get()).payload for _ in range(3)]
    assert payloads == [b"stored", b"stored", b"unseen"]


async def test_a_watch_begins_again_on_a_reconnect(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Property: it does not wait for the silence to be noticed."""
    monkeypatch.setattr("routing.nats_watch.SILENCE_S", 3_600.0)
    link = await nats_server.link("test")
    await link.ensure_stream(BUCKET, timeout_s=WAIT_S)
    await link.append("$KV.map.a", b"stored", expected=0, timeout_s=WAIT_S)
    seen: asyncio.Queue[Entry] = asyncio.Queue()
    await link.watch("KV_map", "$KV.map.>", seen.put_nowait, timeout_s=WAIT_S)

    await nats_server.kill()
    await nats_server.restart()

    async with asyncio.timeout(WAIT_S):
        assert [(await seen.get()).payload for _ in range(2)] == [b"stored", b"stored"]


@pytest.mark.parametrize("sign", ["heartbeat", "entry"])
async def test_a_watch_begins_again_after_a_gap(nats_server: NatsServer, admin: Client, sign: str) -> None:
    """Property: a heartbeat or an entry that shows a missing one makes the watch start over, and the entry after the
    gap is not delivered out of order."""
    link = await nats_server.link("test")
    await link.ensure_stream(BUCKET, timeout_s=WAIT_S)
    await link.append("$KV.map.a", b"stored", expected=0, timeout_s=WAIT_S)
    seen: asyncio.Queue[Entry] = asyncio.Queue()
    await link.watch("KV_map", "$KV.map.>", seen.put_nowait, timeout_s=WAIT_S)
    (consumer,) = await consumers_of(admin, "KV_map")

    to, stream, name = consumer["config"]["deliver_subject"], "KV_map", consumer["name"]
    if sign == "heartbeat":
        await admin.publish(to, b"", headers={"Status": "100", "Nats-Last-Consumer": "3"})
    else:
        # The server lets nobody else use $JS.ACK as a reply, so this one is only shaped like it.
        await admin.publish(to, b"out of order", reply=f"spoofed.ACK.{stream}.{name}.1.9.3.0.0")

    async with asyncio.timeout(WAIT_S):
        payloads = [(await seen.get()).payload for _ in range(2)]
    assert payloads == [b"stored", b"stored"]
    assert consumer["name"] not in [other["name"] for other in await consumers_of(admin, "KV_map")]


async def test_watches_leave_no_consumer_behind(nats_server: NatsServer, admin: Client) -> None:
    """Property: stopping a watch and closing a link remove their consumers at once."""
    stopped, closed = await nats_server.link("stopped"), await nats_server.link("closed")
    await stopped.ensure_stream(BUCKET, timeout_s=WAIT_S)
    watch = await stopped.watch("KV_map", "$KV.map.>", lambda entry: None, timeout_s=WAIT_S)
    await closed.watch("KV_map", "$KV.map.>", lambda entry: None, timeout_s=WAIT_S)
    assert len(await consumers_of(admin, "KV_map")) == 2

    await watch.stop()
    await closed.close()

    assert await consumers_of(admin, "KV_map") == []


async def test_more_replicas_than_servers_are_incompatible(nats_server: NatsServer) -> None:
    """Property: a stream that cannot be made as wanted is refused with the server's reason."""
    link = await nats_server.link("test")

    with pytest.raises(Incompatible, match="replicas"):
        await link.ensure_stream(StreamSpec(name="r3", subjects=("r3.>",), replicas=3), timeout_s=WAIT_S)


async def test_questions_of_one_moment_travel_together_and_so_do_their_answers(
    nats_server: NatsServer, admin: Client
) -> None:
    """Property: many requests at once are few NATS messages, and each gets its own answer."""
    alice, bob = await nats_server.link("alice"), await nats_server.link("bob")
    await bob.subscribe("echo", lambda message: bob.answer(message.reply, b"re: " + message.payload))
    seen: list[str] = []

    async def note(message: Any) -> None:
        seen.append(message.subject)

    await admin.subscribe("echo", cb=note)
    await handled(admin)

    answers = await asyncio.gather(*(alice.request("echo", b"%d" % n, timeout_s=WAIT_S) for n in range(100)))
    await handled(admin)

    assert answers == [b"re: %d" % n for n in range(100)]
    assert len(seen) <= 5


async def test_questions_that_travel_together_all_hear_that_nobody_listens(nats_server: NatsServer) -> None:
    """Property: the server refuses a frame once; everybody in it is told at once."""
    link = await nats_server.link("test")

    outcomes = await asyncio.gather(
        *(link.request("nobody", b"", timeout_s=3_600) for _ in range(20)), return_exceptions=True
    )

    assert [type(outcome) for outcome in outcomes] == [Unavailable] * 20


async def test_one_handler_that_fails_costs_the_others_of_its_frame_nothing(nats_server: NatsServer) -> None:
    """Property: what one message is to a handler must not lose those that came with it."""
    alice, bob = await nats_server.link("alice"), await nats_server.link("bob")

    def answer(message: Message) -> None:
        if message.payload == b"3":
            raise ValueError("a bug")
        bob.answer(message.reply, message.payload)

    await bob.subscribe("echo", answer)

    outcomes = await asyncio.gather(
        *(alice.request("echo", b"%d" % n, timeout_s=3.0) for n in range(10)), return_exceptions=True
    )

    assert [n for n, outcome in enumerate(outcomes) if outcome != b"%d" % n] == [3]
    assert isinstance(outcomes[3], Timeout)
    assert bob.handler_errors == 1


@pytest.mark.parametrize("frame", [b"", b"\x00", b"garbage", bytes(11), b"\xff" * 40])
async def test_a_damaged_frame_is_counted_and_the_subscription_lives_on(
    nats_server: NatsServer, admin: Client, frame: bytes
) -> None:
    """Property: garbage shaped like a frame, as a question or as an answer, costs nobody else anything."""
    alice, bob = await nats_server.link("alice"), await nats_server.link("bob")
    inboxes: list[str] = []

    def answer(message: Message) -> None:
        inboxes.append(message.reply.rpartition(".")[0])
        bob.answer(message.reply, b"here")

    await bob.subscribe("echo", answer)
    await alice.request("echo", b"", timeout_s=WAIT_S)

    await admin.publish("echo", frame, reply="anywhere.~f1")
    await admin.publish(f"{inboxes[0]}.~", frame)
    await admin.publish(f"{inboxes[0]}.~not-a-token", frame)
    await handled(admin)

    assert await alice.request("echo", b"", timeout_s=WAIT_S) == b"here"
    assert bob.handler_errors == (0 if frame == b"" else 1)
    assert alice.client_errors >= 1


async def test_somebody_who_knows_no_frames_is_answered_as_ever(nats_server: NatsServer, admin: Client) -> None:
    """Property: an operator's own request gets a plain answer."""
    bob = await nats_server.link("bob")
    await bob.subscribe("echo", lambda message: bob.answer(message.reply, b"re: " + message.payload))

    answer = await admin.request("echo", b"hello", timeout=WAIT_S)

    assert answer.data == b"re: hello"


async def test_answers_are_refused_while_the_server_takes_nothing(nats_server: NatsServer, proxy: Proxy) -> None:
    """Property: answering never waits, so it has to say no before memory fills up."""
    alice = await NatsLink.connect(await proxy.start(), name="alice")

    proxy.stall()
    with pytest.raises(Unavailable):
        async with asyncio.timeout(WAIT_S):
            while True:
                alice.answer("somebody", bytes(250_000))
                await asyncio.sleep(0)

    await alice.close()


async def test_a_large_question_does_not_overtake_small_ones(nats_server: NatsServer) -> None:
    """Property: what is too long for a frame keeps its place, or a session's commands would come out of order."""
    alice, bob = await nats_server.link("alice"), await nats_server.link("bob")
    sizes = [10, 20, 30, 5_000, 40, 6_000, 50]
    seen: list[int] = []

    def answer(message: Message) -> None:
        seen.append(len(message.payload))
        bob.answer(message.reply, b"")

    await bob.subscribe("sizes", answer)

    await asyncio.gather(*(alice.request("sizes", bytes(size), timeout_s=WAIT_S) for size in sizes))

    assert seen == sizes


async def test_an_answer_given_just_before_closing_arrives(nats_server: NatsServer) -> None:
    """Property: what was accepted leaves before the link does."""
    alice, bob = await nats_server.link("alice"), await nats_server.link("bob")
    heard: asyncio.Queue[Message] = asyncio.Queue()
    await bob.subscribe("echo", heard.put_nowait)
    asking = asyncio.create_task(alice.request("echo", b"", timeout_s=WAIT_S))
    async with asyncio.timeout(WAIT_S):
        message = await heard.get()

    bob.answer(message.reply, b"last words")
    await bob.close()

    assert await asking == b"last words"


@pytest.mark.parametrize("subject", ["\ud800", "inbox.~", "a b", ""])
async def test_a_question_that_cannot_be_sent_costs_the_others_of_its_turn_nothing(
    nats_server: NatsServer, subject: str
) -> None:
    """Property: one malformed subject is its sender's mistake, told at once."""
    alice, bob = await nats_server.link("alice"), await nats_server.link("bob")
    await bob.subscribe("echo", lambda message: bob.answer(message.reply, message.payload))

    outcomes = await asyncio.gather(
        alice.request("echo", b"1", timeout_s=WAIT_S),
        alice.request(subject, b"2", timeout_s=WAIT_S),
        alice.request("echo", b"3", timeout_s=WAIT_S),
        return_exceptions=True,
    )

    assert (outcomes[0], outcomes[2]) == (b"1", b"3")
    assert isinstance(outcomes[1], InvalidInput)


async def test_a_question_may_go_alone(nats_server: NatsServer, admin: Client) -> None:
    """Property: a peer that does not understand frames is reached by the second try, which goes by itself."""
    alice = await nats_server.link("alice")

    async def answer_what_is_no_frame(message: Any) -> None:
        if ".~f" not in message.reply:
            await admin.publish(message.reply, b"re: " + message.data)

    await admin.subscribe("old", cb=answer_what_is_no_frame)
    await handled(admin)

    answers = await asyncio.gather(*(alice.request("old", b"%d" % n, timeout_s=WAIT_S, alone=True) for n in range(5)))

    assert answers == [b"re: %d" % n for n in range(5)]


@pytest.mark.parametrize(
    "text",
    [
        b"", b"no", b"[]", b"null", b"{}", b'{"seq":null}', b'{"error":null}', b'{"error":"x"}', b'{"seq":0}',
        b'{"seq":-1}', b'{"seq":true}', b'{"seq":1.5}', b'{"seq":"3"}', b'{"seq":3,"error":[]}',
        b'{"seq":4,"x":' + b"[" * 5_000,
    ],
)  # fmt: skip
def test_an_acknowledgement_that_cannot_be_read_leaves_the_append_in_doubt(text: bytes) -> None:
    """Whoever is to be told is told something."""
    with pytest.raises(InDoubt):
        _sequence_in("ev.a", 1, text)
