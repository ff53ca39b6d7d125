"""Garbage on the wire and in the log: it is refused in words, and stops one actor at most."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from routing import control
from routing.envelope import MAX_MESSAGE_ID_BYTES
from routing.errors import InvalidInput, Quarantined, StateNotPortable, Unavailable
from tests.unit.cluster import UNIT, ForgetfulLink, cluster
from tests.unit.virtual_time import virtually

SOURCE_VERBS = ("pause", "capture", "serialize", "send", "await_ack", "commit", "resume")
DESTINATION_VERBS = ("stage", "verify", "activate")


# -------------------------------------------------------------------------------------------- garbage on the wire


def _garbage() -> list[bytes]:
    valid = {"move": "m", "unit": UNIT, "epoch": 1, "source": "a", "destination": "b", "offset": 0}
    page = {"move": "m", "unit": UNIT, "epoch": 1, "source": "a", "destination": "b", "rows": []}
    payloads = [
        b"",
        b"garbage",
        b"{}",
        b"[]",
        b"null",
        b"7",
        b"\xff\xfe",
        b"{" * 3000,
        b"[" * 100_000,
        b'{"move":"m","pieces":[]}\n',
    ]
    for document in (valid, page):
        for field in document:
            values: tuple[Any, ...] = (None, -1, "x", [], {}, 2**63, "shard.\u00b2", "shard.-1", "*", True, 1.5)
            for value in values:
                payloads.append(orjson.dumps({**document, field: value}))
    return payloads


@virtually
async def test_malformed_payloads_on_every_subject_leave_the_node_alive() -> None:
    """Whatever comes in on commands, verbs and chunks: an error at most; the next good message is served."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry=1)
        subjects = [
            small.subjects.command("a", "test"),
            small.subjects.transfer("a", "m"),
            small.subjects.transfer("a", "x.y"),
        ]
        subjects += [
            small.subjects.control("a", verb)
            for verb in (*SOURCE_VERBS, *DESTINATION_VERBS, "status", "inventory", "nonsense")
        ]

        for subject in subjects:
            for payload in _garbage():
                await small.link.publish(subject, payload)
                await small.link.publish(subject, payload, reply="_INBOX.nobody")
        await asyncio.sleep(30)

        assert not small.nodes["a"].task.done()
        assert await small.send("k", "write", entry=2) == 2
        view = await small.map()
        assert (view.owner, view.epoch, view.move) == ("a", 1, None)
        await small.move("real", "b")
        assert await small.send("k", "read") == [1, 2]


@virtually
async def test_a_malformed_request_with_a_reply_subject_is_answered_with_invalid_input() -> None:
    """The asker learns what was wrong, instead of waiting for a timeout."""
    async with cluster("a") as small:
        for verb in (*SOURCE_VERBS, *DESTINATION_VERBS):
            for payload in (b"", b"garbage", b"{}", b"[]"):
                raw = await small.link.request(small.subjects.control("a", verb), payload, timeout_s=5)
                with pytest.raises(InvalidInput):
                    control.result_of(raw)


@virtually
async def test_a_malformed_command_is_answered_with_invalid_input() -> None:
    """As far as it can be answered at all: a sender with a bug should see it, not run into its deadline."""
    async with cluster("a") as small:
        with pytest.raises(InvalidInput):
            await small.send("k", "write", "x" * (MAX_MESSAGE_ID_BYTES + 1), entry=1, timeout_s=5.0)
        assert await small.send("k", "read") == []


@virtually
async def test_damaged_chunks_of_a_real_move_are_refused_and_the_node_lives() -> None:
    """Announced properly, then nonsense instead of the state."""
    async with cluster("a", "b") as small:
        request = await small.lock("m", "b")
        await small.step("pause", request)
        row = control.ManifestRow(
            index=0, actor_id="ledger/k", version=1, digest="0" * 32, state_bytes=9, transfer_bytes=40
        )
        page = control.MigrationRequest(
            move="m", unit=UNIT, epoch=request.epoch, source="a", destination="b", rows=(row,)
        )
        await control.ask(small.link, small.subjects, "b", "stage", page, timeout_s=5)

        headers: tuple[Any, ...] = (
            {"actor": None},
            {"actor": 7},
            {"actor": "ledger/k", "memory": "x"},
            {"actor": "ledger/k"},
            [],
        )
        for header in headers:
            body = (orjson.dumps(header) + b"\n").ljust(40, b"x")[:40]
            chunk = orjson.dumps({"move": "m", "pieces": [[0, 0, 40]]}) + b"\n" + body
            await small.link.publish(small.subjects.transfer("b", "m"), chunk)
            await asyncio.sleep(0.1)
            with pytest.raises((StateNotPortable, Unavailable, InvalidInput)):
                await small.step("verify", request, node="b")
        await asyncio.sleep(1)

        assert not small.nodes["b"].task.done()
        await small.abort("m")
        await small.move("n", "b")


