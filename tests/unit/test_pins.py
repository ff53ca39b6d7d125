"""An actor that is moved by hand: alone, under load, and back into its shard, in a small cluster.

Nobody coordinates here: what the coordinator's desk writes for `ferry migrate` and `ferry unpin` is written by hand.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from routing import shard_map
from routing.address import ActorId
from routing.directory import Directory
from routing.errors import NotApplicable
from routing.router import Router
from routing.shard_map import Outcome
from routing.subjects import actor_key
from runtime.testing import Fault
from runtime.unit import UnitState
from tests.unit.cluster import STEPS, UNIT, Ledger, SmallCluster, answered, cluster
from tests.unit.virtual_time import until, virtually, wall_clock

X = actor_key(ActorId("ledger", "x"))


async def take_out(small: SmallCluster, key: str = "x") -> str:
    """Give an actor a key of its own, as the desk does; returns the name of its unit."""
    actor, directory = ActorId("ledger", key), small.directory
    unit, home = actor_key(actor), directory.shard_unit_of(actor)
    own = await directory.refresh(unit)
    shard = directory.get(home)
    assert shard is not None
    value = shard_map.take_out(shard.ownership, str(actor), own.ownership if own is not None else None)
    if own is not None:
        shard = await directory.transition(home, shard, shard.ownership)
    await directory.transition(unit, own, value)
    await directory.transition(home, shard, shard_map.set_apart(shard.ownership, str(actor), value))
    return unit


async def unpin(small: SmallCluster, unit: str = X) -> None:
    await small.directory.decide(unit, lambda view: shard_map.pin(view, pinned=False))


async def retire(small: SmallCluster, node: str, unit: str = X) -> None:
    """What the node itself writes a moment after `unpin`, so that a test can do something before TAKE BACK."""
    incarnation = small.nodes[node].node.incarnation
    await small.directory.decide(unit, lambda view: shard_map.retire(view, incarnation=incarnation))


async def back(small: SmallCluster, unit: str = X) -> None:
    """Wait until its shard owns an actor again."""
    await until(lambda: not small.directory.counts(unit))


def holders(small: SmallCluster, unit: str = X) -> list[str]:
    """The nodes that serve a unit."""
    return [
        name
        for name, running in small.nodes.items()
        if (held := running.node.host.units.get(unit)) is not None and held.state is UnitState.OPEN
    ]


async def elsewhere(small: SmallCluster) -> Router:
    """A client of its own, with a view of the map of its own."""
    link = small.nats.link("client")
    directory = Directory(link, small.subjects, shards_total=small.settings.shards)
    await directory.start()
    return Router(link, directory, small.subjects, sender="client", wall_clock=wall_clock)


# -- taken out ---------------------------------------------------------------------------------------------------------
@virtually
async def test_an_actor_that_is_taken_out_goes_on_being_served_where_it_is() -> None:
    """By the same node, with all its entries and its answers, under its own key and after a claim."""
    async with cluster("a", "b") as small:
        await small.send("x", "write", "m-1", entry=1)

        unit = await take_out(small)
        await small.served_by("a", unit)

        assert await small.send("x", "write", "m-2", entry=2) == 2
        assert await small.send("x", "write", "m-1", entry=1) == 1
        assert await small.send("x", "read") == [1, 2]
        assert small.kinds("x") == ["command", "claim", "command"]
        assert ActorId("ledger", "x") not in small.nodes["a"].node.host.units[UNIT].actors
        assert [*small.nodes["a"].node.host.units[unit].actors] == [ActorId("ledger", "x")]


@virtually
async def test_a_node_counts_its_shards_without_the_actors_apart() -> None:
    """There are as many shards as the cluster was born with, whoever is pinned where."""
    async with cluster("a", "b") as small:
        await small.move("m", "b", await take_out(small))

        told = [await small.nodes[name].node._status(None) for name in ("a", "b")]

        assert [status["shards"] for status in told] == [1, 0]


@virtually
async def test_an_actor_without_a_log_can_be_taken_out() -> None:
    """Whether it ever lived makes no difference to the map."""
    async with cluster("a", "b") as small:
        await small.move("m", "b", await take_out(small))

        assert await small.send("x", "write", entry=1) == 1
        assert holders(small) == ["b"]


@virtually
async def test_the_others_of_its_shard_are_not_disturbed() -> None:
    """They stay in memory, at the same epoch, without a claim; a handler that runs is not begun anew."""
    async with cluster("a", "b") as small:
        await small.send("x", "write", entry=1)
        await small.send("mate", "write", entry=1)
        Ledger.open_gate = asyncio.Event()
        writing = asyncio.create_task(small.send("mate", "write_slowly", entry=2))
        await until(lambda: Ledger.entered == 1)
        before = small.nodes["a"].node.host.units[UNIT]

        await small.move("m", "b", await take_out(small))
        Ledger.open_gate.set()

        assert await writing == 2
        assert Ledger.entered == 1
        assert await small.send("mate", "write", entry=3) == 3
        assert small.kinds("mate") == ["command"] * 3
        assert small.nodes["a"].node.host.units[UNIT] is before
        assert (await small.map()).epoch == 1


@virtually
async def test_its_mates_are_served_while_it_moves() -> None:
    """Its own gate is closed, and no other."""
    async with cluster("a", "b") as small:
        request = await small.lock("m", "b", await take_out(small))
        await small.steps(request, until_verb="await_ack")
        waiting = await small.post("a", small.command("x", "write", "m-1", entry=1))

        assert await small.send("mate", "write", entry=1) == 1
        assert not waiting.done()

        await small.step("commit", request)
        assert (await answered(waiting)).value == 1


@virtually
async def test_a_key_that_its_shard_does_not_name_changes_nothing() -> None:
    """The coordinator died between its two writes: the shard owns the actor, and takes it along."""
    async with cluster("a", "b") as small:
        await small.send("x", "write", entry=1)
        value = shard_map.take_out(await small.map(), "ledger/x", None)
        await small.directory.transition(X, None, value)
        await asyncio.sleep(1)

        assert await small.send("x", "write", entry=2) == 2
        assert holders(small) == []
        await small.move("m", "b")
        assert await small.send("x", "write", entry=3) == 3
        assert small.kinds("x") == ["command"] * 3


@pytest.mark.parametrize("since", ["nothing", "used", "moved", "moved and used"])
def test_a_handler_that_runs_when_its_actor_is_taken_out_is_answered_and_applied_once(since: str) -> None:
    """Its append either lands before the new unit's claim, or it is decided anew by whoever owns the actor then."""

    @virtually
    async def check() -> None:
        async with cluster("a", "b") as small:
            await small.send("x", "write", entry=0)
            Ledger.open_gate = asyncio.Event()
            running = await small.post("a", small.command("x", "write_slowly", "m-1", entry=1))
            await until(lambda: Ledger.entered == 1)
            queued = [await small.post("a", small.command("x", "touch", f"t-{n}")) for n in range(3)]
            await asyncio.sleep(0.1)
            assert not any(future.done() for future in queued)

            unit = await take_out(small)
            await small.served_by("a", unit)
            assert [(await answered(future)).value for future in queued] == ["nothing changed"] * 3
            if "moved" in since:
                await small.move("m", "b", unit)
            if "used" in since:
                assert await small.send("x", "write", entry=2) == 2
            Ledger.open_gate.set()

            reply = (await answered(running)).value
            entries = await small.send("x", "read")
            assert sorted(entries) == ([0, 1, 2] if "used" in since else [0, 1])
            assert entries[reply - 1] == 1
            assert await small.send("x", "write_slowly", "m-1", entry=1) == reply
            assert await small.send("x", "read") == entries

    check()


