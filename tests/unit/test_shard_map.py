"""The shard map's transitions: each one by itself, and any sequence of them against the invariants."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from routing.errors import InvariantViolated, NotApplicable
from routing.shard_map import (
    LastMove,
    Outcome,
    Ownership,
    abort,
    assign,
    bind,
    boot,
    check,
    commit,
    failover,
    lock,
)
from runtime.rules import must_claim

UNBOUND = Ownership(owner="a", incarnation=None, epoch=4, fence=2)
BOUND = replace(UNBOUND, incarnation="a-1")
LOCKED = replace(BOUND, move="m", destination="b")
COMMITTED = LastMove(move="m", outcome=Outcome.COMMITTED, epoch=5)
ABORTED = LastMove(move="m", outcome=Outcome.ABORTED, epoch=5)


def test_a_first_owner_starts_at_epoch_one_and_must_bind() -> None:
    """ASSIGN leaves the incarnation open: nobody serves before it binds."""
    assert assign("a") == Ownership(owner="a", incarnation=None, epoch=1)


def test_a_lock_names_the_move_and_changes_nothing_else() -> None:
    """LOCK keeps owner, incarnation and epoch: the source goes on owning."""
    assert lock(BOUND, move="m", destination="b") == LOCKED


def test_a_commit_gives_the_unit_to_an_unbound_destination() -> None:
    """COMMIT: owner and epoch change in the same write, which names the outcome; the fence stays."""
    after = commit(LOCKED, move="m", incarnation="a-1")

    assert after == Ownership(owner="b", incarnation=None, epoch=5, last=COMMITTED, fence=2)
    assert after.outcome_of("m") is Outcome.COMMITTED


def test_an_abort_leaves_the_unit_with_the_bound_source_at_a_new_epoch() -> None:
    """ABORT: the epoch grows too, so that the source's own gate knows which outcome it sees."""
    after = abort(LOCKED, move="m")

    assert after == Ownership(owner="a", incarnation="a-1", epoch=5, last=ABORTED, fence=2)
    assert after.outcome_of("m") is Outcome.ABORTED


def test_an_outcome_is_told_of_the_latest_move_only() -> None:
    """A lock is no outcome, and what the key no longer names is unknown."""
    assert LOCKED.outcome_of("m") is None
    assert abort(LOCKED, move="m").outcome_of("n") is None


def test_a_restarted_owner_aborts_the_lock_of_its_earlier_life() -> None:
    """BOOT: what was paused is gone with the old process [T7], which may still be appending: the fence rises."""
    after = boot(LOCKED, node="a", incarnation="a-2")

    assert after == Ownership(owner="a", incarnation="a-2", epoch=5, last=ABORTED, fence=5)


def test_binding_changes_only_the_incarnation() -> None:
    """BIND names who serves; the epoch began with the write before it."""
    committed = commit(LOCKED, move="m", incarnation="a-1")

    assert bind(committed, node="b", incarnation="b-1") == replace(committed, incarnation="b-1")


def test_a_fail_over_aborts_the_lock_and_raises_the_fence() -> None:
    """FAILOVER: nobody knows when the old owner stops."""
    assert failover(LOCKED, to="c") == Ownership(owner="c", incarnation=None, epoch=5, last=ABORTED, fence=5)


def test_a_fail_over_without_a_lock_keeps_the_last_outcome() -> None:
    """A move that was committed stays committed, whoever owns the unit since."""
    after = failover(commit(LOCKED, move="m", incarnation="a-1"), to="c")

    assert after.outcome_of("m") is Outcome.COMMITTED
    assert (after.epoch, after.fence) == (6, 6)


def test_an_actor_needs_a_claim_exactly_while_its_log_ends_below_the_fence() -> None:
    """A clean move does not spare an actor that nobody touched since the fail-over before it [T1]."""
    moved = commit(lock(bind(failover(BOUND, to="c"), node="c", incarnation="c-1"), move="n", destination="b"),
                   move="n", incarnation="c-1")  # fmt: skip

    assert (moved.epoch, moved.fence) == (6, 5)
    assert [must_claim(tail_epoch=tail_epoch, fence=moved.fence) for tail_epoch in (0, 4, 5, 6)] == [
        True,
        True,
        False,
        False,
    ]


def test_an_actor_of_a_shard_that_never_lost_its_owner_needs_no_claim() -> None:
    """Not even one without a log."""
    assert not must_claim(tail_epoch=0, fence=assign("a").fence)


