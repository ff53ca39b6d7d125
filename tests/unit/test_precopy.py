"""Large states travel before the gate is closed: what is copied ahead saves time, and is never trusted."""

from __future__ import annotations

import asyncio
import random
import string
from typing import Any

import pytest
from msgspec.structs import replace

from routing.address import ActorId
from routing.control import MigrationRequest
from routing.errors import InvalidInput, NotApplicable, StateNotPortable, Timeout, Unavailable
from runtime.handover import WORD_S
from runtime.journal import Kind, Record
from tests.unit.cluster import UNIT, Ledger, SmallCluster, cluster
from tests.unit.virtual_time import until, virtually

LARGE = "".join(random.Random(1).choices(string.ascii_letters + string.digits, k=20_000))  # 15 kB when compressed
SMALL_CHUNKS: dict[str, Any] = {"chunk_bytes": 500, "transfer_window_bytes": 1000, "precopy_from_bytes": 10_000}


def chunks(small: SmallCluster) -> int:
    return sum(1 for kind, subject in small.messages if kind == "request" and ".xfer." in subject)


async def append_stray(small: SmallCluster, node: str, *, entry: str) -> None:
    """A command of actor k that lands in its log without its owner knowing: message id "stray"."""
    host, log = small.nodes[node].node.host, small.log("k")
    record = Record(
        kind=Kind.COMMAND, epoch=1, incarnation="stray", trail=tuple(entry.sequence for entry in log),
        message_id="stray", events=[["written", {"entry": entry}]], reply=len(log) + 1,
    )  # fmt: skip
    await host._mailboxes._journal.append(ActorId("ledger", "k"), record, after=log[-1].sequence)


def counter(small: SmallCluster, node: str, name: str) -> int:
    return small.nodes[node].node.host.counters[name]


@virtually
async def test_a_state_that_has_not_changed_since_is_not_sent_after_the_pause() -> None:
    """Everything has arrived and been verified before the gate is closed; after it, there is nothing to say."""
    async with cluster("a", "b", **SMALL_CHUNKS) as small:
        await small.send("k", "write", entry=LARGE)
        request = await small.lock("m", "b")

        await small.step("pause", request)
        ahead = chunks(small)
        await small.steps(request)

        assert ahead > 20
        assert chunks(small) == ahead
        assert not small.messages_to("stage")
        assert await small.send("k", "read") == [LARGE]
        assert (counter(small, "b", "activations"), counter(small, "b", "replayed")) == (0, 0)


@virtually
async def test_only_what_has_changed_since_is_announced_after_the_pause() -> None:
    """The destination replays that from the log, and the word of it is for all of them."""
    async with cluster("a", "b") as small:
        for name in ("i", "k", "l"):
            await small.send(name, "write", entry="one")
        request, announced = await small.lock("m", "b"), _announced_to(small, "b")
        await small.step("precopy", request)
        assert len(announced.pop().rows) == 3
        await small.send("k", "write", entry="two")

        await small.steps(request)

        assert [[row.actor_id for row in page.rows] for page in announced] == [["ledger/k"]]
        assert await small.send("k", "read") == ["one", "two"]
        assert await small.send("l", "read") == ["one"]
        assert counter(small, "b", "activations") == 0


