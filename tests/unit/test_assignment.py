"""Who may receive shards, and what is failed over to whom: shards, and actors with a key of their own."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from routing.address import ActorId
from routing.directory import Directory
from routing.membership import Member, NodeState
from routing.placement import ConsistentHashPlacement
from routing.shard_map import Ownership, assign, bind, commit, failover, lock, pin, retire, set_apart, take_out
from routing.subjects import actor_key
from tests.unit.cluster import SmallCluster, cluster
from tests.unit.virtual_time import until, virtually
from workflows.assignment import Assignment


def member(node: str, *types: str, state: NodeState = NodeState.UP) -> Member:
    return Member(
        id=node, incarnation=f"{node}1", state=state, weight=1.0, role="", types=types, host="h", pid=1, version="0"
    )


def takers(owners: str, *members: Member) -> set[str]:
    entries = {f"shard.{n}": SimpleNamespace(ownership=SimpleNamespace(owner=o)) for n, o in enumerate(owners)}
    directory: Any = SimpleNamespace(shards=lambda: entries, shards_total=len(owners))
    assignment = Assignment(cast(Directory, directory), ConsistentHashPlacement())
    return {node.id for node in assignment.takers({m.id: m for m in members})}


def test_a_node_without_a_class_that_every_owner_has_receives_nothing() -> None:
    """Otherwise commands for live actors of that class would begin to fail where they land."""
    aircraft = [member("a", "aircraft"), member("b", "aircraft")]

    assert takers("ab", *aircraft, member("d", "cart")) == {"a", "b"}


def test_a_node_with_more_classes_joins_as_in_a_rolling_deployment() -> None:
    """The new class is on the newcomer alone at first; the old nodes stay in place meanwhile."""
    assert takers("ab", member("a", "aircraft"), member("b", "aircraft"), member("d", "aircraft", "cart")) == {
        "a", "b", "d",
    }  # fmt: skip
    assert takers("abd", member("a", "aircraft"), member("b", "aircraft"), member("d", "aircraft", "cart")) == {
        "a", "b", "d",
    }  # fmt: skip


def test_before_anybody_owns_anything_every_node_that_is_up_may_receive() -> None:
    """At the cluster's birth there is no class to be missing."""
    assert takers("", member("a", "aircraft"), member("b", "cart"), member("c", state=NodeState.DRAINING)) == {"a", "b"}


def test_owners_that_are_gone_do_not_count() -> None:
    """Failover goes to whoever is left."""
    assert takers("x", member("a", "cart")) == {"a"}


# -- keys that a person has written to ---------------------------------------------------------------------------------
async def put_by_hand(small: SmallCluster, unit: str) -> None:
    await small.link.append(small.map_subject(unit), b"junk", expected=None, timeout_s=2)


@virtually
async def test_a_shard_whose_value_cannot_be_read_is_not_one_that_nobody_owned() -> None:
    """It holds up neither the assignment of the others nor plans, and nothing is said of it that is not so."""
    async with cluster(shards=3) as small:
        await put_by_hand(small, "shard.1")
        await until(lambda: small.directory.unreadable() == ["shard.1"])
        assignment = Assignment(small.directory, ConsistentHashPlacement())
        assert assignment.unassigned() == [0, 2]

        said = [await assignment.assign(alive("a")) for _ in range(2)]

        assert said == ["2 shards were assigned to a", None]
        assert assignment.unassigned() == []
        assert small.directory.get("shard.1") is None


@virtually
async def test_only_what_was_written_is_reported() -> None:
    """Somebody else was first, and the watch has not told yet: the next round sees it."""
    async with cluster(shards=2) as small:
        assignment = Assignment(small.directory, ConsistentHashPlacement())
        assigning = asyncio.gather(assignment.assign(alive("a")), assignment.assign(alive("b")))

        said = await assigning

        assert sorted(filter(None, said)) in (
            ["2 shards were assigned to a"], ["2 shards were assigned to b"],
            ["1 shard was assigned to a", "1 shard was assigned to b"],
        )  # fmt: skip


@virtually
async def test_a_dead_node_s_shard_whose_value_was_overwritten_is_not_said_to_be_failed_over() -> None:
    """The last good value is still known here, but no write that builds on it can land."""
    async with cluster(shards=2) as small:
        assignment = await owned(small, "cc")
        await put_by_hand(small, "shard.1")

        first = await assignment.fail_over(alive("a"))  # before or after the watch has told
        await until(lambda: small.directory.unreadable() == ["shard.1"])
        second = await assignment.fail_over(alive("a"))

        assert first == "node c is gone: 1 shard failed over to a"
        assert second is None
        assert (await small.map("shard.0")).owner == "a"


