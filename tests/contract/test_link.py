"""What every Link promises, checked against the real NATS and the one in memory alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast

import pytest

from routing.errors import Incompatible, InDoubt, PayloadTooLarge, StreamMissing, Timeout, Unavailable, WrongSequence
from routing.link import Entry, Handler, Link, Message, StreamSpec
from tests.contract.waiting import WAIT_S, take

if TYPE_CHECKING:
    from tests.contract.conftest import Server

T = TypeVar("T")
LinkPair = tuple[Link, Link]

JOURNAL = StreamSpec(name="journal", subjects=("ev.>",), direct=True)
BUCKET = StreamSpec(name="KV_map", subjects=("$KV.map.>",), keep=1)
LEASES = StreamSpec(name="KV_leases", subjects=("$KV.leases.>",), keep=1, ttl=True)


async def take_until(queue: asyncio.Queue[T], wanted: Callable[[T], bool]) -> list[T]:
    """The next items up to the first that is `wanted`."""
    items = await take(queue, 1)
    while not wanted(items[-1]):
        items += await take(queue, 1)
    return items


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - no link tells when it goes down
            await asyncio.sleep(0)


def answering(link: Link, text: bytes, tasks: set[asyncio.Task[None]]) -> Handler:
    """A handler that answers every message with `text` and the question."""

    def handle(message: Message) -> None:
        tasks.add(asyncio.create_task(link.publish(message.reply, text + message.payload)))

    return handle


@pytest.fixture
def tasks() -> set[asyncio.Task[None]]:
    """Holds the answers under way, which the loop itself would forget."""
    return set()


class TestMessages:
    async def test_a_request_gets_its_answer(self, link_pair: LinkPair, tasks: set[asyncio.Task[None]]) -> None:
        """Property: each request gets the answer to itself, whatever else is in flight."""
        alice, bob = link_pair
        await bob.subscribe("echo", answering(bob, b"re: ", tasks))

        answers = await asyncio.gather(*(alice.request("echo", b"%d" % n, timeout_s=WAIT_S) for n in range(50)))

        assert answers == [b"re: %d" % n for n in range(50)]

    async def test_a_request_without_a_listener_is_unavailable_at_once(self, link_pair: LinkPair) -> None:
        """Property: nobody listening is told at once, not by the deadline."""
        alice, _ = link_pair

        with pytest.raises(Unavailable, match="nobody"):
            await alice.request("nobody", b"", timeout_s=WAIT_S)

    async def test_an_unanswered_request_times_out(self, link_pair: LinkPair) -> None:
        """Property: a listener that stays silent costs the deadline, and is a Timeout."""
        alice, bob = link_pair
        heard: asyncio.Queue[Message] = asyncio.Queue()
        await bob.subscribe("silent", heard.put_nowait)

        with pytest.raises(Timeout, match="silent"):
            await alice.request("silent", b"", timeout_s=0.1)

        assert heard.qsize() == 1

    async def test_an_answer_after_the_deadline_is_ignored(self, link_pair: LinkPair) -> None:
        """Property: a late answer reaches neither its own nor any later request."""
        alice, bob = link_pair
        heard: asyncio.Queue[Message] = asyncio.Queue()
        await bob.subscribe("slow", heard.put_nowait)
        with pytest.raises(Timeout):
            await alice.request("slow", b"", timeout_s=0.1)

        second = asyncio.create_task(alice.request("slow", b"", timeout_s=WAIT_S))
        first_question, second_question = await take(heard, 2)
        await bob.publish(first_question.reply, b"late")
        await bob.publish(second_question.reply, b"in time")

        assert await second == b"in time"

    async def test_a_third_link_may_answer_a_forwarded_request(
        self, server: Server, link_pair: LinkPair, tasks: set[asyncio.Task[None]]
    ) -> None:
        """Property: a request handed on with its reply subject is answered straight to the caller."""
        alice, bob = link_pair
        carol = await server.link("carol")
        await carol.subscribe("carol", answering(carol, b"carol: ", tasks))

        def forward(message: Message) -> None:
            tasks.add(asyncio.create_task(bob.publish("carol", message.payload, reply=message.reply)))

        await bob.subscribe("bob", forward)

        assert await alice.request("bob", b"hello", timeout_s=WAIT_S) == b"carol: hello"

    async def test_messages_arrive_in_the_order_sent(self, link_pair: LinkPair) -> None:
        """Property: one link's messages to another keep their order."""
        alice, bob = link_pair
        heard: asyncio.Queue[Message] = asyncio.Queue()
        await bob.subscribe("count", heard.put_nowait)

        for n in range(500):
            await alice.publish("count", b"%d" % n)

        assert [int(message.payload) for message in await take(heard, 500)] == list(range(500))

    async def test_handlers_run_after_the_sender_went_on(self, link_pair: LinkPair) -> None:
        """Property: delivery is asynchronous, even to oneself."""
        alice, _ = link_pair
        heard: asyncio.Queue[Message] = asyncio.Queue()
        await alice.subscribe("self", heard.put_nowait)

        await alice.publish("self", b"")

        assert heard.empty()
        await take(heard, 1)

    @pytest.mark.parametrize(
        ("pattern", "wanted"),
        [
            ("a.*", ["a.b"]),
            ("a.>", ["a.b", "a.b.c"]),
            ("*.b", ["a.b", "x.b"]),
            ("a.*.c", ["a.b.c"]),
        ],
    )
    async def test_wildcards_match_as_in_nats(self, link_pair: LinkPair, pattern: str, wanted: list[str]) -> None:
        """Property: `*` stands for one token, a last `>` for one or more."""
        alice, bob = link_pair
        heard: asyncio.Queue[Message] = asyncio.Queue()
        end: asyncio.Queue[Message] = asyncio.Queue()
        await bob.subscribe(pattern, heard.put_nowait)
        await bob.subscribe("end", end.put_nowait)

        for subject in ("a", "a.b", "a.b.c", "x.b"):
            await alice.publish(subject, b"")

        assert [message.subject for message in await take(heard, len(wanted))] == wanted
        await alice.publish("end", b"")
        await take(end, 1)
        assert all(message.subject == "end" for message in [heard.get_nowait() for _ in range(heard.qsize())])

    async def test_a_stopped_subscription_hears_nothing_more(self, link_pair: LinkPair) -> None:
        """Property: after `stop` a later message finds no listener; stopping twice is harmless."""
        alice, bob = link_pair
        heard: asyncio.Queue[Message] = asyncio.Queue()
        subscription = await bob.subscribe("news", heard.put_nowait)
        await alice.publish("news", b"first")
        await take(heard, 1)

        await subscription.stop()
        await subscription.stop()
        await (await bob.subscribe("unrelated", heard.put_nowait)).stop()  # a round trip behind the stop

        with pytest.raises(Unavailable):
            await alice.request("news", b"second", timeout_s=WAIT_S)
        assert heard.empty()

    async def test_a_raising_handler_keeps_its_subscription(self, server: Server) -> None:
        """Property: what a handler raises is counted, and the next message arrives all the same."""
        link = await server.link("alice")
        heard: asyncio.Queue[Message] = asyncio.Queue()

        def handle(message: Message) -> None:
            if message.payload == b"bad":
                raise ValueError("bad message")
            if message.payload == b"worse":
                raise asyncio.CancelledError  # as reading a cancelled future's result does
            heard.put_nowait(message)

        await link.subscribe("news", handle)
        for payload in (b"bad", b"worse", b"good"):
            await link.publish("news", payload)

        assert [message.payload for message in await take(heard, 1)] == [b"good"]
        assert link.handler_errors == 2

    async def test_an_oversized_message_is_refused_and_the_link_lives(self, link_pair: LinkPair) -> None:
        """Property: more than the server takes is refused before it is sent, for every sending verb."""
        alice, bob = link_pair
        await alice.ensure_stream(JOURNAL, timeout_s=WAIT_S)
        heard: asyncio.Queue[Message] = asyncio.Queue()
        await bob.subscribe("news", heard.put_nowait)
        too_much = bytes(256 * 1024 + 1)

        with pytest.raises(PayloadTooLarge):
            await alice.publish("news", too_much)
        with pytest.raises(PayloadTooLarge):
            await alice.request("news", too_much, timeout_s=WAIT_S)
        with pytest.raises(PayloadTooLarge):
            await alice.append("ev.a", too_much, expected=0, timeout_s=WAIT_S)

        await alice.publish("news", b"small")
        assert [message.payload for message in await take(heard, 1)] == [b"small"]
        assert await alice.append("ev.a", b"small", expected=0, timeout_s=WAIT_S) == 1