@pytest.mark.parametrize(
    ("transition", "says"),
    [
        (lambda: lock(LOCKED, move="n", destination="c"), "already locked by move m"),
        (lambda: lock(LOCKED, move="m", destination="b"), "already locked by move m"),
        (lambda: lock(UNBOUND, move="m", destination="b"), "has not taken it over yet"),
        (lambda: lock(BOUND, move="m", destination="a"), "owns it already"),
        (lambda: commit(BOUND, move="m", incarnation="a-1"), "holds no lock"),
        (lambda: commit(LOCKED, move="n", incarnation="a-1"), "holds no lock"),
        (lambda: commit(LOCKED, move="m", incarnation="a-0"), "only the source may commit"),
        (lambda: commit(abort(LOCKED, move="m"), move="m", incarnation="a-1"), "it was aborted"),
        (lambda: abort(BOUND, move="m"), "holds no lock"),
        (lambda: abort(LOCKED, move="n"), "holds no lock"),
        (lambda: abort(commit(LOCKED, move="m", incarnation="a-1"), move="m"), "it was committed"),
        (lambda: boot(BOUND, node="b", incarnation="b-1"), "not left behind"),
        (lambda: boot(BOUND, node="a", incarnation="a-1"), "not left behind"),
        (lambda: boot(UNBOUND, node="a", incarnation="a-1"), "not left behind"),
        (lambda: bind(BOUND, node="a", incarnation="a-2"), "not waiting"),
        (lambda: bind(UNBOUND, node="b", incarnation="b-1"), "not waiting"),
        (lambda: failover(BOUND, to="a"), "owns it already"),
    ],
)
def test_what_the_map_does_not_allow_is_refused_with_a_reason(transition: object, says: str) -> None:
    """Whoever comes late learns what happened instead."""
    assert callable(transition)
    with pytest.raises(NotApplicable, match=says):
        transition()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, replace(BOUND, move="m")),
        (None, replace(BOUND, destination="b")),
        (None, replace(LOCKED, destination="a")),
        (BOUND, replace(BOUND, epoch=3)),
        (BOUND, replace(BOUND, epoch=6)),
        (BOUND, replace(BOUND, owner="b")),
        (BOUND, replace(BOUND, last=ABORTED)),
        (BOUND, replace(BOUND, epoch=5, fence=1)),
        (BOUND, replace(BOUND, epoch=5, fence=6)),
    ],
)
def test_a_value_that_no_transition_writes_is_a_violation(before: Ownership | None, after: Ownership) -> None:
    """`check` is what the live map holds every write of every process against."""
    with pytest.raises(InvariantViolated):
        check(before, after)


class AnySequenceOfTransitions(RuleBasedStateMachine):
    """Coordinators, workers and nodes writing in any order, some of them twice and late.

    A write is refused or applied; whatever is applied passes `check`, and no outcome is ever rewritten.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = assign("a")
        self.boots = 0
        self.outcomes: dict[str, Outcome] = {}
        self.moves: list[str] = []

    def write(self, after: Ownership) -> None:
        check(self.current, after)
        ended = self.current.move if after.move is None else None
        if ended is not None:
            outcome = after.outcome_of(ended)
            assert outcome is not None, "a lock ends with an outcome"
            assert ended not in self.outcomes, "one end per move"
            assert outcome is Outcome.ABORTED or after.owner == self.current.destination
            self.outcomes[ended] = outcome
        self.current = after

    nodes = st.sampled_from(["a", "b", "c"])

    @rule(destination=nodes)
    def lock(self, destination: str) -> None:
        move = f"m{len(self.moves)}"
        try:
            after = lock(self.current, move=move, destination=destination)
        except NotApplicable:
            assert self.current.move or not self.current.incarnation or destination == self.current.owner
            return
        self.moves.append(move)
        self.write(after)

    @precondition(lambda self: self.moves)
    @rule(late=st.integers(0, 2), stale=st.booleans())
    def commit(self, late: int, stale: bool) -> None:
        move = self.moves[-1 - late % len(self.moves)]
        incarnation = "stale" if stale else self.current.incarnation or "none"
        try:
            after = commit(self.current, move=move, incarnation=incarnation)
        except NotApplicable:
            assert stale or self.current.move != move
            return
        assert not stale
        self.write(after)

    @precondition(lambda self: self.moves)
    @rule(late=st.integers(0, 2))
    def abort(self, late: int) -> None:
        move = self.moves[-1 - late % len(self.moves)]
        try:
            after = abort(self.current, move=move)
        except NotApplicable:
            assert self.current.move != move
            return
        self.write(after)

    @rule(node=nodes)
    def boot(self, node: str) -> None:
        self.boots += 1
        try:
            self.write(boot(self.current, node=node, incarnation=f"{node}-{self.boots}"))
        except NotApplicable:
            assert self.current.owner != node or self.current.incarnation is None

    @rule(node=nodes)
    def bind(self, node: str) -> None:
        self.boots += 1
        try:
            self.write(bind(self.current, node=node, incarnation=f"{node}-{self.boots}"))
        except NotApplicable:
            assert self.current.owner != node or self.current.incarnation is not None

    @rule()
    def failover(self) -> None:
        self.write(failover(self.current, to="a" if self.current.owner == "z" else "z"))

    @invariant()
    def a_locked_unit_has_a_source_to_pause(self) -> None:
        assert self.current.move is None or self.current.incarnation is not None


TestAnySequenceOfTransitions = AnySequenceOfTransitions.TestCase
TestAnySequenceOfTransitions.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
