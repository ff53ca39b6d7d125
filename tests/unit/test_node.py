"""Nodes in one process: commands applied once wherever the actor is; moves that lose, double and reorder nothing."""

from __future__ import annotations

import asyncio
import random
from typing import Any
from unittest import mock

import orjson
import pytest

from routing import control
from routing.address import ActorId
from routing.control import StepRequest
from routing.envelope import MAX_HOPS, MAX_MESSAGE_ID_BYTES, Answer
from routing.errors import (
    Busy,
    FerryError,
    InDoubt,
    InvalidInput,
    NotApplicable,
    PayloadTooLarge,
    Quarantined,
    StateNotPortable,
    Timeout,
    TransientError,
    Unavailable,
    UnknownActorType,
)
from routing.lease import Lease
from routing.shard_map import Outcome
from routing.subjects import LEADER_KEY
from runtime.actor import Actor, command, event, query
from runtime.testing import Fault
from runtime.testing.memory_link import MemoryLink
from tests.unit.cluster import STEPS, UNIT, ForgetfulLink, Ledger, cluster
from tests.unit.virtual_time import clock, until, virtually

SOURCE_VERBS = ("pause", "capture", "serialize", "send", "await_ack", "commit", "resume")
DESTINATION_VERBS = ("stage", "verify", "activate")
FAULTS: list[Fault] = ["drop_request", "drop_reply", "late"]


async def answered(future: asyncio.Future[Answer], within_s: float = 40.0) -> Answer:
    async with asyncio.timeout(within_s):
        return await future


# ------------------------------------------------------------------------------------------------ applied once


@pytest.mark.parametrize("meanwhile", ["nothing", "move", "snapshot", "restart", "fail-over", "passivation", "all"])
def test_a_message_id_sent_again_is_applied_once_and_answered_the_same(meanwhile: str) -> None:
    """Whatever happened to the actor between the two."""

    @virtually
    async def check() -> None:
        async with cluster("a", "b", snapshot_every=4, passivate_after_s=2.0) as small:
            assert await small.send("k", "write", "m-1", entry="one") == 1

            if meanwhile in {"snapshot", "all"}:
                for number in range(6):
                    await small.send("k", "write", entry=number)
                assert "snapshot" in small.kinds("k")
            if meanwhile in {"move", "all"}:
                await small.move("m", "b")
            if meanwhile in {"passivation", "all"}:
                await asyncio.sleep(5)
                owner = (await small.map()).owner
                await until(lambda: not small.nodes[owner].node.host.inventory().units.get(UNIT))
            if meanwhile in {"restart", "all"}:
                owner = (await small.map()).owner
                await small.restart(owner, snapshot_every=4)
                await small.served_by(owner)
            if meanwhile in {"fail-over", "all"}:
                other = "a" if (await small.map()).owner == "b" else "b"
                await small.fail_over(other)
                await small.served_by(other)

            before = await small.send("k", "read")
            assert await small.send("k", "write", "m-1", entry="one") == 1
            assert await small.send("k", "read") == before
            assert before.count("one") == 1

    check()


@virtually
async def test_a_message_id_sent_twice_at_once_is_applied_once() -> None:
    """An impatient sender: both in the inbox before either has run."""
    async with cluster("a") as small:
        futures = [await small.post("a", small.command("k", "write_slowly", "m-1", entry=1)) for _ in range(5)]

        values = [(await answered(future)).value for future in futures]

        assert values == [1] * 5
        assert await small.send("k", "read") == [1]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("others", [0, 3])
def test_an_append_of_unknown_fate_is_applied_once(fault: Fault, others: int) -> None:
    """Lost, acknowledged to nobody, or landing after its sender gave up; the commands behind it are applied after."""

    @virtually
    async def check() -> None:
        async with cluster("a") as small:
            await small.send("k", "write", entry="first")
            small.disturb(fault, "append", ".ev.")

            sending = [asyncio.create_task(small.send("k", "write", "m-1", entry="x"))]
            for number in range(others):
                await asyncio.sleep(0.1)
                sending.append(asyncio.create_task(small.send("k", "write", f"o-{number}", entry=number)))
            replies = await asyncio.gather(*sending)
            await asyncio.sleep(10)  # what was late has landed, or been refused

            assert small.disturbed()
            assert await small.send("k", "write", "m-1", entry="x") == replies[0]
            entries = await small.send("k", "read")
            assert sorted(map(str, entries)) == sorted(["first", "x", *map(str, range(others))])
            assert [entries[reply - 1] for reply in replies] == ["x", *range(others)]

    check()


@virtually
async def test_many_appends_of_unknown_fate_lose_and_double_nothing() -> None:
    """A server that stumbles all the time; every command arrives once, per sender in order."""
    async with cluster("a", snapshot_every=5) as small:
        draw = random.Random(11)
        for _ in range(25):
            small.faults.append(
                (lambda k, s: k == "append" and ".ev." in s and draw.random() < 0.3, draw.choice(FAULTS), [1])
            )

        async def sender(name: int) -> None:
            for number in range(8):
                await small.send("k", "write", f"{name}-{number}", entry=[name, number], timeout_s=500.0)

        await asyncio.gather(*(sender(name) for name in range(4)))
        await asyncio.sleep(10)

        entries = await small.send("k", "read", timeout_s=60)
        assert len(entries) == 32
        for name in range(4):
            assert [number for who, number in entries if who == name] == list(range(8))