@pytest.mark.parametrize(
    "events",
    [7, None, [1], [["written"]], [["written", 7]], [["written", {"wrong": 1}]], [["unheard", {}]], [["__init__", {}]]],
)
def test_a_log_this_code_cannot_replay_stops_one_actor_only(events: Any) -> None:
    """Its callers get an error of the tree; the node and its other actors go on."""

    @virtually
    async def check() -> None:
        async with cluster("a", "b") as small:
            await small.send("k", "write", entry=1)
            await small.send("fine", "write", entry=1)
            [first] = small.log("k")
            document = {**orjson.loads(first.payload), "id": "by-hand", "events": events, "trail": [first.sequence]}
            await small.link.append(first.subject, orjson.dumps(document) + b"\n", expected=None, timeout_s=1)
            await small.fail_over("b")
            await small.served_by("b")

            with pytest.raises(StateNotPortable):
                await small.send("k", "read", timeout_s=5.0)

            assert not small.nodes["b"].task.done()
            assert await small.send("fine", "write", entry=2) == 2

    check()


@virtually
async def test_garbage_in_the_map_stops_no_node() -> None:
    """A slip of the hand with `nats kv put`: the node keeps what it has."""
    async with cluster("a") as small:
        await small.send("k", "write", entry=1)

        for payload in (b"garbage", b"{}", b'{"owner":"a"}'):
            await small.link.append(small.map_subject(), payload, expected=None, timeout_s=1)
        await asyncio.sleep(3)

        assert not small.nodes["a"].task.done()
        assert await small.send("k", "read") == [1]


# -------------------------------------------------------------------------------------------- a log that is too short


@virtually
async def test_a_log_shorter_than_what_was_staged_quarantines_the_actor() -> None:
    """JetStream lost acknowledged events between capture and activation: never activate, tell the caller [J]."""
    async with cluster("a") as small:
        forgotten: dict[str, int] = {}
        await small.add("b", wrap=lambda link: ForgetfulLink(link, forgotten))
        for number in range(3):
            await small.send("short", "write", entry=number)
            await small.send("whole", "write", entry=number)
        request = await small.lock("m", "b")
        await small.steps(request, until_verb="await_ack")
        forgotten["short"] = small.log("short")[1].sequence

        await small.step("commit", request)

        with pytest.raises(Quarantined):
            await small.send("short", "read", timeout_s=5.0)
        with pytest.raises(Quarantined):
            await small.send("short", "write", entry=9, timeout_s=5.0)
        assert await small.send("whole", "write", entry=3) == 4
        assert len(small.log("short")) == 3, "nothing may be appended to a damaged log"


@virtually
async def test_a_log_that_vanished_quarantines_the_actor() -> None:
    """The whole subject is gone: not to be mistaken for a new actor."""
    async with cluster("a") as small:
        forgotten: dict[str, int] = {}
        await small.add("b", wrap=lambda link: ForgetfulLink(link, forgotten))
        await small.send("gone", "write", entry=1)
        request = await small.lock("m", "b")
        await small.steps(request, until_verb="await_ack")
        forgotten["gone"] = 0

        await small.step("commit", request)

        with pytest.raises(Quarantined):
            await small.send("gone", "read", timeout_s=5.0)


@virtually
async def test_a_log_that_shrinks_under_a_live_actor_quarantines_it() -> None:
    """Noticed by the next append; and a quarantined actor does not move as if it were whole."""
    async with cluster() as small:
        forgotten: dict[str, int] = {}
        await small.add("a", wrap=lambda link: ForgetfulLink(link, forgotten))
        await small.assign("a")
        await small.served_by("a")
        for number in range(3):
            await small.send("short", "write", entry=number)
        forgotten["short"] = small.log("short")[0].sequence

        with pytest.raises(Quarantined):
            await small.send("short", "write", entry=3, timeout_s=10.0)
        with pytest.raises(Quarantined):
            await small.send("short", "write", entry=3, timeout_s=10.0)
        assert await small.send("other", "write", entry=1) == 1