# -- actors with a key of their own ------------------------------------------------------------------------------------
async def owned(small: SmallCluster, owners: str) -> Assignment:
    """A map in which every shard is bound to the node of that letter, and who reads and writes it."""
    for number, owner in enumerate(owners):
        entry = await small.directory.transition(f"shard.{number}", None, assign(owner))
        bound = bind(entry.ownership, node=owner, incarnation=f"{owner}1")
        await small.directory.transition(f"shard.{number}", entry, bound)
    return Assignment(small.directory, ConsistentHashPlacement())


async def taken_out(small: SmallCluster, shard: int, *, to: str, pinned: bool = True) -> str:
    """Give an actor of a shard a key of its own and move it to `to`; returns its unit's name."""
    actor = ActorId("ledger", small.keys_of_shards()[shard])
    unit, home = actor_key(actor), small.directory.get(f"shard.{shard}")
    assert home is not None
    own = await small.directory.transition(unit, None, take_out(home.ownership, str(actor), None))
    await small.directory.transition(f"shard.{shard}", home, set_apart(home.ownership, str(actor), own.ownership))
    if to != home.ownership.owner:
        await small.directory.decide(unit, lambda view: lock(view, move="m", destination=to))
        source = str(own.ownership.incarnation)
        await small.directory.decide(unit, lambda view: commit(view, move="m", incarnation=source, heir=f"{to}1"))
    if not pinned:
        await small.directory.decide(unit, lambda view: pin(view, pinned=False))
    return unit


def alive(*nodes: str) -> dict[str, Member]:
    return {node: member(node, "ledger") for node in nodes}


@virtually
async def test_the_pinned_actor_of_a_dead_node_goes_where_its_shard_is() -> None:
    """Its pin ended with the node it was for: it stays pinned, and where it can be served from its log."""
    async with cluster(shards=4) as small:
        assignment = await owned(small, "abab")
        units = [await taken_out(small, shard, to="c") for shard in (0, 1)]

        said = await assignment.fail_over(alive("a", "b"))

        assert [(await small.map(unit)).owner for unit in units] == ["a", "b"]
        for unit in units:
            view: Ownership = await small.map(unit)
            assert (view.pinned, view.incarnation, view.fence) == (True, None, view.epoch)
        assert [(await small.map(f"shard.{n}")).epoch for n in range(4)] == [1] * 4
        assert said == "node c is gone: 2 actors failed over to a, b"
        assert await assignment.fail_over(alive("a", "b")) is None


@virtually
async def test_the_pinned_actor_of_a_dead_node_goes_with_its_shard_when_that_dies_too() -> None:
    """Both are given to the same node at once; one that is pinned to a living node stays there."""
    async with cluster(shards=6) as small:
        assignment = await owned(small, "aaabbc")
        here = [await taken_out(small, shard, to="a") for shard in range(3)]
        elsewhere = await taken_out(small, 3, to="c")

        await assignment.fail_over(alive("b", "c"))

        homes = [(await small.map(f"shard.{shard}")).owner for shard in range(3)]
        assert [(await small.map(unit)).owner for unit in here] == homes
        assert {*homes} <= {"b", "c"}
        assert (await small.map(elsewhere)).owner == "c"
        assert (await small.map("shard.0")).apart_at(f"ledger/{small.keys_of_shards()[0]}") is not None


@virtually
async def test_an_actor_that_waits_to_be_taken_back_is_left_alone() -> None:
    """Whoever gets its shard takes it back; its key names nobody who could be dead."""
    async with cluster(shards=2) as small:
        assignment = await owned(small, "ab")
        unit = await taken_out(small, 0, to="a", pinned=False)
        before = await small.directory.decide(unit, lambda view: retire(view, incarnation="a1"))

        said = await assignment.fail_over(alive("b"))

        assert await small.directory.refresh(unit) == before
        assert (await small.map("shard.0")).owner == "b"
        assert said is not None
        assert "actor" not in said
        assert assignment.strays(alive("b")) == []


@virtually
async def test_a_key_that_no_shard_names_is_not_failed_over() -> None:
    """TAKE OUT was written and SET APART never: the actor is its shard's."""
    async with cluster(shards=2) as small:
        assignment = await owned(small, "ab")
        actor = ActorId("ledger", small.keys_of_shards()[0])
        home = await small.map("shard.0")
        before = await small.directory.transition(actor_key(actor), None, take_out(home, str(actor), None))
        await small.directory.decide("shard.0", lambda view: failover(view, to="b"))

        assert await assignment.fail_over(alive("b")) is None
        assert await small.directory.refresh(actor_key(actor)) == before


