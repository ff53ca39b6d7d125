"""What a run leaves to be judged: what every sender saw, and what was found when all had come to rest.

Whoever drives a run, simulated or real, writes one `Operation` for each command and query, gathers the `Evidence` and
hands both to `tests.checker.check.violations`. Nothing here knows how the run was made.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from routing.errors import HandlerFailed, Rejected, Timeout, Unavailable


class Outcome(StrEnum):
    """What the sender was told in the end."""

    ACKNOWLEDGED = "acknowledged"  # a reply
    REJECTED = "rejected"  # Rejected or HandlerFailed: the actor decided "no", and that is in its log
    NOT_APPLIED = "not applied"  # Timeout, Unavailable: it surely changed nothing and never will
    UNKNOWN = "unknown"  # InDoubt, or the sender never heard: both are possible, even now


def outcome_of(error: BaseException | None, *, in_doubt_before: bool = False) -> Outcome:
    """The outcome that an error raised by `Cluster.send_message` stands for; None is a reply.

    `in_doubt_before`: an earlier call under the same message id ended in doubt. "Not applied" then speaks of the latest
    call alone. An error that does not promise that nothing was applied, such as a cancelled wait, counts as unknown.
    """
    match error:
        case None:
            return Outcome.ACKNOWLEDGED
        case Rejected() | HandlerFailed():
            return Outcome.REJECTED
        case Timeout() | Unavailable() if not in_doubt_before:
            return Outcome.NOT_APPLIED
        case _:
            return Outcome.UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One command or query of one sender; retries under the same message id are one operation.

    Times are seconds on one clock that all senders share and that never goes back. Operations are ordered by them only
    where one returned strictly before the other was invoked: a clock that stands still hides errors, it invents none.
    On virtual time it is therefore worth adding a little to each reading.

    Invariants (raised as ValueError): a command names its entry; what never returned has an unknown outcome; nothing
    returns before it was invoked; a session goes with a number from 1 up.
    """

    message_id: str
    actor: str  # "ledger/k3"
    sender: str
    kind: Literal["command", "query"]
    entry: str = ""  # what a command writes: unique in the run
    needs: str = ""  # of `write_after`: the entry without which the actor rejects it. "": it is never rejected
    invoked_s: float
    returned_s: float | None  # None: never
    outcome: Outcome
    reply: Any = None  # command: the position its entry got, from 1 up; query: the entries it saw, in order
    session: str = ""  # "": no session
    number: int = 0  # of a command within its session and actor, from 1 up
    after: int = 0  # of a query in a session: it is answered on a state that has the session's commands up to this one
    linearizable: bool = False

    def __post_init__(self) -> None:
        if self.kind == "command" and not self.entry:
            raise ValueError(f"command {self.message_id} names no entry")
        if self.returned_s is None and self.outcome is not Outcome.UNKNOWN:
            raise ValueError(f"{self.message_id} never returned, so it cannot be {self.outcome}")
        if self.returned_s is not None and self.returned_s < self.invoked_s:
            raise ValueError(f"{self.message_id} returned before it was invoked")
        if self.kind == "command" and bool(self.session) != (self.number > 0):
            raise ValueError(f"{self.message_id} has a session without a number from 1 up, or a number without one")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordEnd:
    """How a move ended: what its record says, and what the map wrote about it."""

    id: str
    unit: str  # "shard.17", or the key of a pinned actor
    status: str  # a MigrationStatus
    outcome: Literal["committed", "aborted"] | None  # None: the map never named the move as ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is found when everything has come to rest."""

    applied: Mapping[str, Sequence[str]]  # actor -> entries in the order of its log; an absent actor has none
    epochs: Mapping[str, Sequence[int]] = field(default_factory=dict)  # actor -> of its log's messages, if watched
    records: Sequence[RecordEnd] = ()  # of every move
    leftovers: Sequence[str] = ()  # in words: a paused unit, a lock, staged state, a buffer, an unfinished task or plan
    quarantined: Collection[str] = ()  # actors whose log lost its end, and which say so: their losses are excused
