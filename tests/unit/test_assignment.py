"""Who may receive shards: nodes that have the actor classes which the nodes with shards have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from routing.directory import Directory
from routing.membership import Member, NodeState
from routing.placement import ConsistentHashPlacement
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
