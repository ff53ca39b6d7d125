"""The planner: what it moves, what it leaves alone, and what it says about it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.address import ActorId, shard_of
from routing.errors import InvalidInput
from routing.placement import ConsistentHashPlacement
from routing.shard_map import Ownership
from routing.subjects import actor_key
from workflows.planner import Inventory, NodeState, Route, plan_rebalance, summary
from workflows.records import PlannedActor, RebalanceRequest

PLACEMENT = ConsistentHashPlacement(points_per_node=8)
SHARDS = 32


def owned_by(owner: str, epoch: int = 3) -> Ownership:
    return Ownership(owner=owner, incarnation=f"{owner}-1", epoch=epoch)


def locked(owner: str, destination: str) -> Ownership:
    return replace(owned_by(owner), move="earlier", destination=destination)


def plan(
    shard_map: dict[int, Ownership], nodes: list[NodeState], inventories: dict[str, Inventory] | None = None,
    apart: dict[str, Ownership] | None = None,
) -> RebalanceRequest:  # fmt: skip
    return plan_rebalance(
        shard_map, nodes, inventories or {}, plan_id="p", reason="test", shards_total=SHARDS, placement=PLACEMENT,
        apart=apart,
    )  # fmt: skip


def actor_in(shard: int, number: int = 0) -> str:
    """The key of an actor of a shard."""
    actors = (ActorId("cart", str(key)) for key in range(10_000))
    return [actor_key(actor) for actor in actors if shard_of(actor, SHARDS) == shard][number]


def pinned(owner: str) -> Ownership:
    return replace(owned_by(owner), pinned=True)


def routes(request: RebalanceRequest) -> dict[str, tuple[str, str, str]]:
    """unit -> (source, destination, reason)."""
    return {move.unit: (move.source, move.destination, move.reason) for move in request.moves}


def nodes(*ids: str, draining: str = "") -> list[NodeState]:
    return [NodeState(id=node, draining=node in draining) for node in ids]


ACTORS = [actor_in(shard, number) for shard in range(3) for number in range(3)]


@st.composite
def clusters(draw: st.DrawFn) -> tuple[dict[int, Ownership], list[NodeState]]:
    """Up to five nodes, at least one of which stays, and a map with every kind of owner and lock."""
    ids = draw(st.lists(st.sampled_from("abcde"), min_size=1, max_size=5, unique=True))
    states = [
        NodeState(id=node, weight=draw(st.sampled_from([1.0, 2.0])), draining=draw(st.booleans())) for node in ids
    ]
    states[0] = replace(states[0], draining=False)
    ways = st.tuples(st.sampled_from("abcdexy"), st.sampled_from("abcdexy"), st.booleans())
    shard_map = {}
    for shard in draw(st.sets(st.integers(0, SHARDS - 1))):
        owner, destination, is_locked = draw(ways)
        shard_map[shard] = locked(owner, destination) if is_locked and owner != destination else owned_by(owner)
    return shard_map, states


@given(clusters())
def test_a_plan_moves_only_what_it_may_move(cluster: tuple[dict[int, Ownership], list[NodeState]]) -> None:
    """From the present owner, who lives; to a node that stays; never a locked shard; each shard once."""
    shard_map, states = cluster
    staying = {node.id for node in states if not node.draining}

    request = plan(shard_map, states)

    assert len({move.unit for move in request.moves}) == len(request.moves)
    for move in request.moves:
        assert move.unit == f"shard.{move.shard}"
        assert shard_map[move.shard].move is None
        assert move.source == shard_map[move.shard].owner
        assert move.source in {node.id for node in states}
        assert move.destination in staying - {move.source}


@given(clusters())
def test_a_plan_empties_every_draining_node_of_what_is_not_locked(
    cluster: tuple[dict[int, Ownership], list[NodeState]],
) -> None:
    """Draining may not wait for a second plan."""
    shard_map, states = cluster
    draining = {node.id for node in states if node.draining}

    moved = {move.shard for move in plan(shard_map, states).moves}

    assert moved >= {shard for shard, entry in shard_map.items() if entry.owner in draining and entry.move is None}


@given(clusters())
def test_a_plan_does_not_depend_on_the_order_of_its_input(
    cluster: tuple[dict[int, Ownership], list[NodeState]],
) -> None:
    """Two coordinators plan the same."""
    shard_map, states = cluster

    assert plan(shard_map, states) == plan(dict(reversed(shard_map.items())), states[::-1])


@given(clusters())
def test_a_plan_names_no_unit_twice(cluster: tuple[dict[int, Ownership], list[NodeState]]) -> None:
    """Two moves of one shard in one plan would wait for each other's lock; none goes to where it is."""
    moves = plan(*cluster).moves

    assert len({move.unit for move in moves}) == len(moves)
    assert all(move.source != move.destination for move in moves)


