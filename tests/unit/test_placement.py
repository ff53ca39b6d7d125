"""Placement: balanced, with the fewest moves, the same everywhere, and quick enough for a thousand nodes."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.errors import InvalidInput
from routing.placement import ConsistentHashPlacement, NodeWeight, Rebalance

PLACEMENT = ConsistentHashPlacement(points_per_node=8)
NODE_IDS = ["a", "b", "c", "d", "e", "f", "g", "h"]

weights = st.one_of(st.just(1.0), st.sampled_from([1.0, 2.0, 3.0]), st.floats(0.01, 100.0))


@st.composite
def clusters(
    draw: st.DrawFn, *, max_nodes: int = 8, max_shards: int = 60, weights: st.SearchStrategy[float] = weights
) -> tuple[dict[int, str | None], list[NodeWeight]]:
    """Some nodes, and a map whose owners are among them, leaving, or missing."""
    ids = draw(st.lists(st.sampled_from(NODE_IDS[:max_nodes]), min_size=1, max_size=max_nodes, unique=True))
    owners = st.sampled_from([*NODE_IDS[:max_nodes], "gone", None])
    shards = draw(st.lists(st.integers(0, 70_000), max_size=max_shards, unique=True))
    return {shard: draw(owners) for shard in shards}, [NodeWeight(id=node, weight=draw(weights)) for node in ids]


def quotas(nodes: list[NodeWeight], shards_total: int) -> dict[str, Fraction]:
    total = sum(Fraction(node.weight) for node in nodes)
    return {node.id: shards_total * Fraction(node.weight) / total for node in nodes}


def is_balanced(owners: Mapping[int, str], nodes: list[NodeWeight]) -> bool:
    counts = Counter(owners.values())
    return all(abs(counts[node] - quota) < 1 for node, quota in quotas(nodes, len(owners)).items())


def moves_between(before: Mapping[int, str | None], after: Mapping[int, str]) -> int:
    return sum(before[shard] != after[shard] for shard in before)


@settings(max_examples=300)
@given(clusters())
def test_every_shard_is_owned_and_no_node_is_a_whole_shard_off_its_quota(
    cluster: tuple[dict[int, str | None], list[NodeWeight]],
) -> None:
    """Invariants 1 and 2, in exact arithmetic, for any weights."""
    shard_map, nodes = cluster

    after = PLACEMENT.rebalance_shards(shard_map, nodes).shard_map

    assert after.keys() == shard_map.keys()
    assert set(after.values()) <= {node.id for node in nodes}
    assert is_balanced(after, nodes)


@given(clusters(weights=st.just(1.0)))
def test_equal_weights_differ_by_at_most_one_shard(
    cluster: tuple[dict[int, str | None], list[NodeWeight]],
) -> None:
    """With equal weights nobody owns two shards more than anybody else."""
    shard_map, nodes = cluster

    counts = Counter(PLACEMENT.rebalance_shards(shard_map, nodes).shard_map.values())

    assert max(counts[node.id] for node in nodes) - min(counts[node.id] for node in nodes) <= 1


@given(clusters())
def test_the_moves_are_exactly_the_difference_of_the_maps(
    cluster: tuple[dict[int, str | None], list[NodeWeight]],
) -> None:
    """Each changed shard has one move, which names its owners before and after; nothing else has one."""
    shard_map, nodes = cluster

    rebalance = PLACEMENT.rebalance_shards(shard_map, nodes)

    assert [move.shard for move in rebalance.moves] == sorted(
        shard for shard in shard_map if shard_map[shard] != rebalance.shard_map[shard]
    )
    for move in rebalance.moves:
        assert (move.source, move.destination) == (shard_map[move.shard], rebalance.shard_map[move.shard])


@settings(max_examples=60)
@given(clusters(max_nodes=3, max_shards=6))
def test_no_balanced_map_of_a_tiny_cluster_needs_fewer_moves(
    cluster: tuple[dict[int, str | None], list[NodeWeight]],
) -> None:
    """Invariant 3 against brute force: every map there is, those that are balanced, the one nearest to the start."""
    shard_map, nodes = cluster
    every_map = itertools.product([node.id for node in nodes], repeat=len(shard_map))
    candidates = (dict(zip(shard_map, owners, strict=True)) for owners in every_map)
    fewest = min(moves_between(shard_map, after) for after in candidates if is_balanced(after, nodes))

    rebalance = PLACEMENT.rebalance_shards(shard_map, nodes)

    assert len(rebalance.moves) == fewest


@given(clusters())
def test_no_balanced_map_keeps_more_shards_where_they_are(
    cluster: tuple[dict[int, str | None], list[NodeWeight]],
) -> None:
    """Invariant 3 against dynamic programming over the nodes: the most that can stay, per number handed out."""
    shard_map, nodes = cluster
    held = Counter(shard_map.values())
    kept_most = {0: 0}  # shards handed out so far -> most of them that stay
    for node, quota in quotas(nodes, len(shard_map)).items():
        kept_most = {
            given_out + count: max(
                kept_most.get(given_out + count - other, -1) + min(held[node], other)
                for other in {math.floor(quota), math.ceil(quota)}
                if given_out + count - other in kept_most
            )
            for given_out in kept_most
            for count in {math.floor(quota), math.ceil(quota)}
        }

    rebalance = PLACEMENT.rebalance_shards(shard_map, nodes)

    assert len(shard_map) - len(rebalance.moves) == kept_most[len(shard_map)]


@given(clusters(), st.randoms(use_true_random=False))
def test_the_order_of_shards_and_nodes_does_not_matter(
    cluster: tuple[dict[int, str | None], list[NodeWeight]], shuffling: random.Random
) -> None:
    """Invariant 4: two coordinators that heard of nodes in different orders plan the same."""
    shard_map, nodes = cluster
    shuffled_shards, shuffled_nodes = list(shard_map.items()), list(nodes)
    shuffling.shuffle(shuffled_shards)
    shuffling.shuffle(shuffled_nodes)

    one = PLACEMENT.rebalance_shards(shard_map, nodes)
    other = PLACEMENT.rebalance_shards(dict(shuffled_shards), iter(shuffled_nodes))

    assert one == other
    assert list(one.shard_map) == list(other.shard_map)


@given(clusters())
def test_a_balanced_map_stays_as_it_is(cluster: tuple[dict[int, str | None], list[NodeWeight]]) -> None:
    """Rebalancing twice moves nothing the second time."""
    shard_map, nodes = cluster
    balanced = PLACEMENT.rebalance_shards(shard_map, nodes)

    assert PLACEMENT.rebalance_shards(balanced.shard_map, nodes) == Rebalance(balanced.shard_map, ())


@given(clusters(), weights)
def test_shards_only_move_to_a_node_that_joins(
    cluster: tuple[dict[int, str | None], list[NodeWeight]], weight: float
) -> None:
    """A join shuffles nothing between the nodes that were there."""
    shard_map, nodes = cluster
    before = PLACEMENT.rebalance_shards(shard_map, nodes).shard_map

    joined = PLACEMENT.rebalance_shards(before, [*nodes, NodeWeight(id="new", weight=weight)])

    # A weight can shrink one node's floor and, by rounding, leave another node one more; only that may move besides.
    others = [move for move in joined.moves if move.destination != "new"]
    assert len(others) < len(nodes)
    if len({node.weight for node in nodes} | {weight}) == 1:
        assert not others


def test_a_joining_node_takes_the_shards_that_lie_just_before_it_on_the_ring() -> None:
    """Affinity: which shards a node receives follows from the node, so different nodes attract different shards."""
    nodes = [NodeWeight(id="a"), NodeWeight(id="b")]
    before = PLACEMENT.rebalance_shards(dict.fromkeys(range(300)), nodes).shard_map

    c = {move.shard for move in PLACEMENT.rebalance_shards(before, [*nodes, NodeWeight(id="c")]).moves}
    c_again = {move.shard for move in PLACEMENT.rebalance_shards(before, [NodeWeight(id="c"), *nodes]).moves}
    d = {move.shard for move in PLACEMENT.rebalance_shards(before, [*nodes, NodeWeight(id="d")]).moves}

    assert len(c) == len(d) == 100
    assert c == c_again
    assert c != d


def test_a_leaving_nodes_shards_spread_over_all_others() -> None:
    """No single neighbour on the ring inherits everything."""
    nodes = [NodeWeight(id=node) for node in NODE_IDS]
    before = PLACEMENT.rebalance_shards(dict.fromkeys(range(8 * 70)), nodes).shard_map

    moves = PLACEMENT.rebalance_shards(before, nodes[1:]).moves

    assert Counter(move.destination for move in moves) == {node.id: 10 for node in nodes[1:]}
    assert {move.source for move in moves} == {nodes[0].id}


def test_the_placement_of_a_known_cluster_never_changes() -> None:
    """A changed hash, ring or tie-break would plan differently after an upgrade: it must show here first."""
    nodes = [NodeWeight(id="a"), NodeWeight(id="b"), NodeWeight(id="c", weight=2.0)]

    placed = ConsistentHashPlacement().rebalance_shards(dict.fromkeys(range(12)), nodes).shard_map

    assert "".join(placed[shard] for shard in range(12)) == "bccaccaaccbb"


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, -math.inf, math.nan])
def test_a_weight_that_is_not_finite_and_positive_is_refused(weight: float) -> None:
    """A quota needs a real share."""
    with pytest.raises(InvalidInput, match="weight"):
        PLACEMENT.rebalance_shards({0: None}, [NodeWeight(id="a", weight=weight)])


def test_a_cluster_without_nodes_is_refused() -> None:
    """Even an empty map: whoever asks has lost its membership."""
    with pytest.raises(InvalidInput, match="no node"):
        PLACEMENT.rebalance_shards({}, [])


def test_a_node_listed_twice_is_refused() -> None:
    """Two weights for one node leave no right answer."""
    with pytest.raises(InvalidInput, match="node a is listed twice"):
        PLACEMENT.rebalance_shards({}, [NodeWeight(id="a"), NodeWeight(id="b"), NodeWeight(id="a", weight=2.0)])


def test_a_node_with_a_whole_quota_gets_exactly_that() -> None:
    """Quotas 3, 1.5 and 1.5: the spare slot is not for the first node, though keeping its fourth shard saves a move."""
    nodes = [NodeWeight(id="a", weight=2.0), NodeWeight(id="b"), NodeWeight(id="c")]

    after = PLACEMENT.rebalance_shards(dict(enumerate("aaaabc")), nodes).shard_map

    assert Counter(after.values())["a"] == 3


def test_weights_of_any_magnitude_keep_exact_quotas() -> None:
    """The smallest and the largest floats in one cluster: nothing overflows, and nobody gets more than a share."""
    nodes = [NodeWeight(id="a", weight=5e-324), NodeWeight(id="b", weight=1.7e308), NodeWeight(id="c", weight=1.7e308)]

    after = PLACEMENT.rebalance_shards(dict.fromkeys(range(100)), nodes).shard_map

    assert is_balanced(after, nodes)


def test_a_thousand_nodes_and_sixteen_thousand_shards_hash_no_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost grows with shards plus nodes: a cold start hashes each ring point once and each shard a few times."""
    hashed = Counter[str]()
    real = xxhash.xxh64_intdigest

    def counting(text: bytes) -> object:
        hashed["calls"] += 1
        return real(text)

    monkeypatch.setattr(xxhash, "xxh64_intdigest", counting)
    placement = ConsistentHashPlacement()
    nodes = [NodeWeight(id=f"node-{n}") for n in range(1_000)]

    cold = placement.rebalance_shards(dict.fromkeys(range(16_384)), nodes)
    cold_calls = hashed["calls"]
    joined = placement.rebalance_shards(cold.shard_map, [*nodes, NodeWeight(id="node-new")])

    assert cold_calls <= 64 * 1_000 + 3 * 16_384
    assert hashed["calls"] - cold_calls <= 64 + 3 * 16_384
    assert len(joined.moves) == 16
    assert is_balanced(joined.shard_map, [*nodes, NodeWeight(id="node-new")])