@virtually
async def test_strays_are_unpinned_and_elsewhere_than_their_shards() -> None:
    """The pinned are where they are to be; those at home are taken back without a plan."""
    async with cluster(shards=4) as small:
        assignment = await owned(small, "aaaa")
        stray = await taken_out(small, 0, to="b", pinned=False)
        await taken_out(small, 1, to="a", pinned=False)
        await taken_out(small, 2, to="b")

        assert assignment.strays(alive("a", "b")) == [stray]
        assert assignment.strays(alive("a")) == []  # a dead node's is failed over


@virtually
async def test_pinned_actors_are_strays_at_a_node_that_takes_nothing() -> None:
    """They would keep it from draining; and nobody is sent to a node that takes nothing either."""
    async with cluster(shards=4) as small:
        assignment = await owned(small, "aaab")
        pinned = await taken_out(small, 0, to="b")
        loose = await taken_out(small, 3, to="a", pinned=False)
        members = {"a": member("a", "ledger"), "b": member("b", "ledger", state=NodeState.DRAINING)}

        assert assignment.strays(members) == [pinned]
        assert assignment.strays(alive("a", "b")) == [loose]


@virtually
async def test_actors_apart_do_not_decide_which_nodes_may_receive_shards() -> None:
    """Takers have the classes of the nodes with shards: a node with one pinned actor alone is no measure."""
    async with cluster(shards=2) as small:
        assignment = await owned(small, "aa")
        await taken_out(small, 0, to="c")
        members = {"a": member("a", "cart", "ledger"), "b": member("b", "cart", "ledger"), "c": member("c", "ledger")}

        assert {node.id for node in assignment.takers(members)} == {"a", "b"}


# -- in the middle of a rolling upgrade --------------------------------------------------------------------------------
def of_versions(**schema: int) -> dict[str, Member]:
    """Nodes by the schema version of the one class that they have."""
    return {node: replace(member(node, "ledger"), schemas={"ledger": version}) for node, version in schema.items()}


@virtually
async def test_what_a_newer_node_owned_is_failed_over_to_newer_nodes() -> None:
    """Older code could not read it: its actors would not be served until newer nodes have them again."""
    async with cluster(shards=8) as small:
        assignment = await owned(small, "aabbccdd")
        members = of_versions(a=1, b=1, c=2, d=2)
        assert await assignment.fail_over(members) is None

        del members["c"]
        said = await assignment.fail_over(members)

        assert said == "node c is gone: 2 shards failed over to d"
        assert [(await small.map(f"shard.{n}")).owner for n in range(8)] == list("aabbdddd")


@virtually
async def test_what_an_older_node_owned_is_shared_out_to_all() -> None:
    """The first node that is upgraded must not be given everything."""
    async with cluster(shards=6) as small:
        assignment = await owned(small, "aabbcc")
        members = of_versions(a=1, b=1, c=2)
        await assignment.fail_over(members)

        del members["a"]
        await assignment.fail_over(members)

        assert sorted([(await small.map(f"shard.{n}")).owner for n in range(6)]) == list("bbbccc")


@virtually
async def test_the_shards_of_the_last_newer_node_go_to_older_ones() -> None:
    """An owner that has to be upgraded first is better than none."""
    async with cluster(shards=4) as small:
        assignment = await owned(small, "aabc")
        members = of_versions(a=1, b=1, c=2)
        await assignment.fail_over(members)

        del members["c"]
        await assignment.fail_over(members)

        assert (await small.map("shard.3")).owner == "b"


@virtually
async def test_a_leader_that_never_saw_the_dead_node_gives_its_shards_to_the_newest() -> None:
    """The leader died with it: nobody knows which code it had."""
    async with cluster(shards=4) as small:
        assignment = await owned(small, "aabc")

        await assignment.fail_over(of_versions(a=1, b=2))

        assert [(await small.map(f"shard.{n}")).owner for n in range(4)] == list("aabb")


@virtually
async def test_a_pinned_actor_of_a_dead_newer_node_goes_to_a_newer_one() -> None:
    """Rather than to where its shard is, if that is older."""
    async with cluster(shards=3) as small:
        assignment = await owned(small, "abb")
        unit = await taken_out(small, 0, to="c")
        members = of_versions(a=1, b=2, c=2)
        await assignment.fail_over(members)

        del members["c"]
        await assignment.fail_over(members)

        assert (await small.map(unit)).owner == "b"


@virtually
async def test_an_unpinned_actor_does_not_go_home_to_an_older_node() -> None:
    """Its move would be rolled back, again and again; from a node that drains it has to go."""
    async with cluster(shards=4) as small:
        assignment = await owned(small, "aaab")
        loose = await taken_out(small, 0, to="b", pinned=False)
        members = of_versions(a=1, b=2)

        assert assignment.strays(members) == []
        assert assignment.strays(of_versions(a=2, b=2)) == [loose]
        members["b"] = replace(members["b"], state=NodeState.DRAINING)
        assert assignment.strays(members) == [loose]