class TestStreams:
    async def test_an_append_lands_only_on_the_sequence_it_expects(self, link_pair: LinkPair) -> None:
        """Property: compare-and-set per subject: 0 on a fresh one, the last sequence after, None for no condition."""
        alice, bob = link_pair
        await alice.ensure_stream(JOURNAL, timeout_s=WAIT_S)

        first = await alice.append("ev.a", b"1", expected=0, timeout_s=WAIT_S)
        elsewhere = await bob.append("ev.b", b"x", expected=0, timeout_s=WAIT_S)
        second = await alice.append("ev.a", b"2", expected=first, timeout_s=WAIT_S)
        assert first < elsewhere < second

        for stale in (0, first, elsewhere, second + 1):
            with pytest.raises(WrongSequence):
                await bob.append("ev.a", b"no", expected=stale, timeout_s=WAIT_S)
        third = await bob.append("ev.a", b"3", expected=None, timeout_s=WAIT_S)

        stored = await alice.read("journal", [first, second, third], timeout_s=WAIT_S)
        assert stored == [
            Entry(sequence=first, subject="ev.a", payload=b"1"),
            Entry(sequence=second, subject="ev.a", payload=b"2"),
            Entry(sequence=third, subject="ev.a", payload=b"3"),
        ]

    async def test_an_append_that_nobody_waits_for_tells_how_it_ended(self, link_pair: LinkPair) -> None:
        """Property: whoever is to be told hears what `append` would have returned or raised, once."""
        alice, _ = link_pair
        await alice.ensure_stream(JOURNAL, timeout_s=WAIT_S)
        told: asyncio.Queue[object] = asyncio.Queue()
        elsewhere: asyncio.Queue[object] = asyncio.Queue()

        for expected in (0, 0, 1):
            alice.append_then("ev.a", b"%d" % expected, expected=expected, timeout_s=WAIT_S, then=told.put_nowait)
        alice.append_then("nobody", b"", expected=0, timeout_s=WAIT_S, then=elsewhere.put_nowait)

        first, refused, second = await take(told, 3)
        (unheard,) = await take(elsewhere, 1)
        assert (first, second) == (1, 2)
        assert isinstance(refused, WrongSequence)
        assert isinstance(unheard, Unavailable)
        last = await alice.last("journal", "ev.a", timeout_s=WAIT_S)
        assert last is not None
        assert (last.sequence, last.payload) == (2, b"1")
        assert told.empty()
        assert elsewhere.empty()

    async def test_an_append_that_certainly_was_not_sent_is_refused_at_once(self, link_pair: LinkPair) -> None:
        """Property: then nobody is told anything later."""
        alice, bob = link_pair
        told: list[object] = []

        with pytest.raises(PayloadTooLarge):
            alice.append_then("ev.a", bytes(2_000_000), expected=0, timeout_s=WAIT_S, then=told.append)
        await bob.close()
        with pytest.raises(Unavailable):
            bob.append_then("ev.a", b"", expected=0, timeout_s=WAIT_S, then=told.append)

        assert told == []

    async def test_closing_leaves_no_append_untold(self, link_pair: LinkPair) -> None:
        """Property: each has landed by then or is in doubt, and is told once."""
        alice, bob = link_pair
        await alice.ensure_stream(JOURNAL, timeout_s=WAIT_S)
        told: list[object] = []
        for number in range(100):
            alice.append_then(f"ev.{number}", b"", expected=0, timeout_s=WAIT_S, then=told.append)

        await alice.close()

        await until(lambda: len(told) >= 100)
        assert all(isinstance(outcome, int | InDoubt) for outcome in told)
        stored = [await bob.last("journal", f"ev.{number}", timeout_s=WAIT_S) for number in range(100)]
        landed = {entry.sequence for entry in stored if entry is not None}
        assert {outcome for outcome in told if isinstance(outcome, int)} <= landed
        assert len(told) == 100

    async def test_of_rival_appends_exactly_one_lands(self, link_pair: LinkPair) -> None:
        """Property: of appends that expect the same sequence one is stored and the others are WrongSequence."""
        alice, bob = link_pair
        await alice.ensure_stream(JOURNAL, timeout_s=WAIT_S)

        outcomes = await asyncio.gather(
            *((alice, bob)[n % 2].append("ev.a", b"%d" % n, expected=0, timeout_s=WAIT_S) for n in range(10)),
            return_exceptions=True,
        )

        assert [outcome for outcome in outcomes if isinstance(outcome, int)] == [1]
        assert sum(isinstance(outcome, WrongSequence) for outcome in outcomes) == 9

    async def test_a_rollup_replaces_what_its_subject_held(self, link_pair: LinkPair) -> None:
        """Property: earlier messages of the subject are gone, other subjects keep theirs, sequences go on."""
        alice, _ = link_pair
        await alice.ensure_stream(JOURNAL, timeout_s=WAIT_S)
        first = await alice.append("ev.a", b"1", expected=0, timeout_s=WAIT_S)
        other = await alice.append("ev.b", b"x", expected=0, timeout_s=WAIT_S)
        second = await alice.append("ev.a", b"2", expected=first, timeout_s=WAIT_S)

        with pytest.raises(WrongSequence):
            await alice.append("ev.a", b"no", expected=first, timeout_s=WAIT_S, rollup=True)
        snapshot = await alice.append("ev.a", b"all", expected=second, timeout_s=WAIT_S, rollup=True)

        gone, also_gone, left = await alice.read("journal", [first, second, other], timeout_s=WAIT_S)
        assert (gone, also_gone) == (None, None)
        assert left is not None
        last = await alice.last("journal", "ev.a", timeout_s=WAIT_S)
        assert last == Entry(sequence=snapshot, subject="ev.a", payload=b"all")
        assert await alice.append("ev.a", b"3", expected=snapshot, timeout_s=WAIT_S) == snapshot + 1

    async def test_a_rollup_that_nobody_waits_for_replaces_as_much(self, link_pair: LinkPair) -> None:
        """Property: with another expectation it removes nothing."""
        alice, _ = link_pair
        await alice.ensure_stream(JOURNAL, timeout_s=WAIT_S)
        first = await alice.append("ev.a", b"1", expected=0, timeout_s=WAIT_S)
        second = await alice.append("ev.a", b"2", expected=first, timeout_s=WAIT_S)
        told: asyncio.Queue[object] = asyncio.Queue()

        for expected in (first, second):
            alice.append_then("ev.a", b"all", expected=expected, timeout_s=WAIT_S, then=told.put_nowait, rollup=True)

        refused, snapshot = await take(told, 2)
        assert isinstance(refused, WrongSequence)
        assert await alice.read("journal", [first, second], timeout_s=WAIT_S) == [None, None]
        assert await alice.last("journal", "ev.a", timeout_s=WAIT_S) == Entry(
            sequence=cast(int, snapshot), subject="ev.a", payload=b"all"
        )

    async def test_a_purge_removes_what_stands_before_a_sequence(self, link_pair: LinkPair) -> None:
        """Property: of its subject only, and as often as it is asked; the subject's end is what it was."""
        alice, _ = link_pair
        await alice.ensure_stream(JOURNAL, timeout_s=WAIT_S)
        first = await alice.append("ev.a", b"1", expected=0, timeout_s=WAIT_S)
        other = await alice.append("ev.a.b", b"x", expected=0, timeout_s=WAIT_S)
        second = await alice.append("ev.a", b"2", expected=first, timeout_s=WAIT_S)
        third = await alice.append("ev.a", b"3", expected=second, timeout_s=WAIT_S)

        for _ in range(2):
            await alice.purge("journal", "ev.a", before=second, timeout_s=WAIT_S)

        gone, *left = await alice.read("journal", [first, other, second, third], timeout_s=WAIT_S)
        assert gone is None
        assert [entry.payload for entry in left if entry is not None] == [b"x", b"2", b"3"]
        assert await alice.append("ev.a", b"4", expected=third, timeout_s=WAIT_S) == third + 1

    async def test_a_stream_keeps_as_many_messages_per_subject_as_wanted(self, link_pair: LinkPair) -> None:
        """Property: with `keep=1` the newest replaces the one before."""
        alice, _ = link_pair
        await alice.ensure_stream(BUCKET, timeout_s=WAIT_S)

        first = await alice.append("$KV.map.a", b"1", expected=0, timeout_s=WAIT_S)
        second = await alice.append("$KV.map.a", b"2", expected=first, timeout_s=WAIT_S)

        assert await alice.read("KV_map", [first], timeout_s=WAIT_S) == [None]
        last = await alice.last("KV_map", "$KV.map.a", timeout_s=WAIT_S)
        assert last == Entry(sequence=second, subject="$KV.map.a", payload=b"2")

    async def test_what_is_not_there_reads_as_none(self, link_pair: LinkPair) -> None:
        """Property: an unknown subject or sequence is None; an unknown stream is Unavailable, in every verb."""
        alice, _ = link_pair
        await alice.ensure_stream(JOURNAL, timeout_s=WAIT_S)

        assert await alice.last("journal", "ev.a", timeout_s=WAIT_S) is None
        assert await alice.read("journal", [7], timeout_s=WAIT_S) == [None]
        with pytest.raises(Unavailable):
            await alice.last("missing", "ev.a", timeout_s=WAIT_S)
        with pytest.raises(Unavailable):
            await alice.read("missing", [1], timeout_s=WAIT_S)
        with pytest.raises(Unavailable):
            await alice.watch("missing", ">", lambda entry: None, timeout_s=WAIT_S)
        with pytest.raises(Unavailable):
            await alice.append("unknown", b"", expected=None, timeout_s=WAIT_S)

    async def test_an_empty_payload_is_no_removal(self, link_pair: LinkPair) -> None:
        """Property: zero bytes are a value like any other."""
        alice, _ = link_pair
        await alice.ensure_stream(JOURNAL, timeout_s=WAIT_S)

        sequence = await alice.append("ev.a", b"", expected=0, timeout_s=WAIT_S)

        last = await alice.last("journal", "ev.a", timeout_s=WAIT_S)
        assert last == Entry(sequence=sequence, subject="ev.a", payload=b"")

    async def test_a_discarded_key_reads_as_removed(self, link_pair: LinkPair) -> None:
        """Property: a discard leaves a marker that readers and watchers see, and that the next append must name."""
        alice, bob = link_pair
        await alice.ensure_stream(BUCKET, timeout_s=WAIT_S)
        seen: asyncio.Queue[Entry] = asyncio.Queue()
        first = await alice.append("$KV.map.a", b"1", expected=0, timeout_s=WAIT_S)
        await bob.watch("KV_map", "$KV.map.>", seen.put_nowait, timeout_s=WAIT_S)

        gone = await alice.append("$KV.map.a", b"ignored", expected=first, timeout_s=WAIT_S, discard=True)

        marker = Entry(sequence=gone, subject="$KV.map.a", payload=b"", removed=True)
        assert await bob.last("KV_map", "$KV.map.a", timeout_s=WAIT_S) == marker
        assert (await take(seen, 2))[1] == marker
        with pytest.raises(WrongSequence):
            await alice.append("$KV.map.a", b"2", expected=0, timeout_s=WAIT_S)
        await alice.append("$KV.map.a", b"2", expected=gone, timeout_s=WAIT_S)

    async def test_an_expired_key_leaves_a_marker_that_watchers_see(self, link_pair: LinkPair) -> None:
        """Property: time to live ends in a removal that is delivered; less than the minimum of 1 s is taken as 1 s."""
        alice, bob = link_pair
        await alice.ensure_stream(LEASES, timeout_s=WAIT_S)
        seen: asyncio.Queue[Entry] = asyncio.Queue()
        await bob.watch("KV_leases", "$KV.leases.>", seen.put_nowait, timeout_s=WAIT_S)
        kept = await alice.append("$KV.leases.kept", b"me", expected=0, timeout_s=WAIT_S)

        held = await alice.append("$KV.leases.node", b"me", expected=0, ttl_s=0.3, timeout_s=WAIT_S)
        renewed = await alice.append("$KV.leases.node", b"me", expected=held, ttl_s=1, timeout_s=WAIT_S)

        entries = await take_until(seen, lambda entry: entry.removed)
        told = [(entry.sequence, entry.removed) for entry in entries if entry.sequence != held]  # replaced soon after
        assert told == [(kept, False), (renewed, False), (renewed + 1, True)]
        assert entries[-1] == Entry(sequence=renewed + 1, subject="$KV.leases.node", payload=b"", removed=True)
        assert await alice.last("KV_leases", "$KV.leases.node", timeout_s=WAIT_S) == entries[-1]
        assert await alice.last("KV_leases", "$KV.leases.kept", timeout_s=WAIT_S) == entries[0]

    async def test_time_to_live_needs_a_stream_made_for_it(self, link_pair: LinkPair) -> None:
        """Property: an append that would silently never expire is refused."""
        alice, _ = link_pair
        await alice.ensure_stream(BUCKET, timeout_s=WAIT_S)

        with pytest.raises(Incompatible):
            await alice.append("$KV.map.a", b"1", expected=0, ttl_s=1, timeout_s=WAIT_S)

        assert await alice.last("KV_map", "$KV.map.a", timeout_s=WAIT_S) is None

    async def test_a_stream_may_limit_its_messages(self, link_pair: LinkPair) -> None:
        """Property: a message over the stream's own limit is PayloadTooLarge and not stored."""
        alice, _ = link_pair
        spec = StreamSpec(name="small", subjects=("small.>",), max_message_bytes=1_000)
        await alice.ensure_stream(spec, timeout_s=WAIT_S)

        with pytest.raises(PayloadTooLarge):
            await alice.append("small.a", bytes(2_000), expected=0, timeout_s=WAIT_S)

        assert await alice.last("small", "small.a", timeout_s=WAIT_S) is None

    @pytest.mark.parametrize("spec", [JOURNAL, BUCKET, LEASES], ids=lambda spec: spec.name)
    async def test_ensuring_a_stream_again_changes_nothing(self, link_pair: LinkPair, spec: StreamSpec) -> None:
        """Property: the second call finds an equal stream and leaves its content alone."""
        alice, bob = link_pair
        await alice.ensure_stream(spec, timeout_s=WAIT_S)
        subject = spec.subjects[0].replace(">", "a")
        sequence = await alice.append(subject, b"1", expected=0, timeout_s=WAIT_S)

        await bob.ensure_stream(spec, timeout_s=WAIT_S)

        last = await bob.last(spec.name, subject, timeout_s=WAIT_S)
        assert last == Entry(sequence=sequence, subject=subject, payload=b"1")

    @pytest.mark.parametrize(
        ("other", "field"),
        [
            (StreamSpec(name="journal", subjects=("ev.>", "more.>")), "subjects"),
            (StreamSpec(name="journal", subjects=("ev.>",), keep=1), "per_subject|keep"),
            (StreamSpec(name="journal", subjects=("ev.>",), ttl=True), "ttl"),
        ],
        ids=["subjects", "keep", "ttl"],
    )
    async def test_a_stream_with_other_settings_is_incompatible(
        self, link_pair: LinkPair, other: StreamSpec, field: str
    ) -> None:
        """Property: the error names the field that differs."""
        alice, _ = link_pair
        await alice.ensure_stream(JOURNAL, timeout_s=WAIT_S)

        with pytest.raises(Incompatible, match=field):
            await alice.ensure_stream(other, timeout_s=WAIT_S)