@virtually
async def test_a_query_sees_the_command_that_was_acknowledged_before_it() -> None:
    """A caller that awaits its reply reads its own write."""
    async with cluster("a") as small:
        for number in range(5):
            await small.send("k", "write", entry=number)
            assert len(await small.send("k", "read")) == number + 1


@virtually
async def test_a_command_without_events_is_answered_the_same_again() -> None:
    """It is in the log for its reply's sake."""
    async with cluster("a") as small:
        assert await small.send("k", "touch", "m-1") == "nothing changed"
        assert await small.send("k", "touch", "m-1") == "nothing changed"
        assert len(small.log("k")) == 1


@virtually
async def test_an_expired_command_is_not_applied() -> None:
    """Nobody waits for it any more; its sender was told that it failed, or asks again with a new deadline."""
    async with cluster("a") as small:
        await small.post("a", small.command("k", "write", "m-1", lives_s=-1.0, entry=1))
        await asyncio.sleep(1)

        assert await small.send("k", "read") == []
        assert small.log("k") == []


@virtually
async def test_different_actors_of_a_node_do_not_wait_for_each_other() -> None:
    """One at work, the other answers."""
    async with cluster("a") as small:
        Ledger.open_gate = asyncio.Event()
        slow = asyncio.create_task(small.send("slow", "write_slowly", entry=1))
        await until(lambda: Ledger.entered == 1)

        assert await small.send("quick", "write", entry=1, timeout_s=1.0) == 1

        Ledger.open_gate.set()
        assert await slow == 1


# ------------------------------------------------------------------------------------------------- forwarding


@virtually
async def test_a_command_sent_to_the_wrong_node_is_forwarded_and_answered() -> None:
    """The answer names the owner and its epoch, so the sender learns the route."""
    async with cluster("a", "b") as small:
        answer = await answered(await small.post("b", small.command("k", "write", "m-1", entry=1)))

        assert (answer.value, answer.error) == (1, None)
        assert (answer.owner, answer.epoch) == ("a", 1)


@virtually
async def test_a_command_that_was_forwarded_too_often_is_answered_moved() -> None:
    """Never loop, never reset the hop count: at the limit the sender is told, and nothing was applied."""
    async with cluster("a", "b") as small:
        answer = await answered(await small.post("b", small.command("k", "write", "m-1", hops=MAX_HOPS, entry=1)))

        assert answer.error is not None
        assert isinstance(answer.error, TransientError)
        assert answer.owner == "a"
        assert await small.send("k", "read") == []


@virtually
async def test_a_command_at_the_hop_limit_is_served_by_the_owner() -> None:
    """The last hop may still be the right one."""
    async with cluster("a") as small:
        answer = await answered(await small.post("a", small.command("k", "write", "m-1", hops=MAX_HOPS, entry=1)))

        assert answer.value == 1


@virtually
async def test_a_node_older_than_the_commands_epoch_looks_again_first() -> None:
    """Its map is behind the sender's: it asks the leader instead of serving on what it knew."""
    async with cluster("a", "b") as small:
        answer = await answered(await small.post("a", small.command("k", "write", "m-1", epoch=99, entry=1)))

        assert answer.value == 1 or isinstance(answer.error, TransientError)
        assert (await small.send("k", "read")).count(1) == (1 if answer.value == 1 else 0)


# ---------------------------------------------------------------------------------------------------- moving


@virtually
async def test_a_move_carries_state_answers_and_all_actors_of_the_unit() -> None:
    """Live or not: what was not in memory is replayed by whoever owns it."""
    async with cluster("a", "b") as small:
        for number in range(20):
            await small.send(f"k{number}", "write", f"m-{number}", entry=number)

        answer = await small.move("m", "b")

        assert answer["blackout_ms"] is not None
        assert (await small.map()).owner == "b"
        for number in range(20):
            assert await small.send(f"k{number}", "read") == [number]
            assert await small.send(f"k{number}", "write", f"m-{number}", entry=number) == 1


@virtually
async def test_a_clean_move_costs_no_claim_and_no_replay() -> None:
    """The source stopped by itself; the staged state is used as it came."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry=1)
        await small.move("m", "b")
        await small.send("k", "write", entry=2)

        assert small.kinds("k") == ["command", "command"]


@virtually
async def test_an_empty_unit_moves() -> None:
    """Nothing to capture, nothing to send."""
    async with cluster("a", "b") as small:
        await small.move("m", "b")
        assert await small.send("k", "write", entry=1) == 1
        assert (await small.map()).incarnation == small.nodes["b"].node.incarnation


@virtually
async def test_a_unit_of_many_actors_moves_page_by_page() -> None:
    """More actors than one answer holds: every page is asked for, every actor arrives."""
    async with cluster("a", "b") as small:
        count = control.ROWS_PER_PAGE * 2 + 10
        await asyncio.gather(*(small.send(f"k{n}", "write", entry=n) for n in range(count)))
        request = await small.lock("m", "b")
        await small.step("pause", request)

        for verb in ("capture", "serialize"):
            rows: dict[int, str] = {}
            offset: int | None = 0
            while offset is not None:
                page = StepRequest(move="m", unit=UNIT, epoch=request.epoch, source="a", destination="b", offset=offset)
                answer = await small.step(verb, page)
                assert len(answer["rows"]) <= control.ROWS_PER_PAGE
                rows |= {row["index"]: row["actor_id"] for row in answer["rows"]}
                offset = answer["next"]
            assert len(rows) == len(set(rows.values())) == count
        for verb in ("send", "await_ack", "commit"):
            await small.step(verb, request)

        for number in (0, control.ROWS_PER_PAGE, count - 1):
            assert await small.send(f"k{number}", "read") == [number]


@virtually
async def test_a_large_state_moves_in_chunks() -> None:
    """Many windows' worth of bytes that do not compress, intact at the other end."""
    async with cluster("a", "b", chunk_bytes=4096, transfer_window_bytes=16384) as small:
        letters = "".join(random.Random(3).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=300_000))
        await small.send("k", "write", entry=letters)

        await small.move("m", "b")

        assert await small.send("k", "read") == [letters]


