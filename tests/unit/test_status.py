"""What `ferry status` and `ferry doctor` find wrong, in words, and what they count."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from routing.address import ActorId
from routing.directory import MapEntry
from routing.membership import Member, NodeState
from routing.shard_map import Ownership
from routing.subjects import actor_key
from workflows.doctor import Finding, Verdict, _replicas
from workflows.records import MigrationPlan
from workflows.status import HeldLock, Status, problems, to_json
from workflows.words import counted_units


def member(node: str, state: NodeState = NodeState.UP) -> Member:
    return Member(
        id=node, incarnation=f"{node}-1", state=state, weight=1.0, role="", types=("aircraft",), host="h", pid=1,
        version="0.1.0",
    )  # fmt: skip


def owned_by(owner: str) -> MapEntry:
    return MapEntry(Ownership(owner=owner, incarnation=f"{owner}-1", epoch=3), 7)


HEALTHY = Status(
    cluster="default", workers=["w@h"], leader="c1", suspended=False, shards_total=3, moves_running=0,
    entries={"shard.0": owned_by("a"), "shard.1": owned_by("b"), "shard.2": owned_by("b")},
    members={"a": member("a"), "b": member("b")},
    answers={"a": {"actors": 5, "serving": True}, "b": {"actors": 7, "serving": True}},
)  # fmt: skip
UPGRADING = {node: replace(member(node), schemas={"aircraft": version}) for node, version in {"a": 1, "b": 2}.items()}
LOCK = HeldLock(unit="shard.1", move="m1", owner="b", destination="a", idle_s=2.0)

PINNED = actor_key(ActorId("aircraft", "N14228"))
REFUSAL = "pause: a handler of aircraft/N14228 still runs after 4 s"
PLAN = MigrationPlan(id="p1", reason="node c joined", created_at=1.0, started_at=1.0, total=4, completed=3, failed=1)


def test_a_healthy_cluster_has_no_problems() -> None:
    """Neither has one in which a move runs as it should."""
    assert problems(HEALTHY) == []
    assert problems(replace(HEALTHY, locks=[LOCK])) == []


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (replace(HEALTHY, leader=None), "no coordinator leads"),
        (replace(HEALTHY, workers=[]), "no worker answers"),
        (replace(HEALTHY, redis_error="Redis is away", workers=None), "Redis is away"),
        (replace(HEALTHY, shards_total=5), "2 shards (shard/3, shard/4) have no owner yet"),
        (replace(HEALTHY, shards_total=4, unreadable=["shard.3"]), "shard/3 has no value in the map that can be read"),
        (replace(HEALTHY, unreadable=["shard.1"]), "shard/1 has no value in the map that can be read"),
        (replace(HEALTHY, members={"a": member("a")}), "node b is gone and 2 shards (shard/1, shard/2) have not"),
        (
            replace(HEALTHY, members=UPGRADING),
            "code of older schema versions than others (theirs in brackets): aircraft 1 (2)",
        ),
        (
            replace(HEALTHY, entries=HEALTHY.entries | {PINNED: owned_by("c"), "shard.2": owned_by("c")}),
            "node c is gone and 1 shard and 1 actor (shard/2, aircraft/N14228) have not",
        ),
        (replace(HEALTHY, answers={"a": None}), "node a holds a lease but does not answer"),
        (replace(HEALTHY, answers={"a": {"serving": False}}), "node a could not renew its lease"),
        (replace(HEALTHY, answers={"a": {"counters": {"quarantined": 2}}}), "quarantined"),
        (replace(HEALTHY, answers={"a": {"paused": ["shard.0"]}}), "at node a shard/0 has been paused without a lock"),
        (replace(HEALTHY, locks=[replace(LOCK, idle_s=None)]), "shard/1 is locked by move m1 (b to a), of which there"),
        (replace(HEALTHY, locks=[replace(LOCK, idle_s=12.0)]), "stands still for 12 s"),
        (replace(HEALTHY, locks=[replace(LOCK, idle_s=12.0, error=REFUSAL)]), f"still for 12 s ({REFUSAL}): see"),
        (replace(HEALTHY, locks=[replace(LOCK, error=REFUSAL)]), f"is tried again: {REFUSAL}"),
        (replace(HEALTHY, plan=PLAN, plan_error=REFUSAL), f"of the last plan did not complete (the latest: {REFUSAL})"),
    ],
)
def test_each_problem_is_said_in_one_sentence(broken: Status, said: str) -> None:
    """One cause, one sentence."""
    found = problems(broken)

    assert len(found) == 1
    assert said in found[0]


def test_a_cluster_in_which_every_node_drains_says_so() -> None:
    """Nobody could take the shards of the first, nor of the last."""
    draining = {node: member(node, NodeState.DRAINING) for node in "ab"}

    assert "no node is up that takes shards" in problems(replace(HEALTHY, members=draining))[0]


def test_a_unit_paused_at_a_node_that_has_just_given_it_away_is_no_problem() -> None:
    """The node answered before the commit, the map was read after it."""
    assert problems(replace(HEALTHY, answers={"a": {"paused": ["shard.1"]}})) == []


def test_status_counts_shards_from_the_map_and_actors_from_the_nodes() -> None:
    """A silent node still owns what the map says; nobody knows its actors."""
    document = to_json(replace(HEALTHY, answers={"a": {"actors": 5}, "b": None}))

    assert [(node["id"], node["shards"], node["actors"]) for node in document["nodes"]] == [("a", 1, 5), ("b", 2, None)]


def test_status_has_the_fields_of_the_latest_plan() -> None:
    """Those that the interface promises."""
    document = to_json(replace(HEALTHY, plan=PLAN))["plan"]

    assert {"id", "reason", "total", "completed", "failed", "started_at", "finished_at"} <= document.keys()


def test_one_copy_is_a_warning_and_a_lagging_copy_a_failure() -> None:
    """Doctor reads JetStream's own account of each stream."""
    one = {"config": {"num_replicas": 1}}
    peers = [{"name": "n2", "current": True}, {"name": "n3", "current": True}]
    three = {"config": {"num_replicas": 3}, "cluster": {"replicas": peers}}
    lagging = {"config": {"num_replicas": 3}, "cluster": {"replicas": [{"name": "n2", "current": False}]}}

    verdicts = [_replicas(infos).verdict for infos in ({"s": one}, {"s": three}, {"s": three, "t": lagging})]

    assert verdicts == [Verdict.WARN, Verdict.OK, Verdict.FAIL]
    assert _replicas({"s": {"error": {"err_code": 10059}}}).verdict is Verdict.FAIL


def test_a_finding_is_plain_json() -> None:
    finding = Finding(check="nats", verdict=Verdict.OK, found="here")

    assert json.loads(json.dumps(finding.to_json())) == {"check": "nats", "verdict": "ok", "found": "here", "mend": ""}


def test_units_are_counted_by_what_they_are() -> None:
    """As a node has them that drains: an actor apart is no shard."""
    assert counted_units(["shard.1", "shard.2", PINNED]) == "2 shards and 1 actor"
    assert counted_units([PINNED]) == "1 actor"
    assert counted_units([]) == "0 shards"
