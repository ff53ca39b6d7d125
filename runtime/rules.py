"""What a node does when the map or the log tells it something. Pure: values in, a verdict out.

The model and the simulation explore exactly these functions; nothing here reads a clock, a socket or chance.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from routing.shard_map import Outcome, Ownership


class Verdict(StrEnum):
    """What the map's value means for this incarnation of this node."""

    NOT_MINE = "not mine"  # drop what is held, forward what waits
    BIND = "bind"  # it was given to this node: name the incarnation that serves
    BOOT = "boot"  # an earlier life of this node left it behind: take it back, fenced
    OPEN = "open"  # bound to this incarnation, but not held here: serve from the log or from what was staged
    KEEP = "keep"  # nothing changed for the holder
    RESUME = "resume"  # a move ended without a change of owner, and nobody owned it in between
    RELOAD = "reload"  # mine, but somebody may have owned it in between: forget, claim, serve from the log


@dataclass(frozen=True, slots=True)
class Held:
    """What this node holds of a unit: the epoch it serves at, and the move it is paused for, if any."""

    epoch: int
    paused_for: str | None


def judge(view: Ownership, *, node: str, incarnation: str, held: Held | None, counts: bool = True) -> Verdict:
    """The verdict on a map value. `held` is None when this node does not serve the unit; `counts` is False for the own
    key of an actor that its shard owns.

    A paused source leaves its pause only through here, never by a timer: at pause epoch + 1 with its own move
    aborted it resumes; at any other epoch somebody may have owned the unit in between.
    """
    if view.owner != node or not counts:
        return Verdict.NOT_MINE
    if view.incarnation is None:
        return Verdict.BIND
    if view.incarnation != incarnation:
        return Verdict.BOOT
    if held is None:
        return Verdict.OPEN
    if view.epoch == held.epoch:
        return Verdict.KEEP
    last = view.last
    aborted = last is not None and last.outcome is Outcome.ABORTED and last.epoch == view.epoch
    same_move = held.paused_for is None or (last is not None and last.move == held.paused_for)
    if view.epoch == held.epoch + 1 and aborted and same_move:
        return Verdict.RESUME
    return Verdict.RELOAD


class Standing(StrEnum):
    """How what a node holds of an actor compares with the end of its log."""

    CURRENT = "current"  # same sequence: what is held is the truth
    BEHIND = "behind"  # the log went on: replay
    FENCED = "fenced"  # the log holds a higher epoch: somebody else owns it now, stop
    SHORTER = "shorter"  # the log lost what was acknowledged: quarantine


def compare(*, held_version: int, held_epoch: int, tail_version: int, tail_epoch: int) -> Standing:
    """Compare a held version, at the epoch this node serves with, to the log's last message (0, 0: no log)."""
    if tail_epoch > held_epoch:
        return Standing.FENCED
    if tail_version < held_version:
        return Standing.SHORTER
    return Standing.CURRENT if tail_version == held_version else Standing.BEHIND


def applies(view: Ownership, *, move: str, epoch: int, node: str, incarnation: str) -> bool:
    """Whether a step of `move`, planned at `epoch`, may still act on this source."""
    return view.move == move and view.epoch == epoch and view.owner == node and view.incarnation == incarnation


def must_claim(*, tail_epoch: int, fence: int) -> bool:
    """Whether an actor whose log ends at `tail_epoch` (0: no log) must be claimed before it serves anything.

    `fence` is the epoch of the latest change that an earlier owner took no part in: it may still be appending below.
    """
    return tail_epoch < fence


def overdue(
    *, now_s: float, lease_s: float, paused: tuple[str, float] | None, locked: tuple[str, float] | None
) -> str | None:
    """The move that a source has to abort by itself, if any, because nobody drives it on.

    `paused` is (move, end of its pause lease); `locked` is (move, since when its lock is known here) while no pause
    has followed the lock. Times are seconds on the node's clock.
    """
    if paused is not None:
        move, until_s = paused
        return move if now_s > until_s else None
    if locked is not None:
        move, since_s = locked
        return move if now_s - since_s > lease_s else None
    return None


class Admission(StrEnum):
    """What a numbered command of a sender session is to an actor."""

    NEXT = "next"  # exactly the number after the last one: decide it
    SEEN = "seen"  # decided before: the same reply again
    GAP = "gap"  # an earlier one is missing: the sender goes back to it
    EXPIRED = "expired"  # of a session that may have been forgotten here: never decide it a second time


def admit(number: int, *, last: int | None, opened: int, floor: int) -> Admission:
    """Judge command `number` of a session that was opened at `opened`.

    `last` is the latest number this actor has decided for the session, None when it knows no such session. `floor` is
    the highest `opened` of all sessions the actor has forgotten: an unknown one at or below may be one of those. Both
    derive from the log, so the verdict holds only at its end.
    """
    if last is None:
        if opened <= floor:
            return Admission.EXPIRED
        last = 0
    if number <= last:
        return Admission.SEEN
    return Admission.NEXT if number == last + 1 else Admission.GAP