@pytest.mark.parametrize("seed", range(6))
def test_moves_under_load_lose_double_and_overtake_nothing(seed: int) -> None:
    """Several senders, each awaiting its replies, over links with delays, while the unit goes back and forth."""

    @virtually
    async def check() -> None:
        # given
        draw = random.Random(seed)
        async with cluster("a", "b", latency=lambda: draw.random() * 0.004, snapshot_every=7) as small:
            replies: dict[int, list[int]] = {}
            stop = asyncio.Event()

            async def sender(name: int) -> None:
                replies[name] = []
                while not stop.is_set():
                    number = len(replies[name])
                    reply = await small.send(f"k{number % 2}", "write", f"{name}-{number}", entry=[name, number])
                    replies[name].append(reply)

            senders = [asyncio.create_task(sender(name)) for name in range(5)]

            # when
            for number in range(8):
                await asyncio.sleep(draw.random() * 0.05)
                request = await small.lock(f"m{number}", "ba"[number % 2])
                if draw.random() < 0.3:
                    await small.steps(request, until_verb=draw.choice(STEPS[:-1]))
                    await small.abort(request.move)
                    request = await small.lock(f"n{number}", "ba"[number % 2])
                await small.steps(request)
            stop.set()
            await asyncio.gather(*senders)

            # then
            assert sum(map(len, replies.values())) > 50
            for key in ("k0", "k1"):
                entries = await small.send(key, "read")
                for name, received in replies.items():
                    sent = [number for number in range(len(received)) if f"k{number % 2}" == key]
                    assert [number for who, number in entries if who == name] == sent
                    assert [entries[received[number] - 1] for number in sent] == [[name, number] for number in sent]

    check()


@virtually
async def test_what_waits_at_a_closed_gate_is_served_by_the_destination_in_order() -> None:
    """Nobody's command is dropped, and each answer goes straight back to its caller."""
    async with cluster("a", "b") as small:
        request = await small.lock("m", "b")
        await small.step("pause", request)
        futures = [await small.post("a", small.command("k", "write", f"m-{n}", entry=n)) for n in range(20)]
        await asyncio.sleep(0.1)
        assert not any(future.done() for future in futures)

        for verb in STEPS[1:]:
            answer = await small.step(verb, request)

        assert answer["waiting"] == 20
        assert [(await answered(future)).value for future in futures] == list(range(1, 21))
        assert await small.send("k", "read") == list(range(20))
        assert (await small.map()).owner == "b"


@virtually
async def test_queries_wait_at_a_closed_gate_too() -> None:
    """An answer from the paused source could be older than the destination's."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry=1)
        request = await small.lock("m", "b")
        await small.step("pause", request)
        future = await small.post("a", small.command("k", "read", "q-1"))
        await asyncio.sleep(0.5)
        assert not future.done()

        for verb in STEPS[1:]:
            await small.step(verb, request)

        assert (await answered(future)).value == [1]


@pytest.mark.parametrize("last_verb", [None, *STEPS[:-1]])
def test_a_rollback_after_any_step_opens_the_gate_with_what_waited_first(last_verb: str | None) -> None:
    """Exactly as if there had been no move; and the next move goes through."""

    @virtually
    async def check() -> None:
        async with cluster("a", "b") as small:
            await small.send("k", "write", entry="before")
            request = await small.lock("m", "b")
            if last_verb is not None:
                await small.steps(request, until_verb=last_verb)
            waiting = [await small.post("a", small.command("k", "write", f"m-{n}", entry=n)) for n in range(5)]
            await asyncio.sleep(0.1)
            assert [future.done() for future in waiting] == [last_verb is None] * 5

            await small.abort("m")
            later = await small.post("a", small.command("k", "write", "later", entry="later"))

            assert [(await answered(future)).value for future in [*waiting, later]] == [2, 3, 4, 5, 6, 7]
            assert await small.send("k", "read") == ["before", 0, 1, 2, 3, 4, "later"]
            view = await small.map()
            assert (view.owner, view.outcome_of("m")) == ("a", Outcome.ABORTED)
            await small.move("n", "b")
            assert await small.send("k", "read") == ["before", 0, 1, 2, 3, 4, "later"]
            assert (await small.map()).owner == "b"

    check()


@pytest.mark.parametrize("last_verb", STEPS[:-1])
def test_the_verbs_of_a_rolled_back_move_do_not_apply_any_more(last_verb: str) -> None:
    """A late Celery task finds its lock gone: NotApplicable, whatever it asks, and nothing happens."""

    @virtually
    async def check() -> None:
        async with cluster("a", "b") as small:
            await small.send("k", "write", entry=1)
            request = await small.lock("m", "b")
            await small.steps(request, until_verb=last_verb)
            await small.abort("m")
            await until(lambda: small.nodes["a"].node.host.serves(UNIT))

            for verb in STEPS:
                with pytest.raises(NotApplicable):
                    await small.step(verb, request)

            assert await small.send("k", "write", entry=2) == 2
            assert (await small.map()).owner == "a"

    check()


@virtually
async def test_the_verbs_of_an_old_move_do_not_disturb_a_new_one() -> None:
    """A straggler of m while n is under way: it neither opens n's gate nor commits n."""
    async with cluster("a", "b", "c") as small:
        await small.send("k", "write", entry=1)
        old = await small.lock("m", "b")
        await small.steps(old, until_verb="await_ack")
        await small.abort("m")
        new = await small.lock("n", "c")
        await small.steps(new, until_verb="serialize")

        for verb in STEPS:
            with pytest.raises(NotApplicable):
                await small.step(verb, old)
        with pytest.raises(NotApplicable):
            await small.step("commit", StepRequest(**{**_fields(new), "epoch": new.epoch - 1}))
        with pytest.raises(NotApplicable):
            await small.step("commit", StepRequest(**{**_fields(new), "move": "m"}))
        assert (await small.map()).move == "n"

        for verb in STEPS[3:]:
            await small.step(verb, new)
        assert (await small.map()).owner == "c"
        assert await small.send("k", "read") == [1]


