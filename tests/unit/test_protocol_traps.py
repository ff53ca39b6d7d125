"""The failures that the model, the simulation and Jepsen found, each as a scene with real nodes.

Named after the rules in docs/protocol.md: T1 to T15 by the model, S1 by the simulation, J by Jepsen's report on NATS.
J is in test_node_garbage.py, with the other logs that are too short.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import pytest

from routing.address import ActorId
from routing.envelope import Answer
from routing.errors import InDoubt, NotApplicable, Rejected, TransientError
from routing.shard_map import Outcome
from runtime.journal import decode_record
from tests.unit.cluster import STEPS, UNIT, Ledger, SmallCluster, cluster
from tests.unit.virtual_time import clock, until, virtually


async def answered(future: asyncio.Future[Answer], within_s: float = 60.0) -> Answer:
    async with asyncio.timeout(within_s):
        return await future


async def zombie(small: SmallCluster, heir: str = "b") -> None:
    """`a` is stopped in its tracks (its link is cut), and its unit given to `heir`, which opens it."""
    small.nodes["a"].cut()
    await small.fail_over(heir)
    await small.served_by(heir)


@virtually
async def test_t1_after_a_fail_over_an_actor_is_claimed_before_it_is_served() -> None:
    """The first thing the new owner writes is a claim at its epoch: what the old one still has under way is refused."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry=1)
        await zombie(small)

        await small.send("k", "write", entry=2)

        assert small.kinds("k") == ["command", "claim", "command"]
        claim = decode_record(small.log("k")[1].payload)
        assert (claim.epoch, claim.incarnation) == ((await small.map()).epoch, small.nodes["b"].node.incarnation)


@virtually
async def test_t1_even_a_query_is_served_only_after_the_claim() -> None:
    """A read of the new owner promises that nothing older lands after it."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry=1)
        await zombie(small)

        assert await small.send("k", "read") == [1]

        assert small.kinds("k") == ["command", "claim"]


@virtually
async def test_t1_an_actor_without_a_log_is_claimed_as_well() -> None:
    """The old owner's very first append may be the one under way."""
    async with cluster("a", "b") as small:
        small.disturb("late", "append", ".ev.")
        stray = await small.post("a", small.command("k", "write", "m-1", entry="stray"))
        await until(small.disturbed)
        await zombie(small)

        assert await small.send("k", "write", "m-2", entry="new") == 1
        await asyncio.sleep(10)

        assert await small.send("k", "read") == ["new"]
        assert small.kinds("k")[0] == "claim"
        assert not stray.done()


@virtually
async def test_t1_a_claim_is_needed_after_a_clean_move_of_an_actor_nobody_touched_since_the_fail_over() -> None:
    """a dies, b gets the unit and never loads the actor, then hands it to c: c still has to claim it."""
    async with cluster("a", "b", "c") as small:
        await small.send("k", "write", "m-1", entry=1)
        small.disturb("late", "append", ".ev.")
        await small.post("a", small.command("k", "write", "m-2", entry="stray"))
        await until(small.disturbed)
        await zombie(small)
        await small.move("m", "c")

        assert await small.send("k", "write", "m-3", entry=3) == 2
        await asyncio.sleep(10)

        assert await small.send("k", "read") == [1, 3]
        assert small.kinds("k") == ["command", "claim", "command"]


@virtually
async def test_t2_a_zombie_cannot_commit_and_forwards_what_it_has() -> None:
    """Its handler ends after the fail-over: the append is refused, the command forwarded and applied once."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry="before")
        Ledger.open_gate = asyncio.Event()
        pending = await small.post("a", small.command("k", "write_slowly", "m-1", lives_s=120, entry="pending"))
        await until(lambda: Ledger.entered == 1)
        queued = await small.post("a", small.command("k", "write", "m-2", lives_s=120, entry="queued"))
        await asyncio.sleep(0.1)
        await zombie(small)
        gate, Ledger.open_gate = Ledger.open_gate, None
        assert await small.send("k", "write", "m-3", entry="new owner") == 2

        small.nodes["a"].heal()
        gate.set()

        values = [(await answered(future)).value for future in (pending, queued)]
        entries = await small.send("k", "read")
        assert sorted(entries) == sorted(["before", "new owner", "pending", "queued"])
        assert [entries[value - 1] for value in values] == ["pending", "queued"]
        epochs = [decode_record(entry.payload).epoch for entry in small.log("k")]
        assert epochs == sorted(epochs)


@virtually
async def test_t2_a_zombie_that_has_not_heard_of_the_fail_over_is_stopped_by_the_log() -> None:
    """Its link works but the map's news is late: the claim in the log alone refuses it."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry="before")
        Ledger.open_gate = asyncio.Event()
        pending = await small.post("a", small.command("k", "write_slowly", "m-1", lives_s=120, entry="pending"))
        await until(lambda: Ledger.entered == 1)
        await small.fail_over("b")
        await small.served_by("b")
        gate, Ledger.open_gate = Ledger.open_gate, None
        await small.send("k", "write", "m-2", entry="new owner")

        gate.set()

        assert (await answered(pending)).value == 3
        assert await small.send("k", "read") == ["before", "new owner", "pending"]


