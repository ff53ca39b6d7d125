"""How a move ends, as far as one read of its unit's map key tells. Pure: values in, a verdict out.

Anyone may end a move at any time: the rollback, the reconciler, the next move of the same unit, an operator. All of
them ask here, so that they cannot disagree.
"""

from __future__ import annotations

from enum import StrEnum

from routing.shard_map import Outcome, Ownership


class Settlement(StrEnum):
    """What the map says of a move, or what has to be written before it says anything."""

    COMMITTED = "committed"  # roll forward, whatever went wrong afterwards
    ABORTED = "aborted"  # the source keeps the unit, or never was asked
    ABORT = "abort"  # still locked: write ABORT
    FENCE = "fence"  # untouched since the move was planned: write the key as it is, or its LOCK may land even now
    REREAD = "reread"  # read at a revision before the one the move was planned on: the read was stale


def settlement(view: Ownership | None, revision: int, *, move: str, lock_revision: int | None) -> Settlement:
    """The verdict on `move`, which was planned to LOCK the key at `lock_revision` (None: it was never launched)."""
    if view is None:
        return Settlement.ABORTED
    outcome = view.outcome_of(move)
    if outcome is not None:
        return Settlement.COMMITTED if outcome is Outcome.COMMITTED else Settlement.ABORTED
    if view.move == move:
        return Settlement.ABORT
    if lock_revision is None or revision > lock_revision:
        return Settlement.ABORTED
    return Settlement.FENCE if revision == lock_revision else Settlement.REREAD