def test_a_joining_node_receives_its_share_and_nothing_else_moves() -> None:
    """A quarter of the shards, from each of the three others."""
    shard_map = {shard: owned_by("abc"[shard % 3]) for shard in range(24)}

    request = plan(shard_map, nodes("a", "b", "c", "d"))

    assert Counter(move.source for move in request.moves) == {"a": 2, "b": 2, "c": 2}
    assert {(move.destination, move.reason) for move in request.moves} == {("d", "node d joined")}


def test_a_draining_node_gives_everything_away_first() -> None:
    """Its moves lead the plan, and say why they are there."""
    shard_map = {shard: owned_by("a" if shard < 12 else "b") for shard in range(16)}

    request = plan(shard_map, nodes("a", "b", "c", draining="b"))

    reasons = [move.reason for move in request.moves]
    assert reasons == ["node b drains"] * 4 + ["node c joined"] * 4
    assert [move.shard for move in request.moves[:4]] == [12, 13, 14, 15]


def test_an_uneven_map_is_balanced_and_says_so() -> None:
    """Neither joined nor drained: the reason is balance alone."""
    shard_map = {shard: owned_by("a" if shard < 6 else "b") for shard in range(8)}

    request = plan(shard_map, nodes("a", "b"))

    assert [(move.source, move.destination, move.reason) for move in request.moves] == [("a", "b", "balance")] * 2


def test_shards_on_their_way_count_where_they_are_going() -> None:
    """Four are moving to b already, so nothing more has to: planning twice does not move twice."""
    shard_map = {shard: locked("a", "b") if shard < 4 else owned_by("a") for shard in range(8)}

    assert plan(shard_map, nodes("a", "b")).moves == ()


def test_a_dead_nodes_shards_are_left_to_the_fail_over() -> None:
    """A move needs a source that lives; the living ones are balanced meanwhile."""
    shard_map = {shard: owned_by("dead" if shard < 4 else "a") for shard in range(8)}

    request = plan(shard_map, nodes("a", "b"))

    assert Counter((move.source, move.destination) for move in request.moves) == {("a", "b"): 2}
    assert all(move.shard >= 4 for move in request.moves)


def test_a_move_lists_the_live_actors_of_its_shard_at_the_source() -> None:
    """Not those another node holds of the same shard, and none where the source has none."""
    shard_map = {0: owned_by("b"), 1: owned_by("b")}
    inventories: dict[str, Inventory] = {
        "b": {"shard.1": [("cart/x", 10), ("cart/y", 20)]}, "a": {"shard.0": [("cart/stale", 5)]},
    }  # fmt: skip

    request = plan(shard_map, nodes("a", "b", draining="b"), inventories)

    assert [move.actors for move in request.moves] == [
        (),
        (PlannedActor(actor_id="cart/x", state_bytes=10), PlannedActor(actor_id="cart/y", state_bytes=20)),
    ]


def test_a_pinned_actor_stays_wherever_its_shard_is_and_goes() -> None:
    """That is what it was pinned for; balance counts shards alone."""
    shard_map = {shard: owned_by("a" if shard < 6 else "b") for shard in range(8)}
    apart = {actor_in(shard): pinned("b") for shard in range(8)}

    assert plan(shard_map, nodes("a", "b"), apart=apart) == plan(shard_map, nodes("a", "b"))


def test_an_unpinned_actor_goes_where_its_shard_will_be() -> None:
    """Not where that is now: a second plan would only move it on."""
    shard_map = {shard: owned_by("a" if shard < 6 else "b") for shard in range(8)}
    homes = {shard: "a" if shard < 6 else "b" for shard in range(8)}
    homes |= {move.shard: move.destination for move in plan(shard_map, nodes("a", "b", "c")).moves}
    apart = {actor_in(shard): owned_by("a") for shard in range(8)}

    found = routes(plan(shard_map, nodes("a", "b", "c"), apart=apart))

    for shard, home in homes.items():
        name = ActorId.from_token(actor_in(shard).removeprefix("actor."))
        expected = None if home == "a" else ("a", home, f"{name} is unpinned")
        assert found.get(actor_in(shard)) == expected
    assert {"a", "c"} <= set(homes.values())


def test_an_unpinned_actor_follows_a_shard_that_is_on_its_way_already() -> None:
    """A locked shard counts where it is going, for its actors as well."""
    shard_map = {0: locked("a", "b"), 1: owned_by("a")}

    request = plan(shard_map, nodes("a", "b"), apart={actor_in(0): owned_by("a"), actor_in(1): owned_by("a")})

    assert [(move.unit, move.source, move.destination) for move in request.moves] == [(actor_in(0), "a", "b")]