@virtually
async def test_t3_what_was_answered_is_remembered_by_the_log_and_not_only_in_memory() -> None:
    """Applied, its acknowledgement lost, the owner killed: the next owner answers from the log."""
    async with cluster("a", "b") as small:
        small.disturb("drop_reply", "append", ".ev.")
        await small.post("a", small.command("k", "write", "m-1", entry=1))
        await until(small.disturbed)
        await asyncio.sleep(0.1)
        await zombie(small)

        assert await small.send("k", "write", "m-1", entry=1) == 1
        assert await small.send("k", "read") == [1]


@virtually
async def test_t4_an_append_that_failed_is_decided_again_on_what_is_there_now() -> None:
    """An earlier append lands between: the second decision sees it, the reply is true, nothing is lost."""
    async with cluster("a") as small:
        await small.send("k", "write", "m-0", entry=0)
        small.disturb("late", "append", ".ev.")

        reply = await small.send("k", "write", "m-1", entry="late", timeout_s=30)
        other = await small.send("k", "write", "m-2", entry="next", timeout_s=30)
        await asyncio.sleep(10)

        assert small.disturbed()
        assert (reply, other) == (2, 3)
        assert await small.send("k", "read") == [0, "late", "next"]
        ids = [decode_record(entry.payload).message_id for entry in small.log("k")]
        assert [name for name in ids if name] == ["m-0", "m-1", "m-2"]


@virtually
async def test_t4_a_decision_made_again_may_be_another_one() -> None:
    """The ledger was closed by the time the command could be appended: rejected, and nothing of it applied."""
    async with cluster("a", "b") as small:
        Ledger.open_gate = asyncio.Event()
        pending = await small.post("a", small.command("k", "write_slowly", "slow", lives_s=120, entry=1))
        await until(lambda: Ledger.entered == 1)
        waiting = await small.post("a", small.command("k", "write", "m-1", lives_s=120, entry="too late"))
        await asyncio.sleep(0.1)
        await zombie(small)
        gate, Ledger.open_gate = Ledger.open_gate, None
        await small.send("k", "close", "m-close")

        small.nodes["a"].heal()
        gate.set()

        assert isinstance((await answered(waiting)).error, Rejected)
        assert (await answered(pending)).value == 1
        assert await small.send("k", "read") == [1]


@virtually
async def test_t5_a_source_commits_in_the_map_and_never_in_memory_only() -> None:
    """COMMIT cannot reach the map: the source neither serves nor hands its buffer over, and the map decides later."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry="before")
        request = await small.lock("m", "b")
        await small.steps(request, until_verb="await_ack")
        future = await small.post("a", small.command("k", "write", "m-1", lives_s=120, entry=1))
        small.disturb("drop_request", "append", UNIT, times=1000)

        committing = asyncio.create_task(small.step("commit", request))
        await asyncio.sleep(1)
        assert not future.done()
        assert not small.nodes["b"].node.host.serves(UNIT)
        small.faults.clear()
        await asyncio.gather(committing, return_exceptions=True)
        with contextlib.suppress(NotApplicable):
            await small.abort("m")

        assert (await answered(future)).value == 2
        view = await small.map()
        assert view.owner == ("a" if view.outcome_of("m") is Outcome.ABORTED else "b")
        assert await small.send("k", "read") == ["before", 1]


@virtually
async def test_t6_a_pause_that_nobody_follows_ends_through_the_map() -> None:
    """The source writes ABORT itself, at its pause lease; its gate opens because the map says so."""
    async with cluster("a", "b") as small:
        request = await small.lock("m", "b")
        await small.step("pause", request)
        began_s = clock()
        waiting = await small.post("a", small.command("k", "write", "m-1", lives_s=60, entry=1))

        assert (await answered(waiting)).value == 1

        assert small.settings.pause_lease_s - 1 < clock() - began_s < small.settings.pause_lease_s + 2
        view = await small.map()
        assert (view.outcome_of("m"), view.epoch) == (Outcome.ABORTED, request.epoch + 1)


@virtually
async def test_t7_a_restarted_source_aborts_the_move_of_its_earlier_life() -> None:
    """The destination has everything, yet must not get the unit: the new life may have served already."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry=1)
        request = await small.lock("m", "b")
        await small.steps(request, until_verb="await_ack")
        await small.restart("a")
        await small.served_by("a")
        await small.send("k", "write", entry=2)

        for verb in STEPS:
            with pytest.raises(NotApplicable):
                await small.step(verb, request)

        assert (await small.map()).outcome_of("m") is Outcome.ABORTED
        assert await small.send("k", "read") == [1, 2]