def _fields(request: StepRequest) -> dict[str, Any]:
    return {name: getattr(request, name) for name in request.__dataclass_fields__}


@virtually
async def test_every_verb_may_come_twice() -> None:
    """Celery runs tasks twice: the second time gives the same answer and changes nothing."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry=1)
        request = await small.lock("m", "b")
        for verb in STEPS[:-1]:
            first = await small.step(verb, request)
            again = await small.step(verb, request)
            if verb in {"capture", "serialize", "await_ack"}:
                assert first == again, verb

        await small.step("commit", request)
        await small.step("commit", request)

        view = await small.map()
        assert (view.owner, view.epoch) == ("b", request.epoch + 1)
        assert await small.send("k", "read") == [1]


@virtually
async def test_every_verb_may_come_twice_at_once() -> None:
    """Two workers hold the same task."""
    async with cluster("a", "b", latency=lambda: 0.001) as small:
        await small.send("k", "write", entry=1)
        request = await small.lock("m", "b")

        for verb in STEPS:
            results = await asyncio.gather(small.step(verb, request), small.step(verb, request), return_exceptions=True)
            assert not any(isinstance(r, BaseException) and not isinstance(r, TransientError) for r in results), results
            assert any(isinstance(r, dict) for r in results), results

        assert (await small.map()).epoch == request.epoch + 1
        assert await small.send("k", "read") == [1]


@virtually
async def test_a_step_that_was_skipped_does_not_apply() -> None:
    """`commit` before anything was acknowledged would drop state the destination does not have."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry=1)
        request = await small.lock("m", "b")

        for verb in STEPS[1:]:
            with pytest.raises(FerryError):
                await small.step(verb, request)
        await small.step("pause", request)
        with pytest.raises(FerryError):
            await small.step("commit", request)

        assert (await small.map()).owner == "a"
        await small.abort("m")
        assert await small.send("k", "write", entry=2) == 2


@virtually
async def test_a_step_at_the_wrong_node_does_not_apply() -> None:
    """A unit the node does not hold, or has never heard of."""
    async with cluster("a", "b") as small:
        request = await small.lock("m", "b")

        for verb in STEPS:
            with pytest.raises(FerryError):
                await small.step(verb, request, node="b")
        for unit in ("shard.7", "shard.x", "cluster", ""):
            with pytest.raises(FerryError):
                await small.step("pause", StepRequest(**{**_fields(request), "unit": unit}))

        await small.steps(request)
        assert (await small.map()).owner == "b"


@pytest.mark.parametrize("loser", ["commit", "abort"])
def test_of_commit_and_abort_exactly_one_happens(loser: str) -> None:
    """Whoever is first in the map; both sides follow it, and what waited is served once."""

    @virtually
    async def check() -> None:
        delays = {"commit": 0.0, "abort": 0.004} if loser == "abort" else {"commit": 0.004, "abort": 0.0}
        async with cluster("a", "b", latency=lambda: 0.0005) as small:
            await small.send("k", "write", entry="before")
            request = await small.lock("m", "b")
            await small.steps(request, until_verb="await_ack")
            waiting = [await small.post("a", small.command("k", "write", f"m-{n}", entry=n)) for n in range(3)]

            async def after(delay_s: float, what: Any) -> Any:
                await asyncio.sleep(delay_s)
                return await what

            results = await asyncio.gather(
                after(delays["commit"], small.step("commit", request)),
                after(delays["abort"], small.abort("m")),
                return_exceptions=True,
            )

            assert [isinstance(result, BaseException) for result in results].count(True) == 1, results
            view = await small.map()
            assert view.outcome_of("m") is (Outcome.ABORTED if loser == "commit" else Outcome.COMMITTED)
            assert [(await answered(future)).value for future in waiting] == [2, 3, 4]
            assert await small.send("k", "read") == ["before", 0, 1, 2]

    check()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_commit_of_unknown_fate_is_settled_from_the_map(fault: Fault) -> None:
    """The COMMIT's append is lost, unacknowledged or late: one owner in the end, and nothing served twice."""

    @virtually
    async def check() -> None:
        async with cluster("a", "b") as small:
            await small.send("k", "write", entry="before")
            request = await small.lock("m", "b")
            await small.steps(request, until_verb="await_ack")
            future = await small.post("a", small.command("k", "write", "m-1", entry=1))
            small.disturb(fault, "append", "shard.0")

            for _ in range(3):
                try:
                    await small.step("commit", request)
                    break
                except (TransientError, InDoubt):
                    continue
            await asyncio.sleep(10)

            assert small.disturbed()
            assert (await answered(future)).value == 2
            assert await small.send("k", "read") == ["before", 1]
            view = await small.map()
            assert view.outcome_of("m") is not None
            assert view.owner == ("b" if view.outcome_of("m") is Outcome.COMMITTED else "a")

    check()