# -- moved -------------------------------------------------------------------------------------------------------------
@virtually
async def test_an_actor_moves_alone_and_its_commands_follow() -> None:
    """With its state and its answers; its mates stay, and each is at the node that the map names."""
    async with cluster("a", "b") as small:
        client = await elsewhere(small)
        for number in range(5):
            await small.send("x", "write", f"m-{number}", entry=number)
        await small.send("mate", "write", entry=0)

        answer = await small.move("m", "b", await take_out(small))

        assert answer["blackout_ms"] is not None
        assert (await small.map(X)).owner == "b"
        assert (await small.map()).owner == "a"
        for router in (small.router, client, small.nodes["a"].node.router, small.nodes["b"].node.router):
            assert await router.send_message(ActorId("ledger", "x"), "read", {}) == list(range(5))
            assert await router.send_message(ActorId("ledger", "x"), "write", {"entry": 3}, message_id="m-3") == 4
            assert await router.send_message(ActorId("ledger", "mate"), "read", {}) == [0]
        assert holders(small) == ["b"]
        assert holders(small, UNIT) == ["a"]


@virtually
async def test_an_actor_that_moves_a_second_time_costs_no_claim() -> None:
    """Only the change of keys is fenced: from then on it is a unit like any other."""
    async with cluster("a", "b", "c") as small:
        unit = await take_out(small)
        await small.send("x", "write", entry=1)
        await small.move("m1", "b", unit)
        await small.send("x", "write", entry=2)
        await small.move("m2", "c", unit)

        assert await small.send("x", "write", entry=3) == 3
        assert small.kinds("x") == ["claim", "command", "command", "command"]