def test_a_draining_node_gives_its_pinned_actors_away_as_well() -> None:
    """To where their shards will be, before anything that does not hurry, and with the reason for it."""
    shard_map = {shard: owned_by("a" if shard < 8 else "b") for shard in range(16)}
    apart = {actor_in(3): pinned("c"), actor_in(12): pinned("c"), actor_in(5): owned_by("c")}

    request = plan(shard_map, nodes("a", "b", "c", "d", draining="c"), apart=apart)

    assert [move.shard for move in request.moves[:3]] == [3, 5, 12]
    assert {move.reason for move in request.moves[:3]} == {"node c drains"}
    homes = {move.shard: move.destination for move in request.moves[3:]}
    for move in request.moves[:3]:
        assert move.destination == homes.get(move.shard, shard_map[move.shard].owner)


def test_an_actor_pinned_to_its_shards_own_node_leaves_with_the_shard_when_that_drains() -> None:
    """Both go to the same node, in two moves."""
    shard_map = {shard: owned_by("b") for shard in range(4)}

    found = routes(plan(shard_map, nodes("a", "b", draining="b"), apart={actor_in(2): pinned("b")}))

    assert found[actor_in(2)] == found["shard.2"] == ("b", "a", "node b drains")


@pytest.mark.parametrize("draining", ["", "b"])
def test_an_actor_that_is_moving_is_left_alone(draining: str) -> None:
    """Pinned or not, and even when its node drains: it is on its way out, or the next plan sees to it."""
    shard_map = {shard: owned_by("a") for shard in range(4)}
    apart = {actor_in(1): locked("b", "a"), actor_in(2): replace(locked("b", "a"), pinned=True)}

    request = plan(shard_map, nodes("a", "b", draining=draining), apart=apart)

    assert not {*apart} & {move.unit for move in request.moves}


def test_an_actor_whose_node_or_whose_shards_node_is_dead_is_left_to_the_fail_over() -> None:
    """A move needs a source that lives, and nobody knows yet where a dead node's shard will be."""
    shard_map = {0: owned_by("a"), 1: owned_by("dead")}
    apart = {actor_in(0): owned_by("dead"), actor_in(1): owned_by("a"), actor_in(1, 1): owned_by("b")}

    assert plan(shard_map, nodes("a", "b"), apart=apart).moves == ()


def test_an_actors_move_lists_the_actor_where_it_lives() -> None:
    """Under its own unit's name, with its shard's number; the plan as a whole says what it was asked for."""
    unit = actor_in(1)
    inventories: dict[str, Inventory] = {"b": {unit: [("cart/x", 10)], "shard.1": [("cart/stale", 7)]}}

    request = plan({1: owned_by("a")}, nodes("a", "b"), inventories, {unit: owned_by("b")})

    assert [(move.unit, move.shard, move.actors) for move in request.moves] == [
        (unit, 1, (PlannedActor(actor_id="cart/x", state_bytes=10),))
    ]
    assert request.reason == "test"


@given(clusters(), st.data())
def test_a_plan_moves_an_actor_only_to_where_its_shard_will_be(
    cluster: tuple[dict[int, Ownership], list[NodeState]], data: st.DataObject
) -> None:
    """Never a locked one, nor a pinned one of a node that stays; and shards move as if there were no actors apart."""
    shard_map, states = cluster
    owners = st.builds(replace, st.sampled_from("abcdexy").map(owned_by), pinned=st.booleans())
    apart = data.draw(st.dictionaries(st.sampled_from(ACTORS), owners | st.just(locked("a", "b")), max_size=6))
    shards = {shard: ownership.destination or ownership.owner for shard, ownership in shard_map.items()}
    shards |= {move.shard: move.destination for move in plan(shard_map, states).moves}

    request = plan(shard_map, states, apart=apart)

    draining = {node.id for node in states if node.draining}
    for move in request.moves:
        if move.unit in apart:
            assert apart[move.unit].move is None
            assert not apart[move.unit].pinned or move.source in draining
            assert (move.source, move.destination) == (apart[move.unit].owner, shards[move.shard])
    assert [move for move in request.moves if move.unit not in apart] == list(plan(shard_map, states).moves)


def test_a_plan_does_not_depend_on_the_order_in_which_actors_are_listed() -> None:
    """Two coordinators have heard of them in different orders, and plan the same."""
    shard_map, apart = {0: owned_by("a"), 1: owned_by("b")}, {actor_in(0, n): owned_by("b") for n in range(3)}

    request = plan(shard_map, nodes("a", "b"), apart=apart)

    assert len(request.moves) == 3
    assert request.moves == plan(shard_map, nodes("a", "b"), apart=dict(reversed(apart.items()))).moves