@virtually
async def test_t11_a_late_duplicate_of_a_rejected_command_stays_rejected() -> None:
    """Its sender was told "no"; the ledger was reopened since; a stray copy arrives."""
    async with cluster("a") as small:
        await small.send("k", "close")
        with pytest.raises(Rejected):
            await small.send("k", "write", "m-1", entry=1)
        await small.send("k", "reopen")

        stray = await small.post("a", small.command("k", "write", "m-1", entry=1))

        assert isinstance((await answered(stray)).error, Rejected)
        assert await small.send("k", "read") == []


@virtually
async def test_t12_a_zombie_does_not_reject_on_stale_state() -> None:
    """Closed as far as `a` knows; reopened by the new owner: a rejection must be in the log before it is told."""
    async with cluster("a", "b") as small:
        await small.send("k", "close")
        Ledger.open_gate = asyncio.Event()
        pending = await small.post("a", small.command("k", "write_slowly", "slow", lives_s=120, entry="slow"))
        await until(lambda: Ledger.entered == 1)
        stale = await small.post("a", small.command("k", "write", "m-1", lives_s=120, entry="fine by now"))
        await asyncio.sleep(0.1)
        await zombie(small)
        gate, Ledger.open_gate = Ledger.open_gate, None
        await small.send("k", "reopen")

        small.nodes["a"].heal()
        gate.set()

        answers = [await answered(future) for future in (pending, stale)]
        assert [answer.error for answer in answers] == [None, None]
        assert sorted(await small.send("k", "read")) == ["fine by now", "slow"]


@virtually
async def test_t13_a_source_cut_off_while_paused_does_not_open_by_a_timer() -> None:
    """Its pause lease is long over; the unit went to another: what waited is forwarded, not served."""
    async with cluster("a", "b", "c") as small:
        await small.send("k", "write", entry="before")
        request = await small.lock("m", "b")
        await small.step("pause", request)
        waiting = await small.post("a", small.command("k", "write", "m-1", lives_s=300, entry="waiting"))
        await asyncio.sleep(0.1)
        small.nodes["a"].cut()
        await asyncio.sleep(small.settings.pause_lease_s * 3)
        assert not waiting.done()
        assert len(small.log("k")) == 1
        await small.fail_over("c")
        await small.served_by("c")
        await small.send("k", "write", "m-2", entry="c")

        small.nodes["a"].heal()

        assert (await answered(waiting, 120)).value == 3
        assert await small.send("k", "read") == ["before", "c", "waiting"]


@pytest.mark.parametrize("written", ["by b", "by nobody"])
def test_t14_t15_a_unit_that_came_back_is_reloaded_and_claimed(written: str) -> None:
    """`a` slept through losing it and getting it again: what it holds in memory is older than the log."""

    @virtually
    async def check() -> None:
        async with cluster("a", "b") as small:
            await small.send("k", "write", "m-1", entry="first")
            request = await small.lock("m", "b")
            await small.step("pause", request)
            waiting = await small.post("a", small.command("k", "write", "m-2", lives_s=300, entry="waiting"))
            await asyncio.sleep(0.1)
            await zombie(small)
            if written == "by b":
                assert await small.send("k", "write", "m-3", entry="b's") == 2
            await small.fail_over("a")

            small.nodes["a"].heal()
            answer = await answered(waiting, 120)
            entries = await small.send("k", "read")

            assert entries == (["first", "b's", "waiting"] if written == "by b" else ["first", "waiting"])
            assert answer.value == len(entries)
            claims = [
                decode_record(e.payload).epoch for e in small.log("k") if decode_record(e.payload).kind == "claim"
            ]
            assert claims[-1:] == [(await small.map()).epoch]

    check()