@virtually
async def test_what_waits_at_its_gate_follows_it_in_order() -> None:
    """As for a shard: nobody's command is dropped or overtaken."""
    async with cluster("a", "b") as small:
        request = await small.lock("m", "b", await take_out(small))
        await small.step("pause", request)
        futures = [await small.post("a", small.command("x", "write", f"m-{n}", entry=n)) for n in range(20)]
        await asyncio.sleep(0.1)

        for verb in STEPS[1:]:
            answer = await small.step(verb, request)

        assert answer["waiting"] == 20
        assert [(await answered(future)).value for future in futures] == list(range(1, 21))
        assert await small.send("x", "read") == list(range(20))


@pytest.mark.parametrize("last_verb", STEPS[:-1])
def test_a_rollback_of_its_move_leaves_it_where_it_was(last_verb: str) -> None:
    """Still pinned, still apart, and what waited is served."""

    @virtually
    async def check() -> None:
        async with cluster("a", "b") as small:
            await small.send("x", "write", entry=1)
            request = await small.lock("m", "b", await take_out(small))
            await small.steps(request, until_verb=last_verb)
            waiting = await small.post("a", small.command("x", "write", "m-2", entry=2))

            await small.abort("m", X)

            assert (await answered(waiting)).value == 2
            view = await small.map(X)
            assert (view.owner, view.pinned, view.outcome_of("m")) == ("a", True, Outcome.ABORTED)
            await small.move("n", "b", X)
            assert await small.send("x", "read") == [1, 2]

    check()


@virtually
async def test_a_move_of_its_shard_leaves_it_where_it_is() -> None:
    """The shard takes the others along, and names it apart at its new owner as well."""
    async with cluster("a", "b") as small:
        await small.send("x", "write", entry=1)
        await small.send("mate", "write", entry=1)
        unit = await take_out(small)
        await small.send("x", "write", entry=2)

        request = await small.lock("m", "b")
        await small.step("pause", request)
        captured = await small.step("capture", request)
        assert await small.send("x", "write", entry=3) == 3
        for verb in STEPS[2:]:
            await small.step(verb, request)

        assert [row["actor_id"] for row in captured["rows"]] == ["ledger/mate"]
        assert (holders(small, unit), holders(small, UNIT)) == (["a"], ["b"])
        assert await small.send("x", "write", entry=4) == 4
        assert await small.send("mate", "write", entry=2) == 2
        assert small.kinds("x") == ["command", "claim", *["command"] * 3]
        assert (await small.map()).apart_at("ledger/x") is not None


@virtually
async def test_its_mates_are_reached_when_the_node_that_it_went_to_has_died() -> None:
    """That node answered a command from before the actor had its key: that was not its shard's word."""
    async with cluster("a", "b") as small:
        client = await elsewhere(small)
        await client.send_message(ActorId("ledger", "mate"), "write", {"entry": 1})
        Ledger.open_gate = asyncio.Event()
        writing = asyncio.create_task(client.send_message(ActorId("ledger", "x"), "write_slowly", {"entry": 1}))
        await until(lambda: Ledger.entered == 1)
        await small.move("m", "b", await take_out(small))
        await small.send("x", "touch")
        Ledger.open_gate.set()
        assert await writing == 1

        small.nodes["b"].cut()

        assert await client.send_message(ActorId("ledger", "mate"), "write", {"entry": 2}, timeout_s=30.0) == 2


