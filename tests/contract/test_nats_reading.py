"""Reading by sequence: from whatever replica answers, and from the leader where one does not or answers something else.

Streams of one replica have no other, so the replica that lags or errs is played here, on the subject where the server
would answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from nats.aio.client import Client

from routing.errors import Incompatible
from routing.link import Entry, StreamSpec
from routing.nats_link import NatsLink
from tests.contract.waiting import WAIT_S, handled

if TYPE_CHECKING:
    from tests.contract.conftest import NatsServer

JOURNAL = StreamSpec(name="journal", subjects=("ev.>",), direct=True)
LEADER_ONLY = StreamSpec(name="journal", subjects=("ev.>",))
DIRECT_GET, FROM_LEADER = "$JS.API.DIRECT.GET.journal", "$JS.API.STREAM.MSG.GET.journal"


async def three(link: NatsLink) -> list[Entry]:
    """Three messages of one subject, and what they should read as."""
    entries: list[Entry] = []
    for number in range(3):
        payload = b"line %d\r\n\r\nanother" % number
        after = entries[-1].sequence if entries else 0
        sequence = await link.append("ev.a", payload, expected=after, timeout_s=WAIT_S)
        entries.append(Entry(sequence=sequence, subject="ev.a", payload=payload))
    return entries


async def noted(link: NatsLink, admin: Client) -> None:
    """Return when `admin` has noted all that `link` has asked."""
    await link.rtt()
    await handled(admin)


async def edited(admin: Client, spec: StreamSpec, **changes: Any) -> None:
    info = json.loads((await admin.request(f"$JS.API.STREAM.INFO.{spec.name}", b"", timeout=WAIT_S)).data)
    config = json.dumps(info["config"] | changes).encode()
    answer = json.loads((await admin.request(f"$JS.API.STREAM.UPDATE.{spec.name}", config, timeout=WAIT_S)).data)
    assert "error" not in answer


async def play_a_replica(admin: Client, answer: Callable[[int], tuple[bytes, dict[str, str]] | None]) -> list[int]:
    """Answer direct gets in the server's place; the list tells which sequences were asked for. None is silence."""
    await edited(admin, JOURNAL, allow_direct=False)
    asked: list[int] = []

    async def play(question: Any) -> None:
        sequence = int(json.loads(question.data)["seq"])
        asked.append(sequence)
        if (said := answer(sequence)) is not None:
            await admin.publish(question.reply, said[0], headers=said[1])

    await admin.subscribe(DIRECT_GET, cb=play)
    await handled(admin)
    return asked


@pytest.fixture
async def requests(admin: Client) -> list[str]:
    """The subjects of all requests that reach JetStream while the test runs."""
    heard: list[str] = []

    async def note(message: Any) -> None:
        heard.append(message.subject)

    await admin.subscribe("$JS.API.>", cb=note)
    await admin.flush()
    return heard


async def test_the_leader_is_not_asked_for_what_a_replica_has(
    nats_server: NatsServer, admin: Client, requests: list[str]
) -> None:
    """Property: nothing else can stand at a sequence, so one read of each is enough."""
    link = await nats_server.link("test")
    await link.ensure_stream(JOURNAL, timeout_s=WAIT_S)
    entries = await three(link)

    assert await link.read("journal", [entry.sequence for entry in entries], timeout_s=WAIT_S) == entries

    await noted(link, admin)
    assert requests.count(DIRECT_GET) == len(entries)
    assert FROM_LEADER not in requests


async def test_a_stream_of_an_earlier_version_is_read_from_its_leader(
    nats_server: NatsServer, admin: Client, requests: list[str]
) -> None:
    """Property: that it allows no direct gets is no reason to refuse it, and they are not tried."""
    earlier, link = await nats_server.link("earlier"), await nats_server.link("test")
    await earlier.ensure_stream(LEADER_ONLY, timeout_s=WAIT_S)
    entries = await three(earlier)

    await link.ensure_stream(JOURNAL, timeout_s=WAIT_S)

    assert await link.read("journal", [entry.sequence for entry in entries], timeout_s=WAIT_S) == entries
    await noted(link, admin)
    assert requests.count(FROM_LEADER) == len(entries)
    assert DIRECT_GET not in requests
    with pytest.raises(Incompatible, match="subjects"):
        await link.ensure_stream(StreamSpec(name="journal", subjects=("other.>",), direct=True), timeout_s=WAIT_S)