class TestWatches:
    async def test_a_watch_delivers_what_is_stored_then_what_follows(self, link_pair: LinkPair) -> None:
        """Property: the last entry of each matching subject is delivered before `watch` returns, later ones after."""
        alice, bob = link_pair
        await alice.ensure_stream(JOURNAL, timeout_s=WAIT_S)
        await alice.append("ev.1.a", b"old", expected=0, timeout_s=WAIT_S)
        last_a = await alice.append("ev.1.a", b"a", expected=None, timeout_s=WAIT_S)
        await alice.append("ev.2.x", b"unwatched", expected=0, timeout_s=WAIT_S)
        last_b = await alice.append("ev.1.b", b"b", expected=0, timeout_s=WAIT_S)
        seen: asyncio.Queue[Entry] = asyncio.Queue()

        await bob.watch("journal", "ev.1.*", seen.put_nowait, timeout_s=WAIT_S)
        assert seen.qsize() == 2

        await alice.append("ev.2.x", b"unwatched", expected=None, timeout_s=WAIT_S)
        live = await alice.append("ev.1.c", b"c", expected=0, timeout_s=WAIT_S)
        assert await take(seen, 3) == [
            Entry(sequence=last_a, subject="ev.1.a", payload=b"a"),
            Entry(sequence=last_b, subject="ev.1.b", payload=b"b"),
            Entry(sequence=live, subject="ev.1.c", payload=b"c"),
        ]

    async def test_a_watch_returns_when_all_that_was_stored_is_delivered(self, link_pair: LinkPair) -> None:
        """Property: however much is stored, none of it is still on its way when `watch` returns."""
        alice, bob = link_pair
        await alice.ensure_stream(BUCKET, timeout_s=WAIT_S)
        await asyncio.gather(
            *(alice.append(f"$KV.map.{n}", bytes(2_000), expected=0, timeout_s=WAIT_S) for n in range(1_000))
        )
        seen: asyncio.Queue[Entry] = asyncio.Queue()

        await bob.watch("KV_map", "$KV.map.>", seen.put_nowait, timeout_s=WAIT_S)

        assert seen.qsize() == 1_000

    async def test_a_watch_of_nothing_returns_and_follows(self, link_pair: LinkPair) -> None:
        """Property: an empty stream is watched without waiting for a first entry."""
        alice, bob = link_pair
        await alice.ensure_stream(BUCKET, timeout_s=WAIT_S)
        seen: asyncio.Queue[Entry] = asyncio.Queue()

        await bob.watch("KV_map", "$KV.map.>", seen.put_nowait, timeout_s=WAIT_S)

        await alice.append("$KV.map.a", b"1", expected=0, timeout_s=WAIT_S)
        assert [entry.payload for entry in await take(seen, 1)] == [b"1"]

    async def test_a_watch_under_load_misses_no_last_entry(self, link_pair: LinkPair) -> None:
        """Property: entries written while the watch begins are seen, each subject in order."""
        alice, bob = link_pair
        await alice.ensure_stream(JOURNAL, timeout_s=WAIT_S)
        seen: asyncio.Queue[Entry] = asyncio.Queue()

        async def write(subject: str) -> list[int]:
            return [await alice.append(subject, b"", expected=None, timeout_s=WAIT_S) for _ in range(40)]

        writers = [asyncio.create_task(write(f"ev.{n}")) for n in range(5)]
        await bob.watch("journal", "ev.*", seen.put_nowait, timeout_s=WAIT_S)
        wanted = {f"ev.{n}": (await writer)[-1] for n, writer in enumerate(writers)}

        got: dict[str, list[int]] = {}
        while {subject: sequences[-1] for subject, sequences in got.items()} != wanted:
            (entry,) = await take(seen, 1)
            got.setdefault(entry.subject, []).append(entry.sequence)
        assert all(sequences == sorted(sequences) for sequences in got.values())

    async def test_a_watch_of_what_keeps_changing_ends_at_the_last_value(self, link_pair: LinkPair) -> None:
        """Property: what was replaced may be left out; the last value arrives, and none after it."""
        alice, bob = link_pair
        await alice.ensure_stream(BUCKET, timeout_s=WAIT_S)
        seen: asyncio.Queue[Entry] = asyncio.Queue()
        await bob.watch("KV_map", "$KV.map.>", seen.put_nowait, timeout_s=WAIT_S)

        writes = (alice.append("$KV.map.a", b"%d" % n, expected=None, timeout_s=WAIT_S) for n in range(300))
        last = max(await asyncio.gather(*writes))
        end = await alice.append("$KV.map.b", b"", expected=0, timeout_s=WAIT_S)

        *entries, _ = await take_until(seen, lambda entry: entry.sequence == end)
        sequences = [entry.sequence for entry in entries]
        assert sequences == sorted(sequences)
        assert sequences[-1] == last

    async def test_a_raising_handler_keeps_its_watch(self, server: Server) -> None:
        """Property: what a handler raises is counted; stored and later entries arrive all the same."""
        link = await server.link("alice")
        await link.ensure_stream(BUCKET, timeout_s=WAIT_S)
        await link.append("$KV.map.a", b"bad", expected=0, timeout_s=WAIT_S)
        seen: asyncio.Queue[Entry] = asyncio.Queue()

        def handle(entry: Entry) -> None:
            if entry.payload == b"bad":
                raise ValueError("bad entry")
            seen.put_nowait(entry)

        await link.watch("KV_map", "$KV.map.>", handle, timeout_s=WAIT_S)
        await link.append("$KV.map.b", b"good", expected=0, timeout_s=WAIT_S)

        assert [entry.payload for entry in await take(seen, 1)] == [b"good"]
        assert link.handler_errors == 1

    async def test_a_stopped_watch_delivers_nothing_more(self, link_pair: LinkPair) -> None:
        """Property: after `stop` nothing arrives, while another watch of the same link goes on."""
        alice, _ = link_pair
        await alice.ensure_stream(BUCKET, timeout_s=WAIT_S)
        stopped: asyncio.Queue[Entry] = asyncio.Queue()
        running: asyncio.Queue[Entry] = asyncio.Queue()
        watch = await alice.watch("KV_map", "$KV.map.>", stopped.put_nowait, timeout_s=WAIT_S)
        await alice.watch("KV_map", "$KV.map.>", running.put_nowait, timeout_s=WAIT_S)

        await watch.stop()
        await watch.stop()
        await alice.append("$KV.map.a", b"1", expected=0, timeout_s=WAIT_S)

        await take(running, 1)
        assert stopped.empty()

    async def test_a_watch_survives_the_server(self, server: Server, link_pair: LinkPair) -> None:
        """Property: after the server was killed and came back, the watch goes on by itself and misses nothing."""
        alice, bob = link_pair
        await alice.ensure_stream(BUCKET, timeout_s=WAIT_S)
        before = await alice.append("$KV.map.a", b"before", expected=0, timeout_s=WAIT_S)
        seen: asyncio.Queue[Entry] = asyncio.Queue()
        await bob.watch("KV_map", "$KV.map.>", seen.put_nowait, timeout_s=WAIT_S)
        back = asyncio.Event()
        alice.on_reconnect(back.set)

        await server.kill()
        await until(lambda: not alice.connected and not bob.connected)
        await server.restart()
        async with asyncio.timeout(WAIT_S):
            await back.wait()
        after = await alice.append("$KV.map.a", b"after", expected=before, timeout_s=WAIT_S)

        newest = 0
        while newest < after:
            (entry,) = await take(seen, 1)
            newest = max(newest, entry.sequence)
        assert entry.payload == b"after"