@virtually
async def test_its_mates_are_looked_for_where_the_map_says_however_late_that_is_heard() -> None:
    """A client that knows nothing yet of an actor's key takes its node for the shard's, until it hears of the key."""
    async with cluster("a", "b") as small:
        client = await elsewhere(small)
        await client._directory.stop()
        await small.move("m", "b", await take_out(small))
        assert await client.send_message(ActorId("ledger", "x"), "write", {"entry": 1}) == 1

        await client._directory.locate(ActorId("ledger", "mate"))
        small.nodes["b"].cut()

        assert await client.send_message(ActorId("ledger", "mate"), "write", {"entry": 1}, timeout_s=30.0) == 1


@virtually
async def test_an_actor_of_the_longest_key_moves_like_any_other() -> None:
    """Escaped it is three times as long, in its unit's name as in its subjects."""
    async with cluster("a", "b") as small:
        key = "/" * 128
        await small.send(key, "write", entry=1)

        unit = await take_out(small, key)
        await small.move("m", "b", unit)
        assert await small.send(key, "write", entry=2) == 2

        await small.move("n", "a", unit)
        await unpin(small, unit)
        await back(small, unit)
        assert await small.send(key, "read") == [1, 2]


@pytest.mark.parametrize("seed", range(4))
def test_an_actor_that_comes_and_goes_under_load_loses_doubles_and_overtakes_nothing(seed: int) -> None:
    """Several senders, each awaiting its replies, while it is pinned and unpinned, and its shard moves as well."""

    @virtually
    async def check() -> None:
        # given
        draw = random.Random(seed)
        async with cluster("a", "b", latency=lambda: draw.random() * 0.004, snapshot_every=7) as small:
            routers = [small.router, await elsewhere(small), *(small.nodes[name].node.router for name in ("a", "b"))]
            replies: dict[int, list[int]] = {}
            stop = asyncio.Event()

            async def sender(name: int) -> None:
                replies[name] = []
                router = routers[name % len(routers)]
                while not stop.is_set():
                    number = len(replies[name])
                    replies[name].append(
                        await router.send_message(
                            ActorId("ledger", ("x", "mate")[number % 2]), "write", {"entry": [name, number]},
                            message_id=f"{name}-{number}", timeout_s=20.0,
                        )
                    )  # fmt: skip

            senders = [asyncio.create_task(sender(name)) for name in range(6)]

            # when
            for number in range(4):
                unit = await take_out(small)
                await asyncio.sleep(draw.random() * 0.05)
                own, home = ("ba", "ab")[number % 2] if draw.random() < 0.7 else ("bb", "aa")[number % 2]
                moves = [(f"x{number}", own, unit), (f"s{number}", home, UNIT)]
                for move, destination, which in draw.sample(moves, 2):
                    if (await small.map(which)).owner != destination:
                        await small.move(move, destination, which)
                    await asyncio.sleep(draw.random() * 0.05)
                home = (await small.map()).owner
                await unpin(small)
                if (await small.map(unit)).owner != home:
                    await small.move(f"h{number}", home, unit)
                await back(small)
            stop.set()
            await asyncio.gather(*senders)

            # then
            assert sum(map(len, replies.values())) > 50
            for parity, key in enumerate(("x", "mate")):
                entries = await small.send(key, "read")
                for name, received in replies.items():
                    sent = [number for number in range(len(received)) if number % 2 == parity]
                    assert [number for who, number in entries if who == name] == sent
                    assert [entries[received[number] - 1] for number in sent] == [[name, number] for number in sent]

    check()


