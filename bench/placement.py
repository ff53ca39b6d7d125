"""`placement`: what a rebalance of a large cluster costs to compute, and how near its answer is to the optimum.

floor of moved     the fewest shards that can move to a balanced map: each node's surplus over the most it may keep
floor of load      1: every node owns exactly its share by weight
floor of growth    1: time in proportion to the number of shards
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from bench.results import Result, percentile
from routing.placement import ConsistentHashPlacement, NodeWeight

NODES, SHARDS, RUNS = 1_000, 16_384, 5
GROWTH = (4_096, 16_384, 65_536)


async def measure(nodes: int = NODES, shards: int = SHARDS, runs: int = RUNS) -> list[Result]:
    placement = ConsistentHashPlacement()
    weights = [NodeWeight(id=f"n{number}", weight=1.0) for number in range(nodes)]
    uneven = [NodeWeight(id=f"n{number}", weight=random.Random(number).choice((1, 2, 4))) for number in range(nodes)]
    balanced = dict(placement.rebalance_shards(dict.fromkeys(range(shards)), weights).shard_map)
    case = f"{nodes:,} nodes, {shards:,} shards"
    results = []
    for what, shard_map, receivers in (
        ("from nothing", dict.fromkeys(range(shards)), weights),
        ("one joins", balanced, [*weights, NodeWeight(id="new")]),
        ("one leaves", balanced, weights[1:]),
        ("weights change to 1, 2, 4", balanced, uneven),
    ):
        took_s, found = [], None
        for _ in range(runs):
            began_s = time.perf_counter()
            found = placement.rebalance_shards(shard_map, receivers)
            took_s.append(time.perf_counter() - began_s)
        assert found is not None
        loads = _loads(found.shard_map, receivers)
        results += [
            Result(case=f"{case}, {what}", value=percentile(took_s, 0.5), unit="s", runs=runs),
            Result(case=f"{what}: moved", value=len(found.moves), unit="shards", floor=_fewest(shard_map, receivers)),
            Result(case=f"{what}: fullest node, load by weight", value=max(loads), unit="x its share", floor=1.0),
            Result(case=f"{what}: emptiest node, load by weight", value=min(loads), unit="x its share", floor=1.0),
        ]
    return [*results, *_growth(placement, weights, runs)]


def _growth(placement: ConsistentHashPlacement, weights: Sequence[NodeWeight], runs: int) -> list[Result]:
    """Seconds of a cold start, beside what the smallest one's time allows when cost grows with the shards alone."""
    results: list[Result] = []
    for shards in GROWTH:
        took_s = []
        for _ in range(runs):
            began_s = time.perf_counter()
            placement.rebalance_shards(dict.fromkeys(range(shards)), weights)
            took_s.append(time.perf_counter() - began_s)
        linear_s = results[0].value * shards / GROWTH[0] if results else None
        results.append(
            Result(
                case=f"growth, {shards:,} shards", value=percentile(took_s, 0.5), unit="s", floor=linear_s, runs=runs
            )
        )
    return results


def _fewest(shard_map: Mapping[int, str | None], nodes: Sequence[NodeWeight]) -> int:
    """The optimum, by counting: a node may keep its quota rounded down, and as many nodes one more as that leaves."""
    weights = {node.id: node.weight for node in nodes}
    total, held = sum(weights.values()), Counter(owner for owner in shard_map.values() if owner in weights)
    quotas = {node: len(shard_map) * weight / total for node, weight in weights.items()}
    kept = {node: min(held[node], int(quotas[node] + 1e-9)) for node in weights}
    spare = len(shard_map) - sum(int(quota + 1e-9) for quota in quotas.values())
    one_more = sum(1 for node in weights if held[node] > kept[node] and quotas[node] % 1 > 1e-9)
    return len(shard_map) - sum(kept.values()) - min(spare, one_more)


def _loads(shard_map: Mapping[int, str], nodes: Sequence[NodeWeight]) -> list[float]:
    """Shards of each node over its share by weight."""
    owned, total = Counter(shard_map.values()), sum(node.weight for node in nodes)
    return [owned[node.id] / (len(shard_map) * node.weight / total) for node in nodes]