class TestLife:
    async def test_nothing_is_stored_through_a_link_in_doubt(self, link_pair: LinkPair) -> None:
        """Property: what is meant for one cluster never gets into another; what is stored can be read meanwhile."""
        alice, _ = link_pair
        await alice.ensure_stream(JOURNAL, timeout_s=WAIT_S)
        stored = await alice.append("ev.a", b"stored", expected=0, timeout_s=WAIT_S)
        alice.in_doubt = True

        with pytest.raises(Unavailable):
            await alice.append("ev.a", b"refused", expected=stored, timeout_s=WAIT_S)
        with pytest.raises(Unavailable):
            alice.append_then("ev.b", b"refused", expected=0, timeout_s=WAIT_S, then=lambda outcome: None)
        with pytest.raises(Unavailable):
            await alice.purge("journal", "ev.a", before=stored + 1, timeout_s=WAIT_S)
        entry = await alice.last("journal", "ev.a", timeout_s=WAIT_S)
        assert entry is not None
        assert entry.payload == b"stored"
        assert await alice.last("journal", "ev.b", timeout_s=WAIT_S) is None

        alice.in_doubt = False
        assert await alice.append("ev.a", b"more", expected=stored, timeout_s=WAIT_S) == stored + 1

    async def test_a_stream_that_is_not_there_is_told_from_a_server_that_is_not(self, link_pair: LinkPair) -> None:
        """Property: only the former says that what was stored is gone."""
        alice, _ = link_pair

        with pytest.raises(StreamMissing):
            await alice.last("no-such-stream", "ev.a", timeout_s=WAIT_S)

    async def test_a_dead_link_refuses_at_once_and_sends_nothing_later(
        self, server: Server, link_pair: LinkPair
    ) -> None:
        """Property: while disconnected every verb is Unavailable, and none of it happens after the link healed."""
        alice, bob = link_pair
        await alice.ensure_stream(JOURNAL, timeout_s=WAIT_S)
        heard: asyncio.Queue[Message] = asyncio.Queue()
        await bob.subscribe("news", heard.put_nowait)
        back = asyncio.Semaphore(0)
        alice.on_reconnect(back.release)
        bob.on_reconnect(back.release)

        await server.kill()
        await until(lambda: not alice.connected and not bob.connected)
        with pytest.raises(Unavailable):
            await alice.publish("news", b"lost")
        with pytest.raises(Unavailable):
            await alice.request("news", b"lost", timeout_s=WAIT_S)
        with pytest.raises(Unavailable):
            await alice.append("ev.a", b"lost", expected=0, timeout_s=WAIT_S)
        with pytest.raises(Unavailable):
            await alice.last("journal", "ev.a", timeout_s=WAIT_S)
        with pytest.raises(Unavailable):
            await alice.watch("journal", ">", lambda entry: None, timeout_s=WAIT_S)
        with pytest.raises(Unavailable):
            await alice.subscribe("news", heard.put_nowait)

        await server.restart()
        async with asyncio.timeout(WAIT_S):
            await back.acquire()
            await back.acquire()
        assert alice.connected
        assert bob.connected
        await alice.publish("news", b"after")
        assert [message.payload for message in await take(heard, 1)] == [b"after"]
        assert await alice.last("journal", "ev.a", timeout_s=WAIT_S) is None

    async def test_a_subscription_survives_the_server_twice(
        self, server: Server, link_pair: LinkPair, tasks: set[asyncio.Task[None]]
    ) -> None:
        """Property: subscriptions and requests work after each outage, and each is announced once."""
        alice, bob = link_pair
        await bob.subscribe("echo", answering(bob, b"re: ", tasks))
        back = asyncio.Semaphore(0)
        alice.on_reconnect(back.release)
        bob.on_reconnect(back.release)

        for _ in range(2):
            await server.kill()
            await until(lambda: not alice.connected and not bob.connected)
            await server.restart()
            async with asyncio.timeout(WAIT_S):
                await back.acquire()
                await back.acquire()
            assert await alice.request("echo", b"hello", timeout_s=WAIT_S) == b"re: hello"
        assert back.locked()

    async def test_a_subscription_stopped_during_an_outage_stays_stopped(
        self, server: Server, link_pair: LinkPair
    ) -> None:
        """Property: only what is still wanted comes back with the link."""
        alice, bob = link_pair
        heard: asyncio.Queue[Message] = asyncio.Queue()
        subscription = await bob.subscribe("news", heard.put_nowait)
        back = asyncio.Semaphore(0)
        alice.on_reconnect(back.release)
        bob.on_reconnect(back.release)

        await server.kill()
        await until(lambda: not alice.connected and not bob.connected)
        await subscription.stop()
        await server.restart()
        async with asyncio.timeout(WAIT_S):
            await back.acquire()
            await back.acquire()

        with pytest.raises(Unavailable):
            await alice.request("news", b"", timeout_s=WAIT_S)

    async def test_closing_flushes_and_is_final(self, link_pair: LinkPair) -> None:
        """Property: what was published before arrives; then every verb is Unavailable; closing again is harmless."""
        alice, bob = link_pair
        heard: asyncio.Queue[Message] = asyncio.Queue()
        await bob.subscribe("news", heard.put_nowait)
        for n in range(60):
            await alice.publish("news", bytes([n]) * 100_000)

        await alice.close()
        await alice.close()

        assert [message.payload[0] for message in await take(heard, 60)] == list(range(60))
        assert not alice.connected
        with pytest.raises(Unavailable):
            await alice.publish("news", b"late")
        with pytest.raises(Unavailable):
            await alice.request("news", b"late", timeout_s=WAIT_S)

    async def test_closing_ends_requests_under_way(self, link_pair: LinkPair) -> None:
        """Property: nobody waits on a closed link until a far deadline."""
        alice, bob = link_pair
        heard: asyncio.Queue[Message] = asyncio.Queue()
        await bob.subscribe("silent", heard.put_nowait)
        request = asyncio.create_task(alice.request("silent", b"", timeout_s=3_600))
        await take(heard, 1)

        await alice.close()

        with pytest.raises(Timeout):
            async with asyncio.timeout(WAIT_S):
                await request