@virtually
async def test_a_word_given_long_ago_is_asked_for_again() -> None:
    """The destination may be gone by then; it is asked for its word, and told of nothing it has."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry="one")
        request, announced = await small.lock("m", "b"), _announced_to(small, "b")
        await small.step("pause", request)
        ahead = chunks(small)
        await asyncio.sleep(WORD_S)

        await small.steps(request)

        assert [(len(page.rows), page.verify) for page in announced] == [(1, False), (0, True)]
        assert chunks(small) == ahead
        assert await small.send("k", "read") == ["one"]
        assert counter(small, "b", "activations") == 0


@virtually
async def test_a_destination_that_has_lost_what_it_vouched_for_gets_it_again() -> None:
    """Its count tells, as soon as it is told of anything: then it is told of everything."""
    async with cluster("a", "b") as small:
        for name in ("i", "k", "l"):
            await small.send(name, "write", entry="one")
        request = await small.lock("m", "b")
        await small.step("precopy", request)
        ahead = chunks(small)
        await small.send("k", "write", entry="two")
        small.nodes["b"].node._arrivals.forget_unless(UNIT, None)

        await small.steps(request)

        assert chunks(small) > ahead
        assert await small.send("k", "read") == ["one", "two"]
        assert await small.send("l", "read") == ["one"]
        assert counter(small, "b", "activations") == 0


def _announced_to(small: SmallCluster, node: str) -> list[MigrationRequest]:
    """The pages of manifests that a node takes in from now on."""
    announced: list[MigrationRequest] = []
    arrivals = small.nodes[node].node._arrivals
    announce = arrivals.announce

    def noting(page: MigrationRequest) -> list[int]:
        announced.append(page)
        return announce(page)

    arrivals.announce = noting  # type: ignore[method-assign]
    return announced


@virtually
async def test_small_states_wait_for_the_pause() -> None:
    """Below the threshold nothing is sent ahead: it would only be sent twice."""
    async with cluster("a", "b", **SMALL_CHUNKS) as small:
        await small.send("k", "write", entry="little")
        request = await small.lock("m", "b")

        await small.step("pause", request)

        assert chunks(small) == 0
        await small.steps(request)
        assert chunks(small) == 1
        assert await small.send("k", "read") == ["little"]


@virtually
async def test_the_actor_goes_on_while_its_state_is_copied() -> None:
    """The gate is open until everything has arrived, and what is decided meanwhile is not lost."""
    async with cluster("a", "b", precopy_bytes_per_s=5_000, **SMALL_CHUNKS) as small:
        await small.send("k", "write", entry=LARGE)
        request = await small.lock("m", "b")

        answer = await small.ask("pause", request)
        written = await small.send("k", "write", entry="meanwhile", timeout_s=0.5)

        assert answer == {"actors": 1, "waiting": 0, "pending": True}
        assert written == 2
        await small.steps(request)
        assert await small.send("k", "read") == [LARGE, "meanwhile"]


@virtually
async def test_of_an_actor_that_has_changed_since_only_the_log_is_read() -> None:
    """Nothing is sent again: the destination replays what came after the version it holds, before it acknowledges."""
    async with cluster("a", "b", precopy_bytes_per_s=5_000, **SMALL_CHUNKS) as small:
        await small.send("k", "write", entry=LARGE)
        request = await small.lock("m", "b")
        await small.ask("pause", request)
        await small.send("k", "write", "once", entry="one")
        await small.send("k", "write", entry="two")
        await small.step("pause", request)
        ahead = chunks(small)

        captured = (await small.step("capture", request))["rows"]
        await small.steps(request, until_verb="await_ack")

        assert chunks(small) == ahead
        assert counter(small, "b", "replayed") == 2
        assert [row["version"] for row in captured] == [small.log("k")[-1].sequence]
        await small.step("commit", request)
        assert await small.send("k", "write", "once", entry="one") == 2
        assert await small.send("k", "read") == [LARGE, "one", "two"]
        assert counter(small, "b", "activations") == 0


@virtually
async def test_what_was_replayed_is_compared_with_the_log_again_before_its_first_use() -> None:
    """An append of the earlier owner, given up by it, lands after the destination has caught up."""
    async with cluster("a", "b", precopy_bytes_per_s=5_000, **SMALL_CHUNKS) as small:
        await small.send("k", "write", entry=LARGE)
        request = await small.lock("m", "b")
        await small.ask("pause", request)
        await small.send("k", "write", entry="one")
        await small.steps(request, until_verb="await_ack")
        await append_stray(small, "a", entry="two")

        await small.step("commit", request)

        assert await small.send("k", "read") == [LARGE, "one", "two"]


@virtually
async def test_a_snapshot_since_is_taken_from_the_log() -> None:
    """It has replaced the messages that would have been replayed; the log has the whole state then."""
    async with cluster("a", "b", precopy_bytes_per_s=5_000, snapshot_every=3, **SMALL_CHUNKS) as small:
        await small.send("k", "write", entry=LARGE)
        request = await small.lock("m", "b")
        await small.ask("pause", request)
        for number in range(5):
            await small.send("k", "write", entry=number)

        await small.steps(request)

        assert "snapshot" in small.kinds("k")
        assert await small.send("k", "read") == [LARGE, 0, 1, 2, 3, 4]


@virtually
async def test_the_copy_is_of_a_moment_between_two_commands() -> None:
    """A command that is being decided ends first: its effect is in the copy, or in the log after it, never in half."""
    async with cluster("a", "b", **SMALL_CHUNKS) as small:
        await small.send("k", "write", entry=LARGE)
        gate = Ledger.open_gate = asyncio.Event()
        slow = asyncio.create_task(small.send("k", "write_slowly", entry="slow"))
        await until(lambda: Ledger.entered == 1)
        request = await small.lock("m", "b")
        pausing = asyncio.create_task(small.step("pause", request))
        await asyncio.sleep(0.2)
        before = chunks(small)
        gate.set()

        await pausing
        await small.steps(request)

        assert before == 0
        assert await slow == 2
        assert await small.send("k", "read") == [LARGE, "slow"]


@virtually
async def test_an_effect_that_is_not_in_the_log_yet_is_not_in_the_copy() -> None:
    """While an append is on its way the instance is ahead of its version: replayed on such a copy, it counts twice."""
    async with cluster("a", "b", precopy_bytes_per_s=5_000, **SMALL_CHUNKS) as small:
        await small.send("k", "write", entry=LARGE)
        link, began = small.nodes["a"].link, asyncio.Event()
        append = link.append

        async def late(subject: str, payload: bytes, **more: Any) -> int:
            began.set()
            await asyncio.sleep(1)
            return await append(subject, payload, **more)

        request = await small.lock("m", "b")
        link.append = late  # type: ignore[method-assign]
        writing = asyncio.create_task(small.send("k", "write", entry="one"))
        await began.wait()

        await small.ask("pause", request)
        link.append = append  # type: ignore[method-assign]
        assert await writing == 2
        await small.send("k", "write", entry="two")
        await small.steps(request)

        assert await small.send("k", "read") == [LARGE, "one", "two"]


@virtually
async def test_a_handler_that_does_not_end_is_not_waited_for_longer_than_the_pause_would() -> None:
    """The pause then says what is wrong, as it does without a copy ahead."""
    async with cluster("a", "b", **SMALL_CHUNKS) as small:
        await small.send("k", "write", entry=LARGE)
        Ledger.open_gate = asyncio.Event()
        slow = asyncio.create_task(small.send("k", "write_slowly", entry="slow", timeout_s=60))
        await until(lambda: Ledger.entered == 1)
        request = await small.lock("m", "b")

        with pytest.raises(Exception, match="a handler of ledger/k still runs after"):
            await small.step("pause", request)

        Ledger.open_gate.set()
        await small.steps(request)
        assert await slow == 2
        assert await small.send("k", "read") == [LARGE, "slow"]


@virtually
async def test_an_aborted_move_stops_copying_and_is_forgotten_by_both() -> None:
    """The actor never stopped; nothing stays in memory; the next move is a fresh one."""
    async with cluster("a", "b", precopy_bytes_per_s=2_000, **SMALL_CHUNKS) as small:
        await small.send("k", "write", entry=LARGE)
        request = await small.lock("m", "b")
        await small.ask("pause", request)
        await small.abort("m")
        await asyncio.sleep(1)
        sent = chunks(small)

        with pytest.raises(NotApplicable):
            await small.ask("pause", request)
        await asyncio.sleep(5)

        assert chunks(small) == sent
        assert small.nodes["a"].node._handover._outgoing == {}
        assert len(small.nodes["b"].node._arrivals) == 0
        assert await small.send("k", "write", entry="on") == 2
        await small.move("n", "b")
        assert await small.send("k", "read") == [LARGE, "on"]


@virtually
async def test_a_lock_is_not_left_alone_while_a_copy_goes_on_though_nobody_asks() -> None:
    """Copying takes longer than the lease after which a source aborts a lock; then it ends, and the lease runs out."""
    async with cluster("a", "b", precopy_bytes_per_s=1_000, **SMALL_CHUNKS) as small:
        await small.send("k", "write", entry=LARGE)
        request = await small.lock("m", "b")
        await small.ask("pause", request)

        await asyncio.sleep(18)
        locked = (await small.map()).move
        await asyncio.sleep(small.settings.pause_lease_s + 5)

        assert (locked, (await small.map()).move) == ("m", None)
        with pytest.raises(NotApplicable):
            await small.ask("pause", request)


@virtually
async def test_a_destination_that_restarts_gets_everything_again() -> None:
    """What was copied ahead is lost with it; the source still has the bytes."""
    async with cluster("a", "b", **SMALL_CHUNKS) as small:
        await small.send("k", "write", entry=LARGE)
        request = await small.lock("m", "b")
        await small.step("pause", request)
        ahead = chunks(small)
        driving = asyncio.create_task(_drive(small, request))
        await small.restart("b")
        driving.cancel()

        await small.steps(request)

        assert chunks(small) > ahead + 20
        assert await small.send("k", "read") == [LARGE]


async def _drive(small: SmallCluster, request: Any) -> None:
    """Keep the pause alive, as a worker that tries again does."""
    while True:
        await small.ask("capture", request)
        await asyncio.sleep(1)


@virtually
async def test_a_destination_that_cannot_be_reached_does_not_keep_the_move_from_its_steps() -> None:
    """Copying ahead fails quietly; `send` then says what is wrong."""
    async with cluster("a", "b", **SMALL_CHUNKS) as small:
        await small.send("k", "write", entry=LARGE)
        request = await small.lock("m", "b")
        small.nodes["b"].cut()

        await small.steps(request, until_verb="serialize")

        with pytest.raises((Unavailable, Timeout)):
            await small.step("send", request)
        assert counter(small, "a", "precopies_failed") == 1
        small.nodes["b"].heal()
        await small.steps(request)
        assert await small.send("k", "read") == [LARGE]


@virtually
async def test_a_source_that_dies_while_copying_leaves_nothing_behind() -> None:
    """Its next life serves from the log; what the destination has staged is dropped when the map has moved on."""
    async with cluster("a", "b", precopy_bytes_per_s=2_000, **SMALL_CHUNKS) as small:
        await small.send("k", "write", entry=LARGE)
        request = await small.lock("m", "b")
        await small.ask("pause", request)
        assert len(small.nodes["b"].node._arrivals) == 1

        await small.restart("a")
        await small.served_by("a")

        assert len(small.nodes["b"].node._arrivals) == 0
        assert await small.send("k", "read") == [LARGE]
        with pytest.raises(NotApplicable):
            await small.ask("pause", request)


@virtually
async def test_an_idle_actor_that_came_by_a_move_is_copied_ahead_again() -> None:
    """Nobody has used it, so it was never compared with the log; the next destination compares."""
    async with cluster("a", "b", **SMALL_CHUNKS) as small:
        await small.send("k", "write", entry=LARGE)
        await small.move("m", "b")
        await small.served_by("b")
        request = await small.lock("n", "a")

        await small.step("pause", request)
        ahead = chunks(small)
        await small.steps(request)

        assert chunks(small) == ahead
        assert await small.send("k", "read") == [LARGE]


@virtually
async def test_a_replay_that_fails_leaves_the_actor_lacking_instead_of_half() -> None:
    """The log cannot be read when the destination catches up: the state is sent again, and then it can."""
    async with cluster("a", "b", precopy_bytes_per_s=5_000, **SMALL_CHUNKS) as small:
        await small.send("k", "write", entry=LARGE)
        request = await small.lock("m", "b")
        await small.ask("pause", request)
        await small.send("k", "write", entry="one")
        destination = small.nodes["b"].node

        async def fail(_: Any) -> None:
            raise Timeout("the log does not answer")

        await small.steps(request, until_verb="serialize")
        ahead, replay_on = chunks(small), destination._reception._catch_up.replay_on
        destination._reception._catch_up.replay_on = fail  # type: ignore[method-assign]
        await small.step("send", request)
        destination._reception._catch_up.replay_on = replay_on  # type: ignore[method-assign]

        announced = destination._arrivals._moves["m"].actors[0]
        assert announced.live is None
        await small.steps(request)
        assert chunks(small) > ahead
        assert await small.send("k", "read") == [LARGE, "one"]


@virtually
async def test_an_owner_behind_its_log_replays_only_what_it_lacks() -> None:
    """Also outside of moves: an append that it did not hear of costs one read, not the whole log."""
    async with cluster("a", "b", **SMALL_CHUNKS) as small:
        await small.send("k", "write", entry="one")
        await small.send("k", "write", entry="two")
        await small.move("m", "b")
        await small.served_by("b")
        await append_stray(small, "b", entry="three")

        assert await small.send("k", "write", "stray", entry="three") == 3
        assert await small.send("k", "read") == ["one", "two", "three"]
        assert (counter(small, "b", "replayed"), counter(small, "b", "activations")) == (1, 0)


@virtually
async def test_a_move_that_ends_while_its_pause_waits_for_the_copy_closes_no_gate() -> None:
    """The map is read again before the gate is closed: nobody would open a gate closed for a move that has ended."""
    async with cluster("a", "b", precopy_bytes_per_s=20_000, **SMALL_CHUNKS) as small:
        await small.send("k", "write", entry=LARGE)
        request = await small.lock("m", "b")
        pausing = asyncio.create_task(small.ask("pause", request))
        await until(lambda: chunks(small) > 2)
        await small.abort("m")

        with pytest.raises(NotApplicable):
            await pausing

        assert small.nodes["a"].node.host.units[UNIT].pause is None
        assert await small.send("k", "write", entry="on", timeout_s=0.5) == 2


@virtually
async def test_a_destination_that_lacks_what_was_never_announced_does_not_end_the_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its answer is refused while copying ahead as it is while sending; the actor goes on."""
    async with cluster("a", "b", **SMALL_CHUNKS) as small:
        await small.send("k", "write", entry=LARGE)
        monkeypatch.setattr(small.nodes["b"].node._arrivals, "announce", lambda request: [99])
        request = await small.lock("m", "b")

        with pytest.raises(InvalidInput, match="never announced"):
            await small.steps(request)

        assert counter(small, "a", "precopies_failed") == 1
        await small.abort("m")
        assert await small.send("k", "write", entry="on") == 2
        assert not small.nodes["a"].task.done()


