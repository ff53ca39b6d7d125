"""Who owns a shard, and the only ways that may change. Pure: no clock, no socket, no random.

    ASSIGN     nobody                 ->  (A, -, 1)                 the coordinator, at the cluster's birth
    LOCK       (A, iA, e, -)          ->  (A, iA, e, m -> B)        the worker, in `pause`
    COMMIT     (A, iA, e, m -> B)     ->  (B, iB, e+1), m committed the source, in `delete`: the commit point
    ABORT      (A, iA, e, m -> B)     ->  (A, iA, e+1), m aborted   anyone
    BOOT       (A, old, e, *)         ->  (A, new, e+1), * aborted  a restarted owner
    BIND       (B, -, e)              ->  (B, iB, e)                the new owner, when nobody has named iB yet
    FAILOVER   (o, *, e, *)           ->  (n, -, e+1), * aborted    the coordinator, after the owner's lease ran out

An actor that is moved by hand becomes a unit of its own, with a key of its own, until it is unpinned and at home again:

    TAKE OUT   its own key            ->  (A, iA, f), f > e         the coordinator; nobody heeds it before the next
    SET APART  shard (A, iA, e, -)    ->  the same, x apart at f    the coordinator: from here on its own key counts
    UNPIN      x (A, iA, k, *)        ->  the same, not pinned      the coordinator; PIN undoes it
    RETIRE     x (A, iA, k, -)        ->  (its shard, -, k+1)       A, when it owns the shard as well; serves x no more
    TAKE BACK  shard (A, iA, e, -)    ->  (A, iA, f), f > e, k+1    A: from here on the shard's key counts again

Each function returns the value to be written by one compare-and-set on the key's revision, or raises
NotApplicable. COMMIT and ABORT of one move start from the same revision, so exactly one of them can happen.

Invariants (checked by tests/unit/test_shard_map.py and by `check`):
  1. The epoch never falls, and grows by one whenever the owner or the outcome of a move changes; TAKE OUT and TAKE BACK
     go above both keys.
  2. A lock names a move and a destination that is not the owner; both or neither are set.
  3. The outcome of a move, once written, is never rewritten.
  4. A lock is taken only from a bound owner, so that there is a source to pause.
  5. `fence` is the epoch of the latest BOOT, FAILOVER, TAKE OUT or TAKE BACK: an owner that did not stop by itself may
     still be appending below it. It survives clean moves, because an actor nobody touched since is still unclaimed.
  6. The epochs at which one actor is owned never fall, whether by its shard's key or by its own: each of the two
     changes begins above both keys, and is a fence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from routing.errors import InvariantViolated, NotApplicable

ITS_SHARD = "_shard"  # owner of an actor that no longer has a key of its own; no node id begins with _
APART_MOST = 256  # actors of one shard: its key stays below NATS' default payload limit


class Outcome(StrEnum):
    COMMITTED = "committed"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True, kw_only=True)
class LastMove:
    """How the latest move of this unit ended, and the epoch that its end began."""

    move: str
    outcome: Outcome
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ownership:
    """The value of one map key. `incarnation` is None until the new owner binds itself."""

    owner: str
    incarnation: str | None
    epoch: int
    move: str | None = None
    destination: str | None = None
    last: LastMove | None = None
    fence: int = 0
    apart: tuple[tuple[str, int], ...] = ()  # of a shard: its actors whose own keys count, and when they were taken out
    taken_out: int = 0  # of an actor: the epoch of TAKE OUT, which tells this time apart from all others
    pinned: bool = False  # of an actor with a key of its own: it stays where it is, wherever its shard goes

    @property
    def retired(self) -> bool:
        """Whether this key of an actor no longer counts, or is about to."""
        return self.owner == ITS_SHARD

    def apart_at(self, actor: str) -> int | None:
        """The epoch at which the actor was taken out of this shard; None while the shard's key says who owns it.

        Its own key counts while it names the same epoch: otherwise it is from an earlier time, or from one that never
        came to be, because nobody set the actor apart after TAKE OUT.
        """
        return dict(self.apart).get(actor)

    def outcome_of(self, move: str) -> Outcome | None:
        """How `move` ended as far as this value tells: None while it is locked or when it is not named."""
        return self.last.outcome if self.last is not None and self.last.move == move else None


def assign(owner: str) -> Ownership:
    """ASSIGN: the first owner of a unit that has none."""
    return Ownership(owner=owner, incarnation=None, epoch=1)


def lock(current: Ownership, *, move: str, destination: str) -> Ownership:
    """LOCK: announce that `move` may take this unit to `destination`."""
    if current.move is not None:
        raise NotApplicable(f"already locked by move {current.move}: wait for it, or cancel its plan")
    if current.incarnation is None:
        raise NotApplicable(f"its owner {current.owner} has not taken it over yet: try again in a moment")
    if destination == current.owner:
        raise NotApplicable(f"{destination} owns it already: nothing to move")
    return replace(current, move=move, destination=destination)


def commit(current: Ownership, *, move: str, incarnation: str, heir: str | None = None) -> Ownership:
    """COMMIT: the source gives the unit to the destination. Only the bound source may.

    `heir` is the incarnation of the destination that has acknowledged what it is to take over: it is bound at once, and
    serves without writing anything. Should it be gone by then, its next life finds another's name there and takes BOOT.
    """
    if current.move != move or current.destination is None:
        raise NotApplicable(f"move {move} holds no lock here: {_ending(current, move)}")
    if current.incarnation != incarnation:
        raise NotApplicable(f"incarnation {incarnation} no longer owns it: only the source may commit")
    epoch = current.epoch + 1
    last = LastMove(move=move, outcome=Outcome.COMMITTED, epoch=epoch)
    return _unlocked(current, owner=current.destination, incarnation=heir, epoch=epoch, last=last)


def abort(current: Ownership, *, move: str) -> Ownership:
    """ABORT: the source keeps the unit. Anyone may."""
    if current.move != move:
        raise NotApplicable(f"move {move} holds no lock here: {_ending(current, move)}")
    epoch = current.epoch + 1
    last = LastMove(move=move, outcome=Outcome.ABORTED, epoch=epoch)
    return _unlocked(current, epoch=epoch, last=last)


def boot(current: Ownership, *, node: str, incarnation: str) -> Ownership:
    """BOOT: a restarted owner takes its unit back from its own earlier life."""
    if current.owner != node or current.incarnation in (None, incarnation):
        raise NotApplicable(f"not left behind by an earlier incarnation of {node}")
    epoch = current.epoch + 1
    return _unlocked(current, incarnation=incarnation, epoch=epoch, last=_aborting(current), fence=epoch)


def bind(current: Ownership, *, node: str, incarnation: str) -> Ownership:
    """BIND: the new owner names the incarnation that serves."""
    if current.owner != node or current.incarnation is not None:
        raise NotApplicable(f"not waiting for {node} to take it over")
    return replace(current, incarnation=incarnation)


def failover(current: Ownership, *, to: str) -> Ownership:
    """FAILOVER: give a dead owner's unit to another node."""
    if to == current.owner:
        raise NotApplicable(f"{to} owns it already")
    if current.retired:
        raise NotApplicable("its shard's owner takes it back")
    epoch = current.epoch + 1
    return _unlocked(current, owner=to, incarnation=None, epoch=epoch, last=_aborting(current), fence=epoch)