async def test_the_leader_is_read_when_nobody_serves_direct_gets(nats_server: NatsServer, admin: Client) -> None:
    """Property: an operator may switch them off while nodes run."""
    link = await nats_server.link("test")
    await link.ensure_stream(JOURNAL, timeout_s=WAIT_S)
    entries = await three(link)

    await edited(admin, JOURNAL, allow_direct=False)

    assert await link.read("journal", [entry.sequence for entry in entries], timeout_s=WAIT_S) == entries


@pytest.mark.parametrize("fault", ["lags", "says another sequence", "says nothing that is a message"])
async def test_the_leader_is_asked_for_what_a_replica_lacks(nats_server: NatsServer, admin: Client, fault: str) -> None:
    """Property: what did not come from one comes from the other, in the order of the question."""
    link = await nats_server.link("test")
    await link.ensure_stream(JOURNAL, timeout_s=WAIT_S)
    first, second, third = await three(link)

    def answer(sequence: int) -> tuple[bytes, dict[str, str]]:
        if sequence == second.sequence:
            return b"as the replica has it", {"Nats-Subject": "ev.a", "Nats-Sequence": str(sequence)}
        if fault == "lags":
            return b"", {"Status": "404", "Description": "Message Not Found"}
        if fault == "says another sequence":
            return b"other", {"Nats-Subject": "ev.a", "Nats-Sequence": str(sequence + 100)}
        return b"garbage", {"Nats-Sequence": str(sequence)}

    asked = await play_a_replica(admin, answer)

    found = await link.read("journal", [third.sequence, first.sequence, second.sequence], timeout_s=WAIT_S)

    assert sorted(asked) == [first.sequence, second.sequence, third.sequence]
    assert found == [third, first, Entry(second.sequence, "ev.a", b"as the replica has it")]


@pytest.mark.parametrize("silent_for", [1, 3])
async def test_a_silent_replica_holds_up_one_read_and_not_every_one(
    nats_server: NatsServer, admin: Client, monkeypatch: pytest.MonkeyPatch, silent_for: int
) -> None:
    """Property: the leader is asked while there is time, and from then on at once, until replicas are tried again."""
    monkeypatch.setattr("routing.nats_link.DIRECT_SHARE", 0.3 / WAIT_S)
    link = await nats_server.link("test")
    await link.ensure_stream(JOURNAL, timeout_s=WAIT_S)
    entries = await three(link)
    sequences = [entry.sequence for entry in entries]

    def answer(sequence: int) -> tuple[bytes, dict[str, str]] | None:
        if sequence in sequences[:silent_for]:
            return None
        return entries[sequences.index(sequence)].payload, {"Nats-Subject": "ev.a", "Nats-Sequence": str(sequence)}

    asked = await play_a_replica(admin, answer)

    assert await link.read("journal", sequences, timeout_s=WAIT_S) == entries
    assert asked == sequences
    assert await link.read("journal", sequences, timeout_s=WAIT_S) == entries
    assert asked == sequences
    assert len(link._connection._answers) == 0

    monkeypatch.setattr(link, "_direct", {"journal": 0.0})  # as after DIRECT_AGAIN_S
    assert await link.read("journal", sequences, timeout_s=WAIT_S) == entries
    assert asked == sequences * 2


async def test_headers_of_a_publisher_are_not_taken_for_the_servers(
    nats_server: NatsServer, admin: Client, requests: list[str]
) -> None:
    """Property: where a message stands is the server's word, whatever the message itself says."""
    link = await nats_server.link("test")
    await link.ensure_stream(JOURNAL, timeout_s=WAIT_S)
    headers = {"Nats-Subject": "ev.other", "Nats-Sequence": "77", "X-Note": "Nats-Subject: ev.other"}
    acknowledged = await admin.request("ev.a", b"x", headers=headers, timeout=WAIT_S)
    sequence = json.loads(acknowledged.data)["seq"]

    assert await link.read("journal", [sequence], timeout_s=WAIT_S) == [Entry(sequence, "ev.a", b"x")]
    await noted(link, admin)
    assert FROM_LEADER not in requests