# -- back in its shard -------------------------------------------------------------------------------------------------
@virtually
async def test_unpinned_at_home_it_is_served_by_its_shard_again() -> None:
    """All its entries are kept; its shard claims its log, because its own key's owner may be appending below that."""
    async with cluster("a", "b") as small:
        await small.send("x", "write", "m-1", entry=1)
        unit = await take_out(small)
        await small.send("x", "write", "m-2", entry=2)

        await unpin(small)
        await back(small)

        assert await small.send("x", "write", "m-3", entry=3) == 3
        assert await small.send("x", "write", "m-2", entry=2) == 2
        assert small.kinds("x") == ["command", "claim", "command", "claim", "command"]
        assert holders(small, unit) == []
        shard, own = await small.map(), await small.map(unit)
        assert (shard.owner, shard.apart, own.retired) == ("a", (), True)
        assert shard.epoch == shard.fence > own.epoch
        await small.move("m", "b")
        assert await small.send("x", "read") == [1, 2, 3]


@virtually
async def test_unpinned_away_from_home_it_stays_until_it_is_moved_there() -> None:
    """To where its shard is by then; the key ends there by itself."""
    async with cluster("a", "b", "c") as small:
        await small.send("x", "write", entry=1)
        unit = await take_out(small)
        await small.move("m1", "b", unit)
        await small.move("m2", "c")

        await unpin(small)
        await asyncio.sleep(5)
        assert (await small.map(unit)).owner == "b"
        assert await small.send("x", "write", entry=2) == 2

        await small.move("m3", "c", unit)
        await back(small)
        assert (holders(small, unit), holders(small, UNIT)) == ([], ["c"])
        assert await small.send("x", "write", entry=3) == 3
        assert await small.send("x", "read") == [1, 2, 3]


@virtually
async def test_its_shard_comes_to_an_unpinned_actor() -> None:
    """It is at home as soon as its shard is where it is."""
    async with cluster("a", "b") as small:
        await small.send("x", "write", entry=1)
        await small.move("m1", "b", await take_out(small))
        await unpin(small)
        await small.move("m2", "b")

        await back(small)

        assert await small.send("x", "write", entry=2) == 2
        assert (await small.map()).owner == "b"


@pytest.mark.parametrize("ending", ["commit", "abort"])
def test_a_shard_that_is_locked_takes_nobody_back_before_its_move_has_ended(ending: str) -> None:
    """Then its owner does, whoever that is; what was sent meanwhile is answered once."""

    @virtually
    async def check() -> None:
        async with cluster("a", "b") as small:
            await small.send("x", "write", entry=1)
            unit = await take_out(small)
            await small.send("x", "write", entry=2)
            request = await small.lock("m", "b")
            await small.steps(request, until_verb="await_ack")
            await unpin(small)
            await retire(small, "a")
            sending = asyncio.create_task(small.send("x", "write", entry=3))
            await asyncio.sleep(1)

            assert (small.directory.counts(unit), holders(small), sending.done()) == (True, [], False)

            await (small.step("commit", request) if ending == "commit" else small.abort("m"))
            await back(small)

            assert await sending == 3
            assert await small.send("x", "read") == [1, 2, 3]
            assert (await small.map()).owner == ("b" if ending == "commit" else "a")

    check()


@virtually
async def test_an_unpinned_actor_at_home_keeps_its_key_while_its_shard_moves() -> None:
    """It would be nobody's for as long as that takes; a rolled back move is followed by its way back."""
    async with cluster("a", "b") as small:
        unit = await take_out(small)
        request = await small.lock("m", "b")
        await small.step("pause", request)
        await unpin(small)
        await asyncio.sleep(1)

        assert await small.send("x", "write", entry=1) == 1
        assert not (await small.map(unit)).retired

        await small.abort("m")
        await back(small)
        assert await small.send("x", "write", entry=2) == 2


@virtually
async def test_a_way_back_that_was_given_up_does_not_come_about_later() -> None:
    """Its RETIRE is still under way when its shard begins to move: it cannot land once the actor is served again."""
    async with cluster("a", "b", pause_lease_s=25.0) as small:
        unit = await take_out(small)
        await small.send("x", "write", entry=1)
        await unpin(small)
        small.disturb("late", "append", f"-map.{unit}")
        await until(small.disturbed)
        await small.lock("m", "b")

        assert await small.send("x", "write", entry=2) == 2
        await asyncio.sleep(10)
        assert not (await small.map(unit)).retired
        assert await small.send("x", "write", entry=3) == 3

        await small.abort("m")
        await back(small)
        assert await small.send("x", "read") == [1, 2, 3]