@virtually
async def test_a_unit_of_small_actors_is_copied_ahead_and_acknowledged_with_its_manifest() -> None:
    """With the gate closed nothing is sent but the manifest, and its answer is the destination's word already."""
    async with cluster("a", "b") as small:
        for number in range(3):
            await small.send(f"k{number}", "write", entry="small")
        request = await small.lock("m", "b")

        await small.step("precopy", request)
        ahead = chunks(small)
        await small.send("k0", "write", entry="meanwhile")
        await small.step("pause", request)
        asked = len(small.messages_to("verify"))
        await small.steps(request, until_verb="await_ack")

        assert ahead
        assert chunks(small) == ahead
        assert len(small.messages_to("verify")) == asked
        await small.step("commit", request)
        assert await small.send("k0", "read") == ["small", "meanwhile"]
        assert counter(small, "b", "activations") == 0


@virtually
async def test_all_steps_up_to_commit_are_taken_when_asked_for_together() -> None:
    """The answers are those of the verbs one by one, and asking again changes nothing."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry="one")
        request = await small.lock("m", "b")
        await small.step("pause", request)

        prepared = await small.ask("prepare", request)

        assert list(prepared) == ["capture", "serialize", "send", "await_ack"]
        again = await small.ask("prepare", request)
        assert [answer["ok"] for answer in again.values()] == [answer["ok"] for answer in prepared.values()]
        for verb in ("capture", "serialize", "await_ack"):
            assert prepared[verb]["ok"] == await small.ask(verb, request)
        await small.step("commit", request)
        assert await small.send("k", "read") == ["one"]


@virtually
async def test_what_cannot_be_prepared_is_told_by_its_own_verb() -> None:
    """A destination that is away ends the preparation before `send`, and `send` says so."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry="one")
        request = await small.lock("m", "b")
        await small.step("pause", request)
        small.nodes["b"].cut()
        await asyncio.sleep(WORD_S)

        prepared = await small.ask("prepare", request)

        assert {verb: list(answer) for verb, answer in prepared.items()} == {
            "capture": ["ok", "ago_s"], "serialize": ["ok", "ago_s"], "send": ["error", "ago_s"]
        }  # fmt: skip
        with pytest.raises((Timeout, Unavailable)):
            await small.ask("send", request)