def take_out(shard: Ownership, actor: str, known: Ownership | None) -> Ownership:
    """TAKE OUT: what an actor's own key is to say before its shard, whose value is `shard`, names it apart.

    `known` is what the key says now, read before the shard's was.
    """
    if shard.apart_at(actor) is not None:
        raise NotApplicable(f"{actor} has a key of its own already")
    if shard.move is not None:
        raise NotApplicable(f"its shard is locked by move {shard.move}: wait for it, or cancel its plan")
    if shard.incarnation is None:
        raise NotApplicable(f"its owner {shard.owner} has not taken it over yet: try again in a moment")
    if len(shard.apart) >= APART_MOST:
        raise NotApplicable(f"{APART_MOST} actors of its shard are pinned already: unpin one, or move the whole shard")
    epoch = max(shard.epoch, known.epoch if known is not None else 0) + 1
    return Ownership(
        owner=shard.owner, incarnation=shard.incarnation, epoch=epoch, fence=epoch, taken_out=epoch, pinned=True,
        last=known.last if known is not None else None,
    )  # fmt: skip


def set_apart(shard: Ownership, actor: str, own: Ownership) -> Ownership:
    """SET APART: from here on the actor's own key, which says `own` since TAKE OUT, tells who owns it.

    The shard's key is to be at the same revision as for `take_out`.
    """
    return replace(shard, apart=tuple(sorted((*shard.apart, (actor, own.taken_out)))))


