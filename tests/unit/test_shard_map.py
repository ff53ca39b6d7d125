"""The shard map's transitions: each one by itself, and any sequence of them against the invariants."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from routing.errors import InvariantViolated, NotApplicable
from routing.shard_map import (
    APART_MOST,
    ITS_SHARD,
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
    may_retire,
    pin,
    retire,
    set_apart,
    take_back,
    take_out,
)
from runtime.rules import must_claim

UNBOUND = Ownership(owner="a", incarnation=None, epoch=4, fence=2)
BOUND = replace(UNBOUND, incarnation="a-1")
LOCKED = replace(BOUND, move="m", destination="b")
COMMITTED = LastMove(move="m", outcome=Outcome.COMMITTED, epoch=5)
ABORTED = LastMove(move="m", outcome=Outcome.ABORTED, epoch=5)

X = "cart/x"
MATES = (("cart/w", 2), ("cart/y", 3))
APART = replace(BOUND, apart=((X, 7),))  # a shard whose actor x has a key of its own
OWN = Ownership(owner="a", incarnation="a-1", epoch=7, fence=7, taken_out=7, pinned=True)
LOOSE = replace(OWN, pinned=False)
RETIRED = Ownership(owner=ITS_SHARD, incarnation=None, epoch=8, fence=7, taken_out=7)


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


# -- an actor with a key of its own ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("known", "epoch"),
    [(None, 5), (replace(RETIRED, epoch=3, fence=3), 5), (RETIRED, 9), (replace(OWN, epoch=4, fence=4), 5), (OWN, 8)],
)
def test_an_actors_own_key_begins_with_its_shards_owner_above_both_keys(known: Ownership | None, epoch: int) -> None:
    """TAKE OUT: pinned, and fenced, because the shard's owner may be appending to the actor's log below it."""
    after = take_out(BOUND, X, known)

    assert after == Ownership(owner="a", incarnation="a-1", epoch=epoch, fence=epoch, taken_out=epoch, pinned=True)
    check(known, after)


def test_an_actors_own_key_remembers_how_its_last_move_ended() -> None:
    """A worker that comes late still learns the outcome of a move from before the actor was back in its shard."""
    assert take_out(BOUND, X, replace(RETIRED, last=COMMITTED)).outcome_of("m") is Outcome.COMMITTED
    assert take_out(replace(BOUND, epoch=5, last=COMMITTED), X, None).last is None


def test_a_shard_names_its_actors_apart_in_order_and_stays_as_it_is() -> None:
    """SET APART: the shard's own owner has lost nothing that it could still be doing wrong."""
    after = set_apart(replace(BOUND, apart=MATES), X, OWN)

    assert after == replace(BOUND, apart=(("cart/w", 2), (X, 7), ("cart/y", 3)))
    assert (after.apart_at(X), BOUND.apart_at(X)) == (7, None)
    check(replace(BOUND, apart=MATES), after)


def test_pinning_and_unpinning_change_nothing_else() -> None:
    """Not even a lock: a move that is under way goes on."""
    locked = lock(OWN, move="m", destination="b")

    assert pin(locked, pinned=False) == replace(locked, pinned=False)
    assert pin(pin(locked, pinned=False), pinned=True) == locked
    check(locked, pin(locked, pinned=False))


def test_a_retired_key_is_owned_by_nobody_and_keeps_the_last_outcome() -> None:
    """RETIRE: whoever served the actor does so no more, and the shard's owner does not yet."""
    after = retire(replace(LOOSE, last=COMMITTED), incarnation="a-1")

    assert after == replace(RETIRED, last=COMMITTED)
    assert (after.retired, LOOSE.retired) == (True, False)
    check(replace(LOOSE, last=COMMITTED), after)