@virtually
async def test_an_actor_that_is_pinned_again_in_time_stays() -> None:
    """Away from home nothing ends its key, however often it is pinned and unpinned."""
    async with cluster("a", "b") as small:
        unit = await take_out(small)
        await small.move("m", "b", unit)
        await small.send("x", "write", entry=1)
        await unpin(small)
        await small.directory.decide(unit, lambda view: shard_map.pin(view, pinned=True))
        await small.move("n", "b")
        await asyncio.sleep(5)

        assert holders(small) == ["b"]
        assert await small.send("x", "write", entry=2) == 2
        assert small.kinds("x") == ["claim", "command", "command"]


@pytest.mark.parametrize("fault", ["drop_request", "drop_reply", "late"])
@pytest.mark.parametrize("key", [X, UNIT])
def test_a_way_back_of_unknown_fate_is_settled_from_the_map(key: str, fault: Fault) -> None:
    """RETIRE or TAKE BACK is lost, unacknowledged or late: nothing is served twice, and the actor gets home."""

    @virtually
    async def check() -> None:
        async with cluster("a", "b") as small:
            await take_out(small)
            await small.send("x", "write", entry=0)
            await unpin(small)
            small.disturb(fault, "append", f"-map.{key}")

            for number in range(1, 6):
                assert await small.send("x", "write", entry=number, timeout_s=60.0) == number + 1
            await back(small)
            await asyncio.sleep(10)

            assert small.disturbed()
            assert await small.send("x", "write", entry=6) == 7
            assert await small.send("x", "read") == list(range(7))
            await small.move("m", "b")
            assert await small.send("x", "read") == list(range(7))

    check()


@virtually
async def test_an_actor_is_pinned_again_after_it_was_back() -> None:
    """Each change of keys is above all that was before."""
    async with cluster("a", "b") as small:
        epochs = []
        for number in range(3):
            unit = await take_out(small)
            epochs.append((await small.map(unit)).epoch)
            await small.served_by("a", unit)
            assert await small.send("x", "write", entry=number) == number + 1
            await unpin(small)
            await back(small)
            epochs.append((await small.map()).epoch)

        assert epochs == sorted(set(epochs))
        assert await small.send("x", "read") == [0, 1, 2]


# -- nodes that die ----------------------------------------------------------------------------------------------------
@virtually
async def test_a_restarted_node_takes_its_pinned_actor_back() -> None:
    """BOOT, for each of its units by itself: fenced, still pinned, and served from the log."""
    async with cluster("a", "b") as small:
        await small.send("mate", "write", entry=1)
        unit = await take_out(small)
        await small.send("x", "write", entry=1)
        await small.move("m", "b", unit)
        before = await small.map(unit)

        await small.restart("b")
        await small.served_by("b", unit)

        after = await small.map(unit)
        assert (after.owner, after.incarnation, after.pinned) == ("b", small.nodes["b"].node.incarnation, True)
        assert (after.epoch, after.fence) == (before.epoch + 1, before.epoch + 1)
        assert await small.send("x", "write", entry=2) == 2
        assert small.kinds("x") == ["claim", "command", "claim", "command"]
        assert small.kinds("mate") == ["command"]


@virtually
async def test_a_restarted_node_keeps_an_unpinned_actor_that_is_away_from_home() -> None:
    """The plan that brings it home has a source to pause."""
    async with cluster("a", "b") as small:
        unit = await take_out(small)
        await small.move("m", "b", unit)
        await small.send("x", "write", entry=1)
        await unpin(small)

        await small.restart("b")
        await small.served_by("b", unit)
        await asyncio.sleep(5)

        assert await small.send("x", "write", entry=2) == 2
        assert holders(small) == ["b"]
        await small.move("n", "a", unit)
        await back(small)
        assert await small.send("x", "read") == [1, 2]