@pytest.mark.parametrize("part", ["xfer", "ctl.b.stage", "ctl.b.verify", "ctl.b.activate"])
@pytest.mark.parametrize("fault", ["drop_request", "drop_reply"])
def test_a_lost_message_between_source_and_destination_costs_a_retry_at_most(part: str, fault: Fault) -> None:
    """The step fails as one that may be tried again, and then succeeds."""

    @virtually
    async def check() -> None:
        async with cluster("a", "b") as small:
            await small.send("k", "write", entry="x" * 5000)
            request = await small.lock("m", "b")
            small.disturb(fault, "request", part)

            for verb in STEPS:
                for _attempt in range(3):
                    try:
                        await small.step(verb, request)
                        break
                    except TransientError:
                        continue
                else:
                    raise AssertionError(f"{verb} did not succeed")

            assert small.disturbed()
            assert (await small.map()).owner == "b"
            assert await small.send("k", "write", entry=2) == 2

    check()


@virtually
async def test_a_destination_that_is_away_leaves_the_source_as_it_was() -> None:
    """`send` says so; a rollback opens the gate."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry=1)
        request = await small.lock("m", "b")
        await small.steps(request, until_verb="serialize")
        small.nodes["b"].cut()

        with pytest.raises((Unavailable, Timeout)):
            await small.step("send", request)
        await small.abort("m")

        assert await small.send("k", "write", entry=2) == 2


@virtually
async def test_a_destination_that_lost_its_staging_activates_from_the_log() -> None:
    """It was restarted between its acknowledgement and the COMMIT: a cache is gone, nothing else."""
    async with cluster("a", "b") as small:
        for number in range(5):
            await small.send("k", "write", f"m-{number}", entry=number)
        request = await small.lock("m", "b")
        await small.steps(request, until_verb="await_ack")
        await small.restart("b")

        await small.step("commit", request)
        await small.served_by("b")

        assert await small.send("k", "read") == list(range(5))
        assert await small.send("k", "write", "m-3", entry=3) == 4


@virtually
async def test_a_staged_state_that_the_log_has_overtaken_is_brought_up_to_date() -> None:
    """Aborted after staging, written to, moved again under another id: the old staging is never used."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry=1)
        request = await small.lock("m", "b")
        await small.steps(request, until_verb="await_ack")
        await small.abort("m")
        await small.send("k", "write", entry=2)

        await small.move("n", "b")

        assert await small.send("k", "read") == [1, 2]


# --------------------------------------------------------------------------------- what the other end cannot take


class Newer(Ledger):
    actor_type = "ledger"
    schema_version = 2

    def upgrade(self, state: Any, from_version: int) -> Any:
        return state


class Awkward(Actor):
    """Its state can be made such that it does not travel."""

    actor_type = "awkward"

    def __init__(self) -> None:
        self.how = ""
        self.count = 0

    def capture(self) -> bytes:
        if self.how == "raises":
            raise ZeroDivisionError("a mistake in capture")
        if self.how == "not bytes":
            return "text"  # type: ignore[return-value]
        return f"{self.count}".encode() + (b"\0" * (2**21) if self.how == "large" else b"")

    def restore(self, data: bytes) -> None:
        self.count = int(data.rstrip(b"\0"))

    @command
    def become(self, *, how: str) -> int:
        self.emit("became", how=how)
        return self.count

    @query
    def ask(self) -> int:
        return self.count

    @event
    def became(self, how: str) -> None:
        self.how = how
        self.count += 1


@virtually
async def test_an_actor_type_the_destination_does_not_know_is_a_clear_error() -> None:
    """Named, permanent, before a byte of state is sent; after the rollback all is as before."""
    async with cluster("a") as small:
        await small.add("b", classes=[])
        await small.send("k", "write", entry=1)
        request = await small.lock("m", "b")
        await small.steps(request, until_verb="serialize")

        with pytest.raises(UnknownActorType, match="ledger"):
            await small.step("send", request)
        assert not any("xfer" in subject for _, subject in small.messages)
        await small.abort("m")

        assert await small.send("k", "write", entry=2) == 2


@virtually
async def test_state_newer_than_the_destinations_code_is_a_clear_error() -> None:
    """Found by `await_ack`, while the source can still go on."""
    async with cluster() as small:
        await small.add("a", classes=[Newer])
        await small.add("b", classes=[Ledger])
        await small.assign("a")
        await small.served_by("a")
        await small.send("k", "write", entry=1)
        request = await small.lock("m", "b")
        await small.steps(request, until_verb="send")

        with pytest.raises(StateNotPortable):
            await small.step("await_ack", request)
        await small.abort("m")

        assert await small.send("k", "write", entry=2) == 2