@virtually
async def test_a_refusal_that_the_answer_to_the_pause_came_too_early_for_is_told_when_asked() -> None:
    """It is not tried again before somebody has heard of it; then it is."""
    async with cluster("a", "b", latency=lambda: 0.05, precopy_from_bytes=10**9) as small:
        await small.send("k", "write", entry="one")
        request = replace(await small.lock("m", "b"), ahead=True)
        verbs, refused = small.nodes["b"].node._verbs, 0
        schema, stage = verbs["stage"]

        async def refuse_once(page: Any) -> dict[str, Any]:
            nonlocal refused
            refused += 1
            if refused > 1:
                return await stage(page)
            raise StateNotPortable("not this one")

        verbs["stage"] = (schema, refuse_once)
        paused = await small.step("pause", request)
        assert list(paused["prepared"]) == ["capture", "serialize"]
        await asyncio.sleep(0.5)

        told = await small.ask("prepare", request)
        again = await small.ask("prepare", request)

        assert "not this one" in str(told["send"]["error"])
        assert list(again) == ["capture", "serialize", "send", "await_ack"]
        assert all("ok" in answer for answer in again.values())


@virtually
async def test_a_long_catch_up_is_asked_for_again() -> None:
    """Many actors that have changed since: reading their logs may take longer than one question, and goes on."""
    keys = [f"k{number}" for number in range(60)]
    async with cluster("a", "b", latency=lambda: 0.02, append_timeout_s=1.0, precopy_bytes_per_s=10**9) as small:
        for key in keys:
            await small.send(key, "write", entry=1)
        request = await small.lock("m", "b")
        await small.step("precopy", request)
        for key in keys:
            await small.send(key, "write", entry=2)
        await small.steps(request, until_verb="send")
        before = len(small.messages_to("verify"))

        await small.step("await_ack", request)
        asked = len(small.messages_to("verify")) - before
        await small.step("commit", request)

        assert asked > 1
        assert counter(small, "b", "replayed") == len(keys)
        assert [await small.send(key, "read") for key in keys] == [[1, 2]] * len(keys)