def test_nobody_left_to_receive_is_refused() -> None:
    """All drain, or none is there."""
    with pytest.raises(InvalidInput, match="no node may receive"):
        plan({0: owned_by("a")}, nodes("a", "b", draining="ab"))
    with pytest.raises(InvalidInput, match="no node may receive"):
        plan({}, [])


def test_a_node_listed_twice_is_refused_also_while_it_drains() -> None:
    """Staying and draining at once is a contradiction, not a tie."""
    with pytest.raises(InvalidInput, match="node a is listed twice"):
        plan({}, [NodeState(id="a"), NodeState(id="b"), NodeState(id="a", draining=True)])


@pytest.mark.parametrize("shard", [-1, SHARDS])
def test_a_map_of_another_cluster_is_refused(shard: int) -> None:
    """The number of shards is fixed at birth; a map that says otherwise is not ours."""
    with pytest.raises(InvalidInput, match="outside 0 to 31"):
        plan({shard: owned_by("a")}, nodes("a"))


def test_a_summary_counts_moves_actors_and_bytes_by_route() -> None:
    """And estimates the time from all three."""
    shard_map = {0: owned_by("b"), 1: owned_by("b"), 2: owned_by("c")}
    inventories: dict[str, Inventory] = {
        "b": {"shard.0": [("cart/x", 10)], "shard.1": [("cart/y", 20), ("cart/z", 30)]},
        "c": {"shard.2": [("cart/q", 40)]},
    }
    request = plan(shard_map, nodes("a", "b", "c", draining="bc"), inventories)

    shown = summary(request, actors_per_s=2.0, moves_per_s=3.0, state_bytes_per_s=50.0)

    assert (shown.moves, shown.actors, shown.state_bytes) == (3, 4, 100)
    assert shown.routes == (
        Route(source="b", destination="a", moves=2, actors=3, state_bytes=60),
        Route(source="c", destination="a", moves=1, actors=1, state_bytes=40),
    )
    assert shown.estimate_s == pytest.approx(1.0 + 2.0 + 2.0)


def test_the_summary_of_an_empty_plan_is_empty() -> None:
    """Nothing to do takes no time."""
    shown = summary(RebalanceRequest(plan_id="p", reason="none", moves=()))

    assert (shown.moves, shown.actors, shown.state_bytes, shown.routes, shown.estimate_s) == (0, 0, 0, (), 0.0)


# -- in the middle of a rolling upgrade --------------------------------------------------------------------------------
def of_versions(*, draining: str = "", **schema: int) -> list[NodeState]:
    """Nodes by the schema version of the one class that they have."""
    return [NodeState(id=id_, draining=id_ in draining, schemas={"cart": v}) for id_, v in schema.items()]


def test_the_first_upgraded_node_gets_its_share_of_older_ones() -> None:
    """That is how an upgrade goes on."""
    request = plan({shard: owned_by("ab"[shard % 2]) for shard in range(30)}, of_versions(a=1, b=1, c=2))

    assert Counter(move.destination for move in request.moves) == {"c": 10}


def test_nothing_goes_from_newer_to_older_code_for_the_sake_of_balance() -> None:
    """It would be rolled back, and tried again; the balance waits until the older node is upgraded."""
    shards = {shard: owned_by("b" if shard else "a") for shard in range(12)}

    waits = plan(shards, of_versions(a=1, b=2))
    assert (waits.moves, waits.waiting) == ((), 5)
    balances = plan(shards, of_versions(a=2, b=2))
    assert (len(balances.moves), balances.waiting) == (5, 0)
    assert len(plan(shards, of_versions(a=3, b=2)).moves) == 5


def test_what_a_newer_node_has_to_give_away_goes_to_newer_ones() -> None:
    """However full these are: who is older could not read it."""
    shards = {shard: owned_by("abcc"[shard % 4]) for shard in range(24)}

    request = plan(shards, of_versions(a=1, b=2, c=2, draining="c"))

    assert {(move.source, move.destination) for move in request.moves} == {("c", "b")}
    assert (len(request.moves), request.waiting) == (12, 0)


def test_the_last_newer_node_drains_to_older_ones() -> None:
    """What nobody has used under the new code can go there; the rest is rolled back, and says why."""
    request = plan({shard: owned_by("c") for shard in range(4)}, of_versions(a=1, c=2, draining="c"))

    assert [move.destination for move in request.moves] == ["a"] * 4


def test_an_unpinned_actor_stays_at_newer_code_than_its_shard_has() -> None:
    """Until its shard's node is upgraded."""
    shards = {0: owned_by("a"), 1: owned_by("b")}
    apart = {actor_in(0): owned_by("b")}

    assert plan(shards, of_versions(a=1, b=2), apart=apart).moves == ()
    assert len(plan(shards, of_versions(a=2, b=2), apart=apart).moves) == 1