@virtually
async def test_older_state_is_upgraded_at_the_destination() -> None:
    """A rolling deployment: the new code takes over, from the staged state as well as from the log."""
    async with cluster("a", snapshot_every=2) as small:
        await small.add("b", classes=[Newer], snapshot_every=2)
        for number in range(3):
            await small.send("k", "write", entry=number)

        await small.move("m", "b")
        assert await small.send("k", "write", entry=3) == 4
        await small.restart("b", classes=[Newer])
        await small.served_by("b")

        assert await small.send("k", "read") == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("how", "kind"), [("raises", StateNotPortable), ("not bytes", StateNotPortable), ("large", PayloadTooLarge)]
)
def test_a_state_that_does_not_travel_is_a_clear_error_and_harms_nobody(how: str, kind: type[FerryError]) -> None:
    """The actor is named; the node lives; after the rollback the actor serves on, and so do its neighbours."""

    @virtually
    async def check() -> None:
        async with cluster(max_state_bytes=2**20) as small:
            for name in ("a", "b"):
                await small.add(name, classes=[Ledger, Awkward])
            await small.assign("a")
            await small.served_by("a")
            awkward = ActorId("awkward", "k")
            await small.router.send_message(awkward, "become", {"how": how})
            await small.send("k", "write", entry=1)
            request = await small.lock("m", "b")
            await small.step("pause", request)

            with pytest.raises(kind, match="awkward/k"):
                await small.step("capture", request)
                await small.step("serialize", request)
            await small.abort("m")

            assert not small.nodes["a"].task.done()
            assert await small.router.send_message(awkward, "ask") == 1
            assert await small.send("k", "write", entry=2) == 2

    check()


@virtually
async def test_a_state_that_cannot_be_snapshotted_does_not_stop_its_actor() -> None:
    """The roll-up fails; commands go on, unrolled, and it is tried again more and more rarely: it is no small work."""
    async with cluster(snapshot_every=3) as small:
        await small.add("a", classes=[Awkward])
        await small.assign("a")
        await small.served_by("a")
        awkward = ActorId("awkward", "k")

        for number in range(8):
            assert await small.router.send_message(awkward, "become", {"how": "raises"}) == number + 1

        assert small.nodes["a"].node.host.counters["snapshots_failed"] == 2  # after 3 commands, and after 6
        assert not small.nodes["a"].task.done()


@virtually
async def test_the_next_owner_does_not_try_at_once_what_the_one_before_could_not() -> None:
    """A log that is overlong already could not be rolled up: a large state is not encoded in vain after every move."""
    async with cluster(snapshot_every=3) as small:
        for name in ("a", "b"):
            await small.add(name, classes=[Awkward])
        await small.assign("a")
        await small.served_by("a")
        awkward = ActorId("awkward", "k")
        for _ in range(6):
            await small.router.send_message(awkward, "become", {"how": "raises"})

        await small.fail_over("b")
        for _ in range(8):
            await small.router.send_message(awkward, "become", {"how": "raises"})

        assert small.nodes["b"].node.host.counters["snapshots_failed"] == 1  # the claim makes it 7: tried from 12 on


# ----------------------------------------------------------------------------------------------- bounds, slowness


@virtually
async def test_an_overflowing_buffer_says_busy_and_loses_nothing() -> None:
    """The one too many is told to come back; what waited is served; the refused one is welcome afterwards."""
    async with cluster("a", "b", buffer_messages=3) as small:
        request = await small.lock("m", "b")
        await small.step("pause", request)
        futures = [await small.post("a", small.command("k", "write", f"m-{n}", entry=n)) for n in range(5)]

        refused = [await answered(future, 1.0) for future in futures[3:]]
        assert all(isinstance(answer.error, Busy) for answer in refused)
        await small.abort("m")

        assert [(await answered(future)).value for future in futures[:3]] == [1, 2, 3]
        assert await small.send("k", "write", "m-3", entry=3) == 4
        assert await small.send("k", "read") == [0, 1, 2, 3]


@virtually
async def test_an_overflowing_buffer_costs_a_patient_sender_only_time() -> None:
    """Through the router: Busy is retried under the same id until the gate opens."""
    async with cluster("a", "b", buffer_messages=2) as small:
        request = await small.lock("m", "b")
        await small.step("pause", request)
        sending = [asyncio.create_task(small.send("k", "write", f"m-{n}", entry=n)) for n in range(8)]
        await asyncio.sleep(1)

        for verb in STEPS[1:]:
            await small.step(verb, request)
        await asyncio.gather(*sending)

        assert sorted(await small.send("k", "read")) == list(range(8))


@virtually
async def test_a_full_inbox_says_busy_and_loses_nothing() -> None:
    """One slow actor does not fill the node."""
    async with cluster("a", mailbox_messages=2) as small:
        Ledger.open_gate = asyncio.Event()
        first = await small.post("a", small.command("k", "write_slowly", "m-0", entry=0))
        await until(lambda: Ledger.entered == 1)
        futures = [await small.post("a", small.command("k", "write", f"m-{n}", entry=n)) for n in range(1, 6)]
        await asyncio.sleep(0.5)

        refused = [future for future in futures if future.done()]
        assert refused
        assert all(isinstance(future.result().error, Busy) for future in refused)
        Ledger.open_gate.set()
        accepted = [first, *(future for future in futures if future not in refused)]

        values = [(await answered(future)).value for future in accepted]
        assert values == list(range(1, len(accepted) + 1))


