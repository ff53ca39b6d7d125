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


def judge(view: Ownership, *, node: str, incarnation: str, held: Held | None) -> Verdict:
    """The verdict on a map value. `held` is None when this node does not serve the unit.

    A paused source leaves its pause only through here, never by a timer: at pause epoch + 1 with its own move
    aborted it resumes; at any other epoch somebody may have owned the unit in between.
    """
    if view.owner != node:
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
