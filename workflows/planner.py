"""What a rebalance would move, from where to where, and why. Pure: the map, the nodes and their inventories come in.

    membership + map ──placement──> which shards go where ──inventories──> RebalanceRequest ──summary──> counts, bytes

A plan leaves alone
  - shards that a move has locked already: they count where they are going, so that the plan does not balance twice;
  - shards whose owner is not among the nodes: FAILOVER gives those away, a move needs a source that lives;
  - shards that nobody owns: ASSIGN gives those away;
  - shards of a node with newer code, as long as only older could have them and theirs can stay: that could not read
    them, and the balance waits until it is upgraded. What has to leave goes to nodes of that code while there are any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import pairwise

from routing.address import NodeId, shard_of
from routing.errors import InvalidInput
from routing.membership import reads
from routing.placement import ConsistentHashPlacement, NodeWeight
from routing.shard_map import Ownership
from routing.subjects import actor_of_key, shard_key
from workflows.records import PlannedActor, PlannedMove, RebalanceRequest

# A node's live actors: unit -> (actor id, bytes of its state). What a node answers when it is asked what it holds.
Inventory = Mapping[str, Sequence[tuple[str, int]]]

# For the estimate only. Measured on two cores: a chain of six steps runs 70 to 90 times a second under an admission
# window; state goes from node to node throttled to 50 MB/s so that it does not starve other messages.
MOVES_PER_S = 60.0
ACTORS_PER_S = 2_000.0
STATE_BYTES_PER_S = 50e6


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeState:
    """A live node as the planner sees it. A draining one gives its shards away and receives none.

    `schemas`: actor type -> the schema version of its code.
    """

    id: NodeId
    weight: float = 1.0
    draining: bool = False
    schemas: Mapping[str, int] = field(default_factory=dict)

    def reads(self, other: NodeState) -> bool:
        """Whether its code can take over what the other's may have written."""
        return reads(self.schemas, other.schemas)


def plan_rebalance(
    shard_map: Mapping[int, Ownership],
    nodes: Iterable[NodeState],
    inventories: Mapping[NodeId, Inventory],
    *,
    plan_id: str,
    reason: str,
    shards_total: int,
    placement: ConsistentHashPlacement,
    apart: Mapping[str, Ownership] | None = None,
) -> RebalanceRequest:
    """The fewest moves to a balanced map, those that empty a draining node first, then in the order of the shards.

    `apart` are the actors with a key of their own, unit -> ownership: a pinned one stays until its node drains, and one
    that is unpinned goes where its shard will be. A node without an inventory, or a unit without an entry in it, has no
    live actors. Raises InvalidInput when no node may receive, a node is listed twice, or the map names a shard that the
    cluster does not have.
    """
    states = _by_id(nodes)
    receivers = [NodeWeight(id=node.id, weight=node.weight) for node in states.values() if not node.draining]
    if not receivers:
        raise InvalidInput("no node may receive shards: start one, or let one of the draining nodes stay")
    if shard_map and not 0 <= min(shard_map) <= max(shard_map) < shards_total:
        raise InvalidInput(f"the map names shards outside 0 to {shards_total - 1}: is FERRY_SHARDS this cluster's?")

    movable = {shard: ownership for shard, ownership in shard_map.items() if ownership.owner in states}
    future_owners = {shard: ownership.destination or ownership.owner for shard, ownership in movable.items()}
    owners = {ownership.owner for ownership in shard_map.values()}
    homes = dict(placement.rebalance_shards(future_owners, receivers).shard_map)
    waiting = 0
    for node in states.values():
        able = [receiver for receiver in receivers if states[receiver.id].reads(node)]
        if len(able) == len(receivers):
            continue
        elsewhere = placement.rebalance_shards(future_owners, able or receivers).shard_map
        for shard, ownership in movable.items():
            if ownership.owner == node.id and not states[homes[shard]].reads(node):
                homes[shard] = elsewhere[shard] if node.draining else node.id
                waiting += not node.draining and ownership.move is None
    moves = [
        planned_move(
            shard_key(shard), shard, ownership.owner, homes[shard], inventories,
            reason=_reason(states[ownership.owner], homes[shard], owners),
        )
        for shard, ownership in sorted(movable.items())
        if ownership.move is None and homes[shard] != ownership.owner
    ]  # fmt: skip
    for unit, own in (apart or {}).items():
        actor, source = actor_of_key(unit), states.get(own.owner)
        if actor is None or source is None or own.move is not None or (own.pinned and not source.draining):
            continue
        shard = shard_of(actor, shards_total)
        home = homes.get(shard)
        if home is not None and home != own.owner and (source.draining or states[home].reads(source)):
            why = f"node {source.id} drains" if source.draining else f"{actor} is unpinned"
            moves.append(planned_move(unit, shard, own.owner, home, inventories, reason=why))
    moves.sort(key=lambda move: (not states[move.source].draining, move.shard, move.unit))
    return RebalanceRequest(plan_id=plan_id, reason=reason, moves=tuple(moves), waiting=waiting)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What goes from one node to another."""

    source: NodeId
    destination: NodeId
    moves: int
    actors: int
    state_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSummary:
    """What `ferry plan` shows. `routes` are in the order of their nodes; `estimate_s` is a guess, not a promise."""

    moves: int
    actors: int
    state_bytes: int
    routes: tuple[Route, ...]
    estimate_s: float


def summary(
    request: RebalanceRequest,
    *,
    actors_per_s: float = ACTORS_PER_S,
    moves_per_s: float = MOVES_PER_S,
    state_bytes_per_s: float = STATE_BYTES_PER_S,
) -> PlanSummary:
    """Counts, bytes and an estimate, as if chains, actors and bytes each took their time one after the other."""
    by_route: dict[tuple[NodeId, NodeId], list[PlannedMove]] = {}
    for move in request.moves:
        by_route.setdefault((move.source, move.destination), []).append(move)
    routes = tuple(
        Route(
            source=source,
            destination=destination,
            moves=len(moves),
            actors=sum(len(move.actors) for move in moves),
            state_bytes=sum(actor.state_bytes for move in moves for actor in move.actors),
        )
        for (source, destination), moves in sorted(by_route.items())
    )
    actors = sum(route.actors for route in routes)
    state_bytes = sum(route.state_bytes for route in routes)
    return PlanSummary(
        moves=len(request.moves),
        actors=actors,
        state_bytes=state_bytes,
        routes=routes,
        estimate_s=len(request.moves) / moves_per_s + actors / actors_per_s + state_bytes / state_bytes_per_s,
    )


def _by_id(nodes: Iterable[NodeState]) -> dict[NodeId, NodeState]:
    listed = sorted(nodes, key=lambda node: node.id)
    for node, following in pairwise(listed):
        if node.id == following.id:
            raise InvalidInput(f"node {node.id} is listed twice: give every node its own id")
    return {node.id: node for node in listed}


def _reason(source: NodeState, destination: NodeId, owners: Set[NodeId]) -> str:
    if source.draining:
        return f"node {source.id} drains"
    return "balance" if destination in owners else f"node {destination} joined"


def planned_move(
    unit: str, shard: int, source: NodeId, destination: NodeId, inventories: Mapping[NodeId, Inventory], *, reason: str
) -> PlannedMove:
    """A move of what is live in a unit."""
    live = inventories.get(source, {}).get(unit, ())
    actors = tuple(PlannedActor(actor_id=actor_id, state_bytes=size) for actor_id, size in live)
    return PlannedMove(unit=unit, shard=shard, source=source, destination=destination, reason=reason, actors=actors)
