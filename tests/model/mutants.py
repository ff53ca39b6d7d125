"""The protocol with one rule switched off. Each mutant must be found; one that survives is a rule nobody needs.

A rule that is a pure function is replaced by a function that breaks it; a rule that lives in effectful code is named in
tests/model/world.py. T1 to T15 are the failures that docs/protocol.md names, S1 to S3 those of its simulation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from routing import shard_map
from routing.shard_map import Ownership
from runtime import rules
from runtime.rules import Admission, Held, Standing, Verdict
from tests.model.scopes import ONE, TWO, TWO_SENDERS, scope
from tests.model.state import Scope
from tests.model.world import Without
from workflows import settlement
from workflows.settlement import Settlement

# The originals, because a mutant stands in their place in their modules.
_judge, _compare, _overdue, _admit = rules.judge, rules.compare, rules.overdue, rules.admit
_commit, _failover, _settlement = shard_map.commit, shard_map.failover, settlement.settlement


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """What is switched off, why that is bad, and a scope that is large enough to show it."""

    name: str
    what: str
    scope: Scope
    replaces: tuple[tuple[ModuleType, str, Callable[..., Any]], ...] = ()
    without: frozenset[Without] = frozenset()


def never_claim(*, tail_epoch: int, fence: int) -> bool:
    return False


def never_fenced(**held_and_tail: int) -> Standing:
    standing = _compare(**held_and_tail)
    return Standing.BEHIND if standing is Standing.FENCED else standing


def opens_what_an_earlier_life_left(view: Ownership, *, node: str, incarnation: str, held: Held | None) -> Verdict:
    verdict = _judge(view, node=node, incarnation=incarnation, held=held)
    return Verdict.OPEN if verdict is Verdict.BOOT else verdict


def resumes_when_it_is_the_owner(view: Ownership, *, node: str, incarnation: str, held: Held | None) -> Verdict:
    if view.owner == node and held is not None:
        return Verdict.KEEP if view.epoch == held.epoch else Verdict.RESUME
    return _judge(view, node=node, incarnation=incarnation, held=held)


def never_gives_up_a_pause(**times: Any) -> str | None:
    return None if times["paused"] else _overdue(**times)


def never_gives_up_a_lock(**times: Any) -> str | None:
    return _overdue(**times) if times["paused"] else None


def any_number(number: int, *, last: int | None, opened: int, floor: int) -> Admission:
    """A window of numbers without their order: what has not been decided is decided now."""
    return Admission.SEEN if number == last else Admission.NEXT


def any_higher_number(number: int, *, last: int | None, opened: int, floor: int) -> Admission:
    """What the buffer had no room for is passed over."""
    verdict = _admit(number, last=last, opened=opened, floor=floor)
    return Admission.NEXT if verdict is Admission.GAP else verdict


def sessions_never_expire(number: int, *, last: int | None, opened: int, floor: int) -> Admission:
    return _admit(number, last=last, opened=opened, floor=0)


def always_applies(view: Ownership, **planned: Any) -> bool:
    return True


def ends_without_fencing(view: Ownership | None, revision: int, **move: Any) -> Settlement:
    verdict = _settlement(view, revision, **move)
    return Settlement.ABORTED if verdict is Settlement.FENCE else verdict


def believes_stale_reads(view: Ownership | None, revision: int, **move: Any) -> Settlement:
    verdict = _settlement(view, revision, **move)
    return Settlement.ABORTED if verdict is Settlement.REREAD else verdict


def forgets_the_fence(current: Ownership, **move: Any) -> Ownership:
    return replace(_commit(current, **move), fence=0)


def fails_over_without_a_fence(current: Ownership, *, to: str) -> Ownership:
    return replace(_failover(current, to=to), fence=current.fence)


def checks_nothing(before: Ownership | None, after: Ownership) -> None:
    return None


Broken = Without | tuple[ModuleType, Callable[..., Any], str]


def _mutant(name: str, what: str, scope: Scope, *broken: Broken) -> Mutant:
    return Mutant(
        name=name, what=what, scope=scope,
        replaces=tuple((b[0], b[2], b[1]) for b in broken if not isinstance(b, Without)),
        without=frozenset(b for b in broken if isinstance(b, Without)),
    )  # fmt: skip


MUTANTS: tuple[Mutant, ...] = (
    _mutant("T1", "a new owner claims nothing", scope(TWO, failovers=1), (rules, never_claim, "must_claim")),
    _mutant("T2", "a refused append is repeated whatever epoch is in the log", scope(TWO, failovers=1, timeouts=1),
            (rules, never_fenced, "compare")),
    _mutant("T3", "what was decided is remembered in memory only", scope(TWO, failovers=1), Without.LOGGED_ANSWERS),
    _mutant("T4", "an append without an answer is sent again as it was", scope(ONE, timeouts=1),
            Without.EVALUATING_AGAIN),
    _mutant("T5", "the source commits in memory, the worker writes the map", scope(TWO, moves=1),
            Without.COMMIT_IN_THE_MAP),
    _mutant("T6", "a paused source waits to be told", scope(ONE, moves=1), Without.LOOKING_AT_THE_MAP),
    _mutant("T6b", "a source never gives up a pause", scope(ONE, moves=1, losses=1),
            (rules, never_gives_up_a_pause, "overdue")),
    _mutant("T7", "a restarted node opens what its earlier life held", scope(TWO, stops=1),
            (rules, opens_what_an_earlier_life_left, "judge")),
    _mutant("T8", "the next move does not finish the record of the last", scope(ONE, moves=2),
            Without.SETTLING_THE_PREVIOUS),
    _mutant("T9", "commands of a session in any order", scope(TWO), (rules, any_number, "admit")),
    _mutant("T10", "commands that found no room are passed over", scope(TWO), (rules, any_higher_number, "admit")),
    _mutant("T11", "a rejection is not logged, and a duplicate comes late", scope(TWO_SENDERS, conditional=True),
            Without.LOGGED_REJECTIONS),
    _mutant("T12", "a former owner rejects on a stale state", scope((*TWO_SENDERS, (3, 1)), conditional=True,
            duplicates=False, failovers=1), Without.LOGGED_REJECTIONS),
    _mutant("T13", "the source resumes on a timer", scope(TWO, moves=1), Without.PAUSE_UNTIL_THE_MAP),
    _mutant("T14", "a source resumes whenever the map names it", scope(TWO, moves=1, failovers=2),
            (rules, resumes_when_it_is_the_owner, "judge")),
    _mutant("T14b", "a unit that comes back is served from memory", scope(TWO, moves=2), Without.FORGETTING),
    _mutant("T15", "an owner that missed something answers 'gap' from memory", scope(TWO, moves=2, queries=False),
            Without.FORGETTING, Without.READING_BEFORE_GAP),
    _mutant("S1", "a source never gives up a lock that no pause follows", scope(ONE, moves=1, losses=1),
            (rules, never_gives_up_a_lock, "overdue")),
    _mutant("S2", "a move ends while its LOCK is still under way", scope(ONE, moves=1, timeouts=1),
            (settlement, ends_without_fencing, "settlement")),
    _mutant("S3", "a stale read ends a move", scope(ONE, moves=1, failovers=1, stale_reads=1),
            (settlement, believes_stale_reads, "settlement")),
    _mutant("S4", "a move is ended by who read its record before it was launched", scope(ONE, moves=1, slow_settlers=1),
            Without.CONCLUDING_ANEW),
    _mutant("late pause", "a source pauses for any move it is asked to", scope(ONE, moves=1),
            (rules, always_applies, "applies")),
    _mutant("late session", "a forgotten session starts anew", scope(TWO_SENDERS, sessions=1),
            (rules, sessions_never_expire, "admit")),
    _mutant("no fence", "a fail-over leaves no duty to claim", scope(TWO, failovers=1),
            (shard_map, fails_over_without_a_fence, "failover")),
    _mutant("lost fence", "a clean move forgets the duty to claim", scope(ONE, stops=1, moves=1),
            (shard_map, forgets_the_fence, "commit"), (shard_map, checks_nothing, "check")),
    _mutant("checked fence", "the map's own check sees a fence that is forgotten", scope(ONE, failovers=1, moves=1),
            (shard_map, forgets_the_fence, "commit")),
)  # fmt: skip