@virtually
async def test_a_restarted_node_takes_shard_and_pinned_actor_back() -> None:
    """They are two units also where they have one owner."""
    async with cluster("a") as small:
        unit = await take_out(small)
        await small.send("x", "write", entry=1)
        await small.send("mate", "write", entry=1)

        await small.restart("a")
        await small.served_by("a", unit)
        await small.served_by("a")

        assert holders(small, unit) == holders(small, UNIT) == ["a"]
        assert [await small.send(key, "write", entry=2) for key in ("x", "mate")] == [2, 2]


@virtually
async def test_a_dead_nodes_pinned_actor_is_claimed_by_its_heir() -> None:
    """The old owner may be alive after all: what it still has under way is refused, and it lets the actor go."""
    async with cluster("a", "b") as small:
        await small.send("x", "write", entry=1)
        unit = await take_out(small)
        await small.move("m", "b", unit)
        await small.send("x", "write", entry=2)
        small.disturb("late", "append", "=x")
        await small.post("b", small.command("x", "write", "stray", entry="stray"))
        await until(small.disturbed)
        small.nodes["b"].cut()

        await small.fail_over("a", unit)
        await small.served_by("a", unit)
        assert await small.send("x", "write", entry=3) == 3
        small.nodes["b"].heal()
        await asyncio.sleep(10)

        assert await small.send("x", "read") == [1, 2, 3]
        assert holders(small, unit) == ["a"]
        assert await small.send("x", "write", "stray", entry="stray") == 4


@virtually
async def test_an_actor_whose_node_dies_on_its_way_back_is_taken_back_by_its_shards_heir() -> None:
    """Retired, and its shard's owner is gone before TAKE BACK: whoever gets the shard writes that."""
    async with cluster("a", "b") as small:
        await small.send("x", "write", entry=1)
        unit = await take_out(small)
        await small.send("x", "write", entry=2)
        await unpin(small)
        small.nodes["a"].cut()
        await retire(small, "a")
        with pytest.raises(NotApplicable, match="takes it back"):
            await small.fail_over("b", unit)

        await small.fail_over("b")
        await back(small)

        assert await small.send("x", "write", entry=3) == 3
        assert (await small.map()).owner == "b"


@virtually
async def test_an_actor_that_is_pinned_again_while_it_closes_opens_again_and_misses_nothing() -> None:
    """A handler that ran when it closed belongs to the same unit: what it stores is seen by whoever asks next."""
    async with cluster("a", "b", latency=lambda: 0.01) as small:
        unit = await take_out(small)
        await small.send("x", "write", entry=1)
        Ledger.open_gate = asyncio.Event()
        running = await small.post("a", small.command("x", "write_slowly", "m-1", entry=2))
        await until(lambda: Ledger.entered == 1)
        await unpin(small)
        held = small.nodes["a"].node.host.units[unit]
        await until(lambda: held.state is UnitState.RETIRING)
        await small.directory.decide(unit, lambda view: shard_map.pin(view, pinned=True))
        await until(lambda: held.state is UnitState.OPEN)

        Ledger.open_gate.set()

        assert (await answered(running)).value == 2
        assert await small.send("x", "read") == [1, 2]
        moved = asyncio.create_task(small.move("m", "b", unit))
        assert (await moved)["blackout_ms"] is not None
        assert await small.send("x", "read") == [1, 2]


@virtually
async def test_an_actor_whose_handler_does_not_end_is_not_given_back_and_serves_on() -> None:
    """As with a pause, the handler gets its time; then the unit opens again, and half a minute passes."""
    async with cluster("a", "b") as small:
        unit = await take_out(small)
        Ledger.open_gate = asyncio.Event()
        running = await small.post("a", small.command("x", "write_slowly", "m-1", entry=1))
        await until(lambda: Ledger.entered == 1)
        await unpin(small)
        held = small.nodes["a"].node.host.units[unit]
        await until(lambda: held.state is UnitState.RETIRING)
        await until(lambda: held.state is UnitState.OPEN)

        Ledger.open_gate.set()

        assert (await answered(running)).value == 1
        await until(lambda: small.directory.actors_apart() == [])
        assert await small.send("x", "read") == [1]