@virtually
async def test_a_handler_that_runs_too_long_keeps_the_pause_waiting() -> None:
    """Busy with the gate closed; when it has ended, the pause asked for again succeeds and its effect moves along."""
    async with cluster("a", "b") as small:
        Ledger.open_gate = asyncio.Event()
        slow = await small.post("a", small.command("k", "write_slowly", "slow", entry="slow"))
        await until(lambda: Ledger.entered == 1)
        request = await small.lock("m", "b")

        with pytest.raises(Busy):
            await small.step("pause", request)
        with pytest.raises(FerryError):
            await small.step("capture", request)
        behind = await small.post("a", small.command("k", "write", "behind", entry="behind"))
        Ledger.open_gate.set()
        await small.steps(request)

        assert (await answered(slow)).value == 1
        assert (await answered(behind)).value == 2
        assert await small.send("k", "read") == ["slow", "behind"]
        assert (await small.map()).owner == "b"


@virtually
async def test_commands_queued_behind_a_running_one_go_before_those_that_came_later() -> None:
    """In the inbox when the gate closed, then in the buffer: the order of arrival holds across the move."""
    async with cluster("a", "b") as small:
        Ledger.open_gate = asyncio.Event()
        futures = [await small.post("a", small.command("k", "write_slowly", "m-0", entry=0))]
        await until(lambda: Ledger.entered == 1)
        futures += [await small.post("a", small.command("k", "write", f"m-{n}", entry=n)) for n in range(1, 4)]
        request = await small.lock("m", "b")
        pausing = asyncio.create_task(small.step("pause", request))
        await asyncio.sleep(0.5)
        futures += [await small.post("a", small.command("k", "write", f"m-{n}", entry=n)) for n in range(4, 7)]
        await asyncio.sleep(0.1)
        Ledger.open_gate.set()
        await pausing

        for verb in STEPS[1:]:
            await small.step(verb, request)

        assert [(await answered(future)).value for future in futures] == list(range(1, 8))
        assert await small.send("k", "read") == list(range(7))


@virtually
async def test_idle_actors_are_put_to_rest_and_wake_from_the_log() -> None:
    """Memory is for those at work."""
    async with cluster("a", passivate_after_s=1.0) as small:
        await small.send("k", "write", "m-1", entry=1)
        await until(lambda: not small.nodes["a"].node.host.inventory().units.get(UNIT), within_s=10)

        assert await small.send("k", "read") == [1]
        assert await small.send("k", "write", "m-1", entry=1) == 1


# -------------------------------------------------------------------------------------------------- lease and life


@virtually
async def test_two_nodes_of_one_name_do_not_live_at_once() -> None:
    """The second is told so at its start."""
    async with cluster("a") as small:
        with pytest.raises(InvalidInput):
            await small.add("a")

        assert await small.send("k", "write", entry=1) == 1


@virtually
async def test_a_stopped_node_gives_its_lease_back_at_once() -> None:
    """Nobody waits for its expiry: the same name may start again immediately."""
    async with cluster("a", "b") as small:
        running = small.nodes["b"]
        running.task.cancel()
        await asyncio.gather(running.task, return_exceptions=True)
        await running.node.stop()
        await running.node.stop()

        await small.add("b")


@virtually
async def test_stopping_lets_a_running_handler_finish() -> None:
    """Its caller gets the reply."""
    async with cluster("a") as small:
        Ledger.open_gate = asyncio.Event()
        future = await small.post("a", small.command("k", "write_slowly", "m-1", entry=1))
        await until(lambda: Ledger.entered == 1)

        stopping = asyncio.create_task(small.nodes["a"].node.stop())
        await asyncio.sleep(0.5)
        Ledger.open_gate.set()
        await stopping

        assert (await answered(future)).value == 1


@virtually
async def test_a_query_that_answers_with_an_awaitable_is_asked_with_its_own_arguments_each_time() -> None:
    """It cannot be answered at once: asked again in its mailbox, it must not find what it has changed before."""
    async with cluster("a") as small:
        await small.send("k", "write", entry=1)
        router, actor = small.nodes["a"].node.router, ActorId("ledger", "k")

        for _ in range(2):
            assert await small.send("k", "pop_later", items=[1, 2, 3]) == [1, 2]
            assert await router.send_message(actor, "pop_later", {"items": [1, 2, 3]}, timeout_s=1.0) == [1, 2]


@virtually
async def test_an_answer_that_finds_the_link_full_waits_for_it() -> None:
    """An answer dropped is a caller left in doubt: it is sent as soon as the server takes it."""
    async with cluster("a") as small:
        await small.send("k", "write", entry=1)
        host = small.nodes["a"].node.host

        with mock.patch.object(MemoryLink, "answer", side_effect=Unavailable("too much waits to be sent")):
            read = await small.send("k", "read", timeout_s=1.0)

        assert read == [1]
        assert host.counters["unsent"] == 0


@virtually
async def test_local_reads_stop_when_the_lease_is_within_its_margin() -> None:
    """Cut off, it cannot know whether another owns its actors by now."""
    async with cluster("a") as small:
        await small.send("k", "write", entry=1)
        node = small.nodes["a"].node
        assert await node.router.send_message(ActorId("ledger", "k"), "read", timeout_s=1.0) == [1]
        small.nodes["a"].cut()
        await asyncio.sleep(small.settings.node_lease_s)

        with pytest.raises((TransientError, InDoubt)):
            await node.router.send_message(ActorId("ledger", "k"), "read", timeout_s=2.0)


