"""Moves between nodes in one process: they lose, double and reorder nothing, and end cleanly."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from routing import control
from routing.address import ActorId
from routing.control import StepRequest
from routing.errors import (
    FerryError,
    InDoubt,
    NotApplicable,
    PayloadTooLarge,
    StateNotPortable,
    Timeout,
    TransientError,
    Unavailable,
    UnknownActorType,
)
from routing.shard_map import Outcome
from runtime.actor import Actor, command, event, query
from runtime.handover import WORD_S
from runtime.journal import Journal, Kind, Record
from runtime.testing import Fault
from tests.unit.cluster import STEPS, UNIT, Ledger, answered, cluster
from tests.unit.virtual_time import until, virtually

FAULTS: list[Fault] = ["drop_request", "drop_reply", "late"]


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
    return {name: getattr(request, name) for name in request.__struct_fields__}


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
        await asyncio.sleep(WORD_S)

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
        await small.router.send_message(awkward, "become", {"how": "raises"})
        await asyncio.sleep(1)
        assert small.nodes["b"].node.host.counters["snapshots_failed"] == 0
        for _ in range(7):
            await small.router.send_message(awkward, "become", {"how": "raises"})

        assert small.nodes["b"].node.host.counters["snapshots_failed"] == 1  # the claim makes it 7: tried from 12 on


@virtually
async def test_a_source_whose_actor_is_anothers_by_its_log_refuses_to_capture_it() -> None:
    """It was stopped for so long that it failed over, and does not know; it must neither move the actor nor end."""
    async with cluster("a", "b") as small:
        await small.send("k", "write", entry=1)
        request = await small.lock("m", "b")
        await small.steps(request, until_verb="pause")
        journal = Journal(small.link, small.subjects, shards_total=1, append_timeout_s=2.0)
        version, _ = await journal.tail(ActorId("ledger", "k")) or (0, None)
        claim = Record(kind=Kind.CLAIM, epoch=request.epoch + 1, incarnation="b-1", trail=())
        await journal.append(ActorId("ledger", "k"), claim, after=version)
        small.nodes["a"].node.host.units[UNIT].actors[ActorId("ledger", "k")].dirty = True

        with pytest.raises(NotApplicable, match="not ours"):
            await small.step("capture", request)

        assert not small.nodes["a"].task.done()