@virtually
async def test_t14_an_open_unit_that_came_back_is_reloaded_too() -> None:
    """Without any pause: a cut, two fail-overs, and the same incarnation owns it again two epochs later."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", "m-1", entry="first")
        await zombie(small)
        await small.send("k", "write", "m-2", entry="b's")
        await small.fail_over("a")
        small.nodes["a"].heal()
        await small.served_by("a")

        assert await small.send("k", "write", "m-3", entry="third") == 3
        assert await small.send("k", "write", "m-2", entry="b's") == 2
        assert await small.send("k", "read") == ["first", "b's", "third"]


@virtually
async def test_s1_a_lock_without_a_pause_does_not_last() -> None:
    """And as long as it does, the source serves."""
    async with cluster("a", "b") as small:
        request = await small.lock("m", "b")
        assert await small.send("k", "write", entry=1) == 1
        began_s = clock()

        def aborted() -> bool:
            entry = small.directory.get(UNIT)
            return entry is not None and entry.ownership.outcome_of("m") is Outcome.ABORTED

        await until(aborted)

        assert clock() - began_s < small.settings.lock_lease_s + 1
        with pytest.raises(NotApplicable):
            await small.step("pause", request)


@virtually
async def test_a_pause_that_comes_while_the_source_aborts_does_not_get_lost() -> None:
    """Whichever comes first, the unit is open or moved in the end, and every command answered."""
    async with cluster("a", "b", latency=lambda: 0.002) as small:
        request = await small.lock("m", "b")
        await asyncio.sleep(small.settings.pause_lease_s - 0.2)
        futures = []
        for number in range(10):
            futures.append(await small.post("a", small.command("k", "write", f"m-{number}", lives_s=120, entry=number)))
            with contextlib.suppress(NotApplicable):
                await small.step("pause", request)
            await asyncio.sleep(0.1)

        assert [(await answered(future)).value for future in futures] == list(range(1, 11))


def chaos(seed: int) -> Any:
    """One random history of moves, fail-overs, restarts, cuts and append faults under load."""

    @virtually
    async def check() -> None:
        draw = random.Random(seed)
        async with cluster(
            "a", "b", "c", latency=lambda: draw.random() * 0.003, snapshot_every=6, dedup_window=1024
        ) as small:
            acknowledged: dict[int, list[tuple[int, int]]] = {}
            stop = asyncio.Event()

            async def sender(name: int) -> None:
                """The next only after the last one's outcome is known: as a careful caller does."""
                acknowledged[name] = []
                number, known = 0, True
                while not (known and stop.is_set()):
                    try:
                        reply = await small.send("k", "write", f"{name}-{number}", timeout_s=15.0, entry=[name, number])
                    except (TransientError, InDoubt):
                        known = False
                        continue
                    acknowledged[name].append((number, reply))
                    number, known = number + 1, True
                    await asyncio.sleep(draw.random() * 0.2)

            senders = [asyncio.create_task(sender(name)) for name in range(4)]
            for number in range(10):
                await asyncio.sleep(draw.random())
                owner = (await small.map()).owner
                other = draw.choice([name for name in "abc" if name != owner])
                what = draw.choice(["move", "half", "fail-over", "cut", "append", "commit"])
                try:
                    if what == "append":
                        small.disturb(draw.choice(["drop_request", "drop_reply", "late"]), "append", ".ev.", times=3)
                    elif what == "commit":
                        small.disturb(draw.choice(["drop_reply", "late"]), "append", UNIT)
                        await small.move(f"m{number}", other)
                    elif what == "move":
                        await small.move(f"m{number}", other)
                    elif what == "half":
                        await small.steps(await small.lock(f"m{number}", other), until_verb=draw.choice(STEPS[:-1]))
                    elif what == "fail-over":
                        await small.fail_over(other)
                    else:
                        small.nodes[owner].cut()
                        try:
                            await small.fail_over(other)
                            await asyncio.sleep(draw.random() * 2)
                        finally:
                            small.nodes[owner].heal()
                except (TransientError, InDoubt, NotApplicable):
                    pass
            await asyncio.sleep(25)
            stop.set()
            await asyncio.gather(*senders)

            entries = await small.send("k", "read", timeout_s=60)
            for name, pairs in acknowledged.items():
                assert len(pairs) > 3
                assert [number for who, number in entries if who == name] == [number for number, _ in pairs]
                assert [entries[reply - 1] for _, reply in pairs] == [[name, number] for number, _ in pairs]
            view = await small.map()
            assert view.move is None
            epochs = [decode_record(entry.payload).epoch for entry in small.log("k")]
            assert epochs == sorted(epochs)

    return check


@pytest.mark.parametrize("seed", range(12))
def test_any_history_of_faults_loses_doubles_and_reorders_nothing(seed: int) -> None:
    """Acknowledged exactly once, in each sender's order, each reply true of the state it was given on."""
    chaos(seed)()


@virtually
async def test_a_stale_router_finds_the_actor_wherever_it_went() -> None:
    """It believes in the first owner; five moves later its command still arrives, once."""
    async with cluster("a", "b", "c") as small:
        await small.send("k", "write", "m-0", entry=0)
        stale = small.command("k", "write", "m-1", epoch=1, entry=1)
        for number in range(5):
            await small.move(f"m{number}", "bcabc"[number])

        answer = await answered(await small.post("a", stale))

        assert answer.value == 2 or isinstance(answer.error, TransientError)
        assert (answer.owner, answer.epoch) == ("c", (await small.map()).epoch)
        assert await small.send("k", "write", "m-1", entry=1) == 2
        assert await small.router.send_message(ActorId("ledger", "k"), "read") == [0, 1]
