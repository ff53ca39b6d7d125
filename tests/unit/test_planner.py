"""The planner: what it moves, what it leaves alone, and what it says about it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.errors import InvalidInput
from routing.placement import ConsistentHashPlacement
from routing.shard_map import Ownership
from workflows.planner import Inventory, NodeState, Route, plan_rebalance, summary
from workflows.records import PlannedActor, RebalanceRequest, from_document, to_document

PLACEMENT = ConsistentHashPlacement(points_per_node=8)
SHARDS = 32


def owned_by(owner: str, epoch: int = 3) -> Ownership:
    return Ownership(owner=owner, incarnation=f"{owner}-1", epoch=epoch)


def locked(owner: str, destination: str) -> Ownership:
    return replace(owned_by(owner), move="earlier", destination=destination)


def plan(
    shard_map: dict[int, Ownership], nodes: list[NodeState], inventories: dict[str, Inventory] | None = None
) -> RebalanceRequest:
    return plan_rebalance(
        shard_map, nodes, inventories or {}, plan_id="p", reason="test", shards_total=SHARDS, placement=PLACEMENT
    )


def nodes(*ids: str, draining: str = "") -> list[NodeState]:
    return [NodeState(id=node, draining=node in draining) for node in ids]


@st.composite
def clusters(draw: st.DrawFn) -> tuple[dict[int, Ownership], list[NodeState]]:
    """Up to five nodes, at least one of which stays, and a map with every kind of owner and lock."""
    ids = draw(st.lists(st.sampled_from("abcde"), min_size=1, max_size=5, unique=True))
    states = [
        NodeState(id=node, weight=draw(st.sampled_from([1.0, 2.0])), draining=draw(st.booleans())) for node in ids
    ]
    states[0] = replace(states[0], draining=False)
    routes = st.tuples(st.sampled_from("abcdexy"), st.sampled_from("abcdexy"), st.booleans())
    shard_map = {}
    for shard in draw(st.sets(st.integers(0, SHARDS - 1))):
        owner, destination, is_locked = draw(routes)
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
def test_a_plan_survives_the_wire(cluster: tuple[dict[int, Ownership], list[NodeState]]) -> None:
    """What the planner makes, the request's schema accepts."""
    request = plan(*cluster)

    assert from_document(RebalanceRequest, to_document(request)) == request


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