def pin(current: Ownership, *, pinned: bool) -> Ownership:
    """PIN, UNPIN: whether an actor with a key of its own stays where it is."""
    if current.retired or current.pinned is pinned:
        raise NotApplicable(f"it is {'pinned' if pinned else 'unpinned'} already")
    return replace(current, pinned=pinned)


def may_retire(current: Ownership, shard: Ownership) -> bool:
    """Whether an actor with a key of its own needs none any more: it is unpinned, at home, and neither moves."""
    home = (shard.owner, shard.incarnation) == (current.owner, current.incarnation)
    return home and not current.pinned and not current.retired and current.move is None and shard.move is None


def retire(current: Ownership, *, incarnation: str) -> Ownership:
    """RETIRE: the owner of an actor gives it back to its shard, and serves it no more. Only the bound owner may."""
    if current.pinned or current.move is not None or current.incarnation != incarnation:
        raise NotApplicable(f"pinned, moving, or not owned by {incarnation}")
    return _unlocked(current, owner=ITS_SHARD, incarnation=None, epoch=current.epoch + 1, last=current.last)


def take_back(shard: Ownership, actor: str, own: Ownership, *, incarnation: str) -> Ownership:
    """TAKE BACK: the shard owns an actor again whose own key, `own`, is retired. Only the shard's bound owner may."""
    if shard.apart_at(actor) != own.taken_out or not own.retired:
        raise NotApplicable(f"{actor} is not waiting to be taken back")
    if shard.move is not None or shard.incarnation != incarnation:
        raise NotApplicable(f"its shard is moving, or not owned by {incarnation}")
    epoch = max(shard.epoch, own.epoch) + 1
    return replace(shard, epoch=epoch, fence=epoch, apart=tuple(one for one in shard.apart if one[0] != actor))


def check(before: Ownership | None, after: Ownership) -> None:
    """Raise InvariantViolated when `after` may not follow `before`, whoever wrote it."""
    if (after.move is None) != (after.destination is None) or after.destination == after.owner:
        raise InvariantViolated(f"lock names {after.move!r} -> {after.destination!r}, owner {after.owner}")
    if before is None or after == before:
        return
    if after.taken_out != before.taken_out or set(after.apart) < set(before.apart):
        if after.epoch <= before.epoch or after.fence != after.epoch:
            raise InvariantViolated(f"an actor changed keys in epoch {after.epoch} after {before.epoch}, not fenced")
        return
    if before.retired:
        raise InvariantViolated("a retired key changes only when its actor is taken out anew")
    if not set(before.apart) <= set(after.apart):
        raise InvariantViolated(f"{before.apart} are apart, then {after.apart}")
    if after.epoch < before.epoch or after.epoch > before.epoch + 1:
        raise InvariantViolated(f"epoch went from {before.epoch} to {after.epoch}")
    if after.owner != before.owner and after.epoch != before.epoch + 1:
        raise InvariantViolated(f"owner went from {before.owner} to {after.owner} within epoch {after.epoch}")
    if after.last != before.last and after.epoch != before.epoch + 1:
        raise InvariantViolated(f"outcome changed within epoch {after.epoch}")
    if not before.fence <= after.fence <= after.epoch:
        raise InvariantViolated(f"fence went from {before.fence} to {after.fence} in epoch {after.epoch}")


def _unlocked(current: Ownership, **changes: Any) -> Ownership:
    """The value with a new epoch, and no lock."""
    return replace(current, move=None, destination=None, **changes)


def _aborting(current: Ownership) -> LastMove | None:
    if current.move is None:
        return current.last
    return LastMove(move=current.move, outcome=Outcome.ABORTED, epoch=current.epoch + 1)


def _ending(current: Ownership, move: str) -> str:
    outcome = current.outcome_of(move)
    return f"it was {outcome}" if outcome else f"epoch is now {current.epoch}"
