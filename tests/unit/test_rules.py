"""The verdicts of a node on the map and on the log, against random histories of the map."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from routing.errors import NotApplicable
from routing.shard_map import LastMove, Outcome, Ownership, abort, assign, bind, boot, commit, failover, lock
from runtime.rules import Held, Standing, Verdict, applies, compare, judge

NODES = ("a", "b", "c")
OWNED = Ownership(owner="a", incarnation="a-1", epoch=4)
LOCKED = replace(OWNED, move="m", destination="b")
ABORTED = abort(LOCKED, move="m")


def verdict(view: Ownership, held: Held | None, *, node: str = "a", incarnation: str = "a-1") -> Verdict:
    return judge(view, node=node, incarnation=incarnation, held=held)


@pytest.mark.parametrize(
    ("view", "held", "expected"),
    [
        (assign("a"), None, Verdict.BIND),
        (replace(OWNED, incarnation="a-0"), None, Verdict.BOOT),
        (OWNED, None, Verdict.OPEN),
        (OWNED, Held(4, None), Verdict.KEEP),
        (LOCKED, Held(4, None), Verdict.KEEP),
        (LOCKED, Held(4, "m"), Verdict.KEEP),
        (ABORTED, Held(4, "m"), Verdict.RESUME),
        (ABORTED, Held(3, "m"), Verdict.RELOAD),
        (ABORTED, Held(4, "n"), Verdict.RELOAD),
        (replace(ABORTED, epoch=7), Held(4, "m"), Verdict.RELOAD),
        (replace(OWNED, owner="b", incarnation="b-1"), Held(4, None), Verdict.NOT_MINE),
        (commit(LOCKED, move="m", incarnation="a-1"), Held(4, "m"), Verdict.NOT_MINE),
        (replace(OWNED, owner="b", incarnation=None), None, Verdict.NOT_MINE),
    ],
)
def test_the_verdict_on_each_kind_of_map_value(view: Ownership, held: Held | None, expected: Verdict) -> None:
    """One row per rule of the protocol."""
    assert verdict(view, held) is expected


def test_a_unit_that_came_back_is_loaded_again() -> None:
    """A to B to A while A was paused: the epoch is two further, and somebody else may have written [T14, T15]."""
    away = bind(commit(LOCKED, move="m", incarnation="a-1"), node="b", incarnation="b-1")
    back = commit(lock(away, move="n", destination="a"), move="n", incarnation="b-1")

    assert verdict(back, Held(4, "m")) in {Verdict.BIND, Verdict.RELOAD}
    assert verdict(bind(back, node="a", incarnation="a-1"), Held(4, "m")) is Verdict.RELOAD


def test_a_fail_over_to_the_next_epoch_is_no_abort_of_ones_own() -> None:
    """Epoch + 1 alone does not open the gate: the last outcome must name this very move as aborted."""
    failed_over = bind(failover(replace(LOCKED, owner="b", destination="a"), to="a"), node="a", incarnation="a-1")

    assert verdict(replace(failed_over, last=None), Held(4, "m")) is not Verdict.RESUME
    committed = replace(failed_over, last=LastMove(move="m", outcome=Outcome.COMMITTED, epoch=5))
    assert verdict(committed, Held(4, "m")) is not Verdict.RESUME


class AnyHistoryOfTheMap(RuleBasedStateMachine):
    """Several nodes boot, move, fail over; every incarnation that ever lived judges every value.

    Safety: whatever it holds, no incarnation opens, keeps or resumes what the map says belongs to another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.view = assign("a")
        self.boots = 0
        self.living = {node: f"{node}-0" for node in NODES}
        self.everyone = {(node, name) for node, name in self.living.items()}
        self.moves: list[str] = []

    def attempt(self, transition: object, *args: object, **kwargs: object) -> None:
        assert callable(transition)
        try:
            self.view = transition(self.view, *args, **kwargs)
        except NotApplicable:
            return

    @initialize(node=st.sampled_from(NODES))
    def born(self, node: str) -> None:
        self.view = assign(node)

    @rule(node=st.sampled_from(NODES))
    def restart(self, node: str) -> None:
        self.boots += 1
        self.living[node] = f"{node}-{self.boots}"
        self.everyone.add((node, self.living[node]))

    @rule(node=st.sampled_from(NODES))
    def boots_or_binds(self, node: str) -> None:
        self.attempt(bind, node=node, incarnation=self.living[node])
        self.attempt(boot, node=node, incarnation=self.living[node])

    @rule(destination=st.sampled_from(NODES))
    def locks(self, destination: str) -> None:
        self.moves.append(f"m{len(self.moves)}")
        self.attempt(lock, move=self.moves[-1], destination=destination)

    @rule(node=st.sampled_from(NODES), late=st.integers(0, 2))
    def commits(self, node: str, late: int) -> None:
        if self.moves:
            self.attempt(commit, move=self.moves[-1 - late % len(self.moves)], incarnation=self.living[node])

    @rule(late=st.integers(0, 2))
    def aborts(self, late: int) -> None:
        if self.moves:
            self.attempt(abort, move=self.moves[-1 - late % len(self.moves)])

    @rule(node=st.sampled_from(NODES))
    def fails_over(self, node: str) -> None:
        self.attempt(failover, to=node)

    @invariant()
    def nobody_serves_what_is_anothers(self) -> None:
        view = self.view
        for node, incarnation in self.everyone:
            mine = (view.owner, view.incarnation) == (node, incarnation)
            for epoch in range(max(1, view.epoch - 2), view.epoch + 1):
                for paused_for in (None, *self.moves[-3:]):
                    held = Held(epoch, paused_for)
                    said = judge(view, node=node, incarnation=incarnation, held=held)
                    aborted_next = (
                        mine
                        and view.last is not None
                        and view.last.outcome is Outcome.ABORTED
                        and epoch + 1 == view.last.epoch == view.epoch
                    )
                    # An open unit whose lock was aborted before any pause goes on too: nobody owned it in between.
                    resumes = aborted_next and paused_for in {None, view.last and view.last.move}
                    assert (said is Verdict.RESUME) == resumes, held
                    if not mine:
                        assert said in {Verdict.NOT_MINE, Verdict.BIND, Verdict.BOOT}, held
                    elif epoch == view.epoch:
                        assert said is Verdict.KEEP, held
                    else:
                        assert said in {Verdict.RESUME, Verdict.RELOAD}, held
            without = judge(view, node=node, incarnation=incarnation, held=None)
            if view.owner != node:
                assert without is Verdict.NOT_MINE
            elif view.incarnation is None:
                assert without is Verdict.BIND
            else:
                assert without is (Verdict.OPEN if mine else Verdict.BOOT)