@pytest.mark.parametrize(("own_epoch", "epoch"), [(2, 5), (4, 5), (8, 9)])
def test_a_shard_takes_an_actor_back_above_both_keys(own_epoch: int, epoch: int) -> None:
    """TAKE BACK: fenced as well; the others stay apart."""
    shard = replace(BOUND, apart=(*MATES, (X, 7)))

    after = take_back(shard, X, replace(RETIRED, epoch=own_epoch, fence=1), incarnation="a-1")

    assert after == replace(BOUND, epoch=epoch, fence=epoch, apart=MATES)
    check(shard, after)


@pytest.mark.parametrize(
    ("own", "shard", "may"),
    [
        (LOOSE, APART, True),
        (OWN, APART, False),  # pinned
        (LOOSE, replace(APART, owner="b"), False),  # away
        (LOOSE, replace(APART, incarnation="a-2"), False),  # its owner was restarted, and has one of the two back
        (LOOSE, replace(APART, incarnation=None), False),
        (lock(LOOSE, move="m", destination="b"), APART, False),
        (LOOSE, lock(APART, move="m", destination="b"), False),
        (RETIRED, APART, False),  # done already
    ],
)
def test_an_actor_needs_no_key_once_it_is_unpinned_at_home_and_at_rest(
    own: Ownership, shard: Ownership, may: bool
) -> None:
    """One and the same life of one node holds both, and neither is about to leave."""
    assert may_retire(own, shard) is may


def test_an_actors_own_key_and_its_shards_are_moved_like_any_other() -> None:
    """COMMIT, ABORT, BOOT and FAILOVER keep who is apart, and who is pinned."""
    for before in (APART, OWN):
        locked = lock(before, move="m", destination="b")
        for after in (
            commit(locked, move="m", incarnation="a-1"),
            abort(locked, move="m"),
            boot(locked, node="a", incarnation="a-2"),
            failover(locked, to="c"),
        ):
            assert (after.apart, after.pinned, after.taken_out) == (before.apart, before.pinned, before.taken_out)
            check(locked, after)


@pytest.mark.parametrize(
    ("transition", "says"),
    [
        (lambda: take_out(APART, X, None), "has a key of its own already"),
        (lambda: take_out(LOCKED, X, None), "its shard is locked by move m"),
        (lambda: take_out(UNBOUND, X, None), "has not taken it over yet"),
        (
            lambda: take_out(replace(BOUND, apart=tuple((f"cart/{n}", 2) for n in range(APART_MOST))), X, None),
            f"{APART_MOST} actors of its shard are pinned already",
        ),
        (lambda: pin(OWN, pinned=True), "pinned already"),
        (lambda: pin(LOOSE, pinned=False), "unpinned already"),
        (lambda: pin(RETIRED, pinned=True), "pinned already"),
        (lambda: retire(OWN, incarnation="a-1"), "pinned"),
        (lambda: retire(replace(LOOSE, move="m", destination="b"), incarnation="a-1"), "moving"),
        (lambda: retire(LOOSE, incarnation="a-0"), "not owned by a-0"),
        (lambda: take_back(APART, X, LOOSE, incarnation="a-1"), "not waiting to be taken back"),
        (lambda: take_back(BOUND, X, RETIRED, incarnation="a-1"), "not waiting to be taken back"),
        (lambda: take_back(APART, X, replace(RETIRED, taken_out=6), incarnation="a-1"), "not waiting to be taken back"),
        (lambda: take_back(lock(APART, move="m", destination="b"), X, RETIRED, incarnation="a-1"), "is moving"),
        (lambda: take_back(APART, X, RETIRED, incarnation="a-2"), "not owned by a-2"),
        (lambda: failover(RETIRED, to="b"), "its shard's owner takes it back"),
        (lambda: lock(RETIRED, move="m", destination="b"), "has not taken it over yet"),
        (lambda: boot(RETIRED, node="a", incarnation="a-2"), "not left behind"),
        (lambda: bind(RETIRED, node="a", incarnation="a-1"), "not waiting"),
    ],
)
def test_what_the_map_does_not_allow_of_an_actor_is_refused_with_a_reason(transition: object, says: str) -> None:
    """A key that does not count, or is about to, is nobody's to move."""
    assert callable(transition)
    with pytest.raises(NotApplicable, match=says):
        transition()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (APART, BOUND),  # out of `apart` at the same epoch
        (APART, replace(BOUND, epoch=5)),  # without a fence
        (APART, replace(BOUND, epoch=9, fence=8)),
        (APART, replace(BOUND, epoch=3, fence=3)),
        (APART, replace(APART, apart=(("cart/y", 3),))),  # one leaves while another comes
        (APART, replace(APART, apart=(("cart/y", 3),), epoch=5, fence=5)),
        (APART, replace(APART, epoch=9, fence=9)),  # a leap, and nobody changed keys
        (RETIRED, replace(OWN, epoch=8, fence=8)),
        (RETIRED, replace(OWN, epoch=7)),
        (RETIRED, replace(OWN, epoch=9, fence=8)),
        (RETIRED, replace(RETIRED, epoch=9)),
    ],
)
def test_an_actor_changes_keys_only_at_a_fence_above_both(before: Ownership, after: Ownership) -> None:
    """Otherwise the owner by the one key could go on appending where the owner by the other has begun."""
    with pytest.raises(InvariantViolated):
        check(before, after)