@virtually
async def test_one_lost_renewal_interrupts_no_reads() -> None:
    """Renewing five times a lease is for exactly this."""
    async with cluster("a") as small:
        await small.send("k", "write", entry=1)
        await asyncio.sleep(3)
        small.disturb("drop_request", "append", "leases.node.a")
        began_s, failed = clock(), []

        while clock() - began_s < 8:
            await asyncio.sleep(0.2)
            try:
                await small.send("k", "read", timeout_s=0.1)
            except FerryError as error:
                failed.append((round(clock() - began_s, 1), type(error).__name__))

        assert small.disturbed()
        assert failed == []


@pytest.mark.parametrize("outage_s", [0.5, 2.0, 4.0, 20.0])
def test_a_node_comes_back_after_an_outage_of_its_link(outage_s: float) -> None:
    """Nobody took its units: it re-acquires its lease, reads the map again, and serves on."""

    @virtually
    async def check() -> None:
        async with cluster("a") as small:
            await small.send("k", "write", "m-1", entry=1)
            small.nodes["a"].cut()
            await asyncio.sleep(outage_s)
            small.nodes["a"].heal()

            assert await small.send("k", "write", "m-2", entry=2, timeout_s=30.0) == 2
            assert await small.send("k", "write", "m-1", entry=1) == 1
            assert not small.nodes["a"].task.done()

    check()


@virtually
async def test_a_restarted_owner_takes_its_units_back_and_aborts_the_lock() -> None:
    """BOOT: what was paused went with the old process; commands go on, and the move does not."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", "m-1", entry=1)
        request = await small.lock("m", "b")
        await small.steps(request, until_verb="await_ack")

        await small.restart("a")
        await small.served_by("a")

        view = await small.map()
        assert (view.owner, view.epoch, view.outcome_of("m")) == ("a", request.epoch + 1, Outcome.ABORTED)
        with pytest.raises(NotApplicable):
            await small.step("commit", request)
        assert await small.send("k", "write", "m-1", entry=1) == 1
        assert await small.send("k", "write", entry=2) == 2
        assert "claim" in small.kinds("k")


@virtually
async def test_a_move_whose_worker_died_is_aborted_by_its_source() -> None:
    """Paused, and then nothing: the pause lease runs out, and the gate opens through the map."""
    async with cluster("a", "b") as small:
        request = await small.lock("m", "b")
        await small.steps(request, until_verb="serialize")
        future = await small.post("a", small.command("k", "write", "m-1", lives_s=60.0, entry=1))
        began_s = clock()

        assert (await answered(future, 60.0)).value == 1

        assert clock() - began_s < small.settings.pause_lease_s + 2
        assert (await small.map()).outcome_of("m") is Outcome.ABORTED


@virtually
async def test_a_move_that_goes_on_is_not_aborted_by_its_source() -> None:
    """Each step is a sign of life: a slow chain of steps, each within the lease, completes."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry=1)
        request = await small.lock("m", "b")
        for verb in STEPS:
            await small.step(verb, request)
            await asyncio.sleep(small.settings.pause_lease_s * 0.6)

        assert (await small.map()).outcome_of("m") is Outcome.COMMITTED


@virtually
async def test_a_lock_that_nobody_follows_is_aborted_by_its_source() -> None:
    """The worker died between LOCK and `pause` [S1]; commands were served all along."""
    async with cluster("a", "b") as small:
        await small.lock("m", "b")
        began_s = clock()

        while (await small.map()).outcome_of("m") is None:
            assert await small.send("k", "write", entry=1, timeout_s=2.0)
            await asyncio.sleep(0.5)
            assert clock() - began_s < small.settings.lock_lease_s + 2

        assert (await small.map()).outcome_of("m") is Outcome.ABORTED
        await small.move("n", "b")


@virtually
async def test_a_draining_node_says_so_waits_to_be_emptied_and_leaves() -> None:
    """SIGTERM: announce, let the coordinator move everything away, then give the lease back and end."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry=1)
        leader = Lease(small.link, small.subjects.lease_bucket, LEADER_KEY, incarnation="c-1", ttl_s=120.0, clock=clock)
        await leader.hold({"name": "c"})
        await asyncio.sleep(0.1)

        def leases(name: str) -> list[Any]:
            return [orjson.loads(e.payload) for e in small.leases() if e.subject.endswith(f"node.{name}") and e.payload]

        small.nodes["a"].stopping.set()
        await until(lambda: leases("a") and leases("a")[0]["state"] == "draining", within_s=5)
        assert await small.send("k", "write", entry=2) == 2

        await small.move("m", "b")
        async with asyncio.timeout(30):
            await small.nodes["a"].task

        assert leases("a") == []
        assert await small.send("k", "read") == [1, 2]


@virtually
async def test_a_draining_node_that_nobody_empties_leaves_at_its_deadline() -> None:
    """Everything is in the log and in the map: staying for ever would serve nobody who sent the signal."""
    async with cluster("a", "b", drain_timeout_s=20.0) as small:
        await small.send("k", "write", entry=1)
        leader = Lease(small.link, small.subjects.lease_bucket, LEADER_KEY, incarnation="c-1", ttl_s=120.0, clock=clock)
        await leader.hold({"name": "c"})
        began_s = clock()
        await asyncio.sleep(0.1)

        small.nodes["a"].stopping.set()
        async with asyncio.timeout(60):
            await small.nodes["a"].task
        assert clock() - began_s > 15

        await small.fail_over("b")
        await small.served_by("b")
        assert await small.send("k", "read") == [1]


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