TestAnyHistoryOfTheMap = AnyHistoryOfTheMap.TestCase
TestAnyHistoryOfTheMap.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)

NUMBERS = st.integers(0, 5)


@given(NUMBERS, st.integers(1, 5), NUMBERS, NUMBERS)
def test_what_is_held_is_compared_with_the_end_of_the_log(
    held_version: int, held_epoch: int, tail_version: int, tail_epoch: int
) -> None:
    """Equal: go on. Longer: replay. A higher epoch wrote: stop. Shorter: acknowledged events are gone [J]."""
    standing = compare(
        held_version=held_version, held_epoch=held_epoch, tail_version=tail_version, tail_epoch=tail_epoch
    )

    if tail_version < held_version:
        assert standing in {Standing.SHORTER, Standing.FENCED}
        assert tail_epoch > held_epoch or standing is Standing.SHORTER
    elif tail_epoch > held_epoch:
        assert standing is Standing.FENCED
    else:
        assert standing is (Standing.CURRENT if tail_version == held_version else Standing.BEHIND)


def test_an_empty_log_is_current_only_for_who_holds_nothing() -> None:
    """(0, 0) stands for no log: whoever holds a version saw events that are gone."""
    assert compare(held_version=0, held_epoch=3, tail_version=0, tail_epoch=0) is Standing.CURRENT
    assert compare(held_version=1, held_epoch=3, tail_version=0, tail_epoch=0) is Standing.SHORTER


@given(
    st.sampled_from(["m", "n"]), st.integers(3, 5), st.sampled_from(["a", "b"]), st.sampled_from(["a-1", "a-2", "b-1"])
)
def test_a_step_acts_only_on_the_move_epoch_and_incarnation_it_was_planned_for(
    move: str, epoch: int, node: str, incarnation: str
) -> None:
    """`map.move == m`, owner, incarnation and epoch, all of them: Celery runs steps twice, late, and days later."""
    exact = (move, epoch, node, incarnation) == ("m", 4, "a", "a-1")

    assert applies(LOCKED, move=move, epoch=epoch, node=node, incarnation=incarnation) is exact
    assert not applies(OWNED, move=move, epoch=epoch, node=node, incarnation=incarnation)