def test_an_actor_can_be_taken_out_however_long_ago_the_first_try_was_given_up() -> None:
    """A coordinator died between TAKE OUT and SET APART; the shard has had new owners since."""
    left_behind = take_out(BOUND, X, None)
    shard = bind(failover(failover(BOUND, to="c"), to="d"), node="d", incarnation="d-1")

    after = take_out(shard, X, left_behind)

    check(left_behind, after)
    assert (after.owner, after.epoch, after.fence) == ("d", 7, 7)


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


@dataclass
class Desk:
    """A coordinator that takes the actor out: what it has read, the actor's key first, and whether that is written."""

    own: Ownership | None
    own_revision: int
    shard: Ownership
    shard_revision: int
    taken_out: Ownership | None = None


class AnActorAndItsShard(RuleBasedStateMachine):
    """The keys of a shard and of one of its actors, written in any order by everybody there is.

    Coordinators are slow, and overtake each other: each of their writes is a compare-and-set on what they have read.
    Whatever is applied passes `check`; the actor is owned at epochs that never fall, by one node at each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shard = bind(assign("a"), node="a", incarnation="a-0")
        self.own: Ownership | None = None
        self.revisions = {"shard": 1, "own": 0}
        self.highest = 1  # epoch of both keys so far
        self.owned = [1]  # the epochs at which the actor was owned, in order
        self.owners: dict[int, str] = {1: "a"}
        self.lives = self.moves = 0
        self.desks = [Desk(None, 0, self.shard, 1) for _ in range(2)]

    @property
    def apart(self) -> bool:
        return self.shard.apart_at(X) is not None

    @property
    def counted(self) -> Ownership:
        """The value that says who owns the actor."""
        if not self.apart:
            return self.shard
        assert self.own is not None
        return self.own

    def write(self, key: str, after: Ownership) -> None:
        """Apply one write to the key "own" or "shard"."""
        was_apart = self.apart
        if key == "own":
            check(self.own, after)
            self.own = after
        else:
            check(self.shard, after)
            self.shard = after
        self.revisions[key] += 1
        if self.apart is not was_apart:
            begun = self.counted.epoch
            assert self.counted.fence == begun
            assert begun > (self.highest if key == "shard" and was_apart else self.owned[-1])
        if not self.counted.retired:
            assert self.owners.setdefault(self.counted.epoch, self.counted.owner) == self.counted.owner
        self.owned.append(self.counted.epoch)
        self.highest = max(self.highest, after.epoch)

    nodes = st.sampled_from(["a", "b", "c"])
    keys = st.sampled_from(["shard", "own"])

    def value(self, key: str) -> Ownership | None:
        """What a key says; nobody but a coordinator that takes the actor out cares for one that does not count."""
        if key == "shard":
            return self.shard
        return self.own if self.apart else None

    def attempt(self, key: str, change: Callable[[Ownership], Ownership]) -> None:
        """Write what `change` makes of a key's value, unless that is refused."""
        if (view := self.value(key)) is not None:
            with contextlib.suppress(NotApplicable):
                self.write(key, change(view))

    @rule(key=keys, destination=nodes)
    def lock(self, key: str, destination: str) -> None:
        self.moves += 1
        self.attempt(key, lambda view: lock(view, move=f"m{self.moves}", destination=destination))

    @rule(key=keys, bound=st.booleans())
    def commit(self, key: str, bound: bool) -> None:
        self.attempt(
            key,
            lambda view: commit(
                view,
                move=str(view.move),
                incarnation=str(view.incarnation),
                heir=f"{view.destination}-0" if bound else None,
            ),
        )

    @rule(key=keys)
    def abort(self, key: str) -> None:
        self.attempt(key, lambda view: abort(view, move=str(view.move)))

    @rule(key=keys)
    def bind(self, key: str) -> None:
        if (view := self.value(key)) is not None and not view.retired:  # no node is called that
            self.attempt(key, lambda view: bind(view, node=view.owner, incarnation=f"{view.owner}-0"))

    @rule(key=keys, times=st.integers(1, 4))
    def boot(self, key: str, times: int) -> None:
        for _ in range(times):
            self.lives += 1
            self.attempt(key, lambda view: boot(view, node=view.owner, incarnation=f"{view.owner}-{self.lives}"))

    @rule(key=keys, to=nodes)
    def failover(self, key: str, to: str) -> None:
        self.attempt(key, lambda view: failover(view, to=to))

    @rule(pinned=st.booleans())
    def pin(self, pinned: bool) -> None:
        self.attempt("own", lambda view: pin(view, pinned=pinned))

    @rule()
    def retire(self) -> None:
        """By whoever owns it, and wherever its shard is gone in the meantime."""
        self.attempt("own", lambda view: retire(view, incarnation=str(view.incarnation)))

    @rule()
    def take_back(self) -> None:
        own = self.own
        if own is not None:
            self.attempt("shard", lambda view: take_back(view, X, own, incarnation=str(view.incarnation)))

    @precondition(lambda self: not self.apart)
    @rule(desk=st.integers(0, 1))
    def read(self, desk: int) -> None:
        self.desks[desk] = Desk(self.own, self.revisions["own"], self.shard, self.revisions["shard"])

    @rule(desk=st.integers(0, 1))
    def take_out(self, desk: int) -> None:
        at = self.desks[desk]
        if at.own_revision == self.revisions["own"]:
            with contextlib.suppress(NotApplicable):
                at.taken_out = take_out(at.shard, X, at.own)
                self.write("own", at.taken_out)

    @rule(desk=st.integers(0, 1))
    def set_apart(self, desk: int) -> None:
        at = self.desks[desk]
        if at.taken_out is not None and at.shard_revision == self.revisions["shard"]:
            self.write("shard", set_apart(at.shard, X, at.taken_out))

    # What is most often done in a row, for any order at all would seldom get far.
    @precondition(lambda self: not self.apart)
    @rule()
    def pin_undisturbed(self) -> None:
        for act in (self.read, self.take_out, self.set_apart):
            act(0)

    @rule(key=keys, destination=nodes)
    def move_undisturbed(self, key: str, destination: str) -> None:
        self.bind(key)
        self.lock(key, destination)
        self.commit(key, bound=True)

    @precondition(lambda self: self.apart)
    @rule(restarts=st.integers(0, 4))
    def unpin_undisturbed(self, restarts: int) -> None:
        self.bind("own")
        self.bind("shard")
        self.boot("shard", restarts)
        self.pin(pinned=False)
        self.retire()
        self.take_back()

    @invariant()
    def the_epochs_at_which_the_actor_is_owned_never_fall(self) -> None:
        assert self.owned == sorted(self.owned)


TestAnActorAndItsShard = AnActorAndItsShard.TestCase
TestAnActorAndItsShard.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
