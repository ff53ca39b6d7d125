"""Which node should own which shard. Pure: the same map and nodes give the same answer everywhere.

Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam: "Consistent Hashing with Bounded Loads", 2016,
arXiv:1608.01350) with the tightest bound there is: every node is filled to the floor or the ceiling of its quota.

    1. fill      each node's number of shards by weight; the slots that rounding leaves over go first to nodes that
                 hold that many already, so that nothing moves for the sake of rounding
    2. release   a node above its number gives up the shards that lie closest before a receiver's point on the ring;
                 shards that nobody owns, or that a leaving node owns, are released anyhow
    3. place     each released shard walks clockwise from its own point to the first receiver with a free slot

Invariants (checked by tests/unit/test_placement.py):
  1. Every shard is owned by one of the given nodes.
  2. A node of weight w owns floor(q) or ceil(q) shards, where q = shards * w / sum of weights.
  3. No map with (1) and (2) can be reached with fewer moves.
  4. The answer does not depend on the order of the input.

Cost: O((S + P) log P) for S shards and P ring points. No pair of a shard and a node is hashed.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import xxhash

from routing.address import NodeId
from routing.errors import InvalidInput

RING_POSITIONS = 2**64  # what xxHash64 yields


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeWeight:
    """A node that may own shards, and its share relative to the others.

    Raises InvalidInput for a weight that is not finite and greater than 0.
    """

    id: NodeId
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise InvalidInput(f"weight {self.weight} of node {self.id}: use a finite number greater than 0")


@dataclass(frozen=True, slots=True)
class ShardMove:
    """One shard's change of owner; `source` is None when nobody owned it."""

    shard: int
    source: NodeId | None
    destination: NodeId


@dataclass(frozen=True, slots=True)
class Rebalance:
    """The map as it should be, and the moves that lead there, in the order of their shards."""

    shard_map: Mapping[int, NodeId]
    moves: tuple[ShardMove, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsistentHashPlacement:
    """Places shards on nodes.

    More `points_per_node` spread the shards that a node receives more evenly over the others; fewer make the cold
    start of a thousand nodes faster. Balance and the number of moves do not depend on them.
    """

    points_per_node: int = 64

    def rebalance_shards(self, shard_map: Mapping[int, NodeId | None], nodes: Iterable[NodeWeight]) -> Rebalance:
        """The nearest balanced map. `shard_map` is shard -> owner; an owner that is not in `nodes` is leaving.

        Raises InvalidInput when there are no nodes, or two with the same id.
        """
        weights = _weights(nodes)
        held: dict[NodeId, list[int]] = {node: [] for node in weights}
        released: list[int] = []
        for shard, owner in shard_map.items():
            (released if owner is None else held.get(owner, released)).append(shard)

        filled = _fill({node: len(shards) for node, shards in held.items()}, weights, shards_total=len(shard_map))
        free = {node: filled[node] - len(shards) for node, shards in held.items() if len(shards) < filled[node]}
        ring = _Ring(free, self.points_per_node)
        for node, shards in held.items():
            if len(shards) > filled[node]:
                released.extend(sorted(shards, key=ring.distance)[: len(shards) - filled[node]])

        placed = ring.place(released, free)
        owner_of = {shard: node for node, shards in held.items() for shard in shards} | placed
        return Rebalance(
            shard_map={shard: owner_of[shard] for shard in sorted(owner_of)},
            moves=tuple(ShardMove(shard, shard_map[shard], placed[shard]) for shard in sorted(placed)),
        )


def _weights(nodes: Iterable[NodeWeight]) -> dict[NodeId, int]:
    """Whole numbers in exactly the proportions of the weights, so that no quota suffers from rounding."""
    nodes = sorted(nodes, key=lambda node: node.id)
    if not nodes:
        raise InvalidInput("no node may own shards: start one, or let one of the draining nodes stay")
    for node, following in pairwise(nodes):
        if node.id == following.id:
            raise InvalidInput(f"node {node.id} is listed twice: give every node its own id")
    ratios = {node.id: node.weight.as_integer_ratio() for node in nodes}
    scale = math.lcm(*(denominator for _, denominator in ratios.values()))
    return {node: numerator * (scale // denominator) for node, (numerator, denominator) in ratios.items()}


def _fill(held: Mapping[NodeId, int], weights: Mapping[NodeId, int], *, shards_total: int) -> dict[NodeId, int]:
    """How many shards each node shall own: the floor of its quota, and one more for as many nodes as that leaves over.

    Keeping one more shard saves a move exactly where a node holds more than its floor, so such nodes come first, which
    is why invariant 3 holds. A node whose quota is whole gets no more than that.
    """
    total = sum(weights.values())
    floors = {node: shards_total * weight // total for node, weight in weights.items()}
    remainders = {node: shards_total * weight % total for node, weight in weights.items()}
    spare = shards_total - sum(floors.values())
    fractional = [node for node in weights if remainders[node]]
    by_need = sorted(fractional, key=lambda node: (held[node] <= floors[node], -remainders[node], node))
    return floors | {node: floors[node] + 1 for node in by_need[:spare]}


class _Ring:
    """The points of the nodes that receive shards, clockwise."""

    def __init__(self, receivers: Iterable[NodeId], points_per_node: int) -> None:
        points = sorted(
            (xxhash.xxh64_intdigest(f"{node}#{point}".encode()), node)
            for node in receivers
            for point in range(points_per_node)
        )
        self._positions = [position for position, _ in points]
        self._nodes = [node for _, node in points]

    def distance(self, shard: int) -> tuple[int, int]:
        """How far clockwise the next point lies; the shard itself breaks ties."""
        position = _position(shard)
        return (self._positions[self._next_point(position)] - position) % RING_POSITIONS, shard

    def place(self, shards: Iterable[int], free: Mapping[NodeId, int]) -> dict[int, NodeId]:
        """Give each shard, the nearest first, to the next node with a free slot. There are as many slots as shards."""
        slots = dict(free)
        onward = list(range(len(self._nodes)))  # per point: itself, or where to go on because its node is full
        placed: dict[int, NodeId] = {}
        for shard in sorted(shards, key=self.distance):
            node = self._nodes[self._next_free(self._next_point(_position(shard)), onward, slots)]
            slots[node] -= 1
            placed[shard] = node
        return placed

    def _next_point(self, position: int) -> int:
        return bisect_left(self._positions, position) % len(self._positions)

    def _next_free(self, point: int, onward: list[int], slots: Mapping[NodeId, int]) -> int:
        """The first point at or after `point` whose node has a free slot.

        Full nodes are skipped in one jump by all later walks, as the sets of a union-find are; without that the last
        shards of a cold start would each walk past nearly all points.
        """
        walked = []
        while onward[point] != point or not slots[self._nodes[point]]:
            walked.append(point)
            point = onward[point] if onward[point] != point else (point + 1) % len(onward)
        for passed in walked:
            onward[passed] = point
        return point


def _position(shard: int) -> int:
    return xxhash.xxh64_intdigest(f"shard.{shard}".encode())
