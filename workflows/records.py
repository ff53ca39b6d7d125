"""What is written down about moves and plans, and how a move's status may change. Pure: `now` is passed in.

    MigrationPlan  1 ── n  Move  1 ── n  ActorRow          stored
                           └── ActorMigration ──┘          derived: one move joined with one of its rows

The unit of work is a `Move`: one shard, or one pinned actor, taken from a source to a destination by a Celery chain,
which small moves may share. Each live actor of it has an `ActorRow`. A step over a shard of forty actors then costs one
compare-and-set write, not forty (docs/decisions/0001-moves-carry-records.md). Records report; they never decide who
owns a shard, the map does.

Times are Unix seconds, durations name their unit, sizes are bytes. None means "not known yet".
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, TypeVar, get_args

import msgspec

from routing import jsonlike
from routing.address import ActorId
from routing.errors import InvalidInput, NotApplicable
from routing.typed import UNREADABLE, Count, Measure, Text, fault

STEPS = ("pause", "capture", "serialize", "send", "await_ack", "delete")


class MigrationStatus(StrEnum):
    """What has durably happened to a move. `advance` draws how they follow each other."""

    PLANNED = "planned"
    PAUSED = "paused"
    CAPTURED = "captured"
    SERIALIZED = "serialized"
    SENT = "sent"
    ACKED = "acked"
    COMPLETED = "completed"
    ROLLED_BACK = "rolled_back"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset(
    {MigrationStatus.COMPLETED, MigrationStatus.ROLLED_BACK, MigrationStatus.FAILED, MigrationStatus.CANCELLED}
)

STATUS_AFTER: Mapping[str, MigrationStatus] = {
    "pause": MigrationStatus.PAUSED,
    "capture": MigrationStatus.CAPTURED,
    "serialize": MigrationStatus.SERIALIZED,
    "send": MigrationStatus.SENT,
    "await_ack": MigrationStatus.ACKED,
    "delete": MigrationStatus.COMPLETED,
}

# The step that a move of this status waits for; a terminal one waits for none.
_NEXT_STEP: Mapping[MigrationStatus, str] = dict(
    zip((MigrationStatus.PLANNED, *STATUS_AFTER.values()), STEPS, strict=False)
)

TRANSITIONS: Mapping[MigrationStatus, frozenset[MigrationStatus]] = {
    status: frozenset({STATUS_AFTER[_NEXT_STEP[status]]}) | TERMINAL if status not in TERMINAL else frozenset()
    for status in MigrationStatus
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One unit's way from its source to its destination.

    Invariants (checked by tests/unit/test_records.py):
      1. `step` is None exactly when `status` is terminal, and so is `finished_at` set.
      2. A terminal status never changes.
      3. `revision` is the store's: it grows by one with every save, and 0 means "not stored".
    """

    id: Text
    plan_id: Text
    unit: Text  # the key in the map: `shard.17`, or that of a pinned actor
    shard: Count
    source: Text
    destination: Text
    status: MigrationStatus = MigrationStatus.PLANNED
    step: str | None = STEPS[0]  # the next step to run
    lock_revision: Count | None = None  # revision of the map key that LOCK replaces
    epoch: Count | None = None  # of the map key under the lock
    task_ids: dict[str, str] = field(default_factory=dict)  # step -> Celery task id, assigned before the launch
    attempts: Count = 0
    error: str | None = None
    actors_total: Count = 0
    state_bytes: Count = 0
    messages_buffered: Count | None = None
    blackout_ms: Measure | None = None
    created_at: Measure
    started_at: Measure | None = None  # when its chain was launched; the launcher sets it
    paused_at: Measure | None = None
    captured_at: Measure | None = None
    serialized_at: Measure | None = None
    sent_at: Measure | None = None
    acked_at: Measure | None = None
    finished_at: Measure | None = None
    step_at: Measure | None = None  # of the latest change of status: a reconciler's deadline counts from here
    revision: Count = 0

    @property
    def steps_left(self) -> tuple[str, ...]:
        """The steps it has before it; none once it has ended."""
        return STEPS[STEPS.index(self.step) :] if self.step is not None else ()


def in_a_new_chain(move: Move, *, now: float) -> Move:
    """The move with new task ids for the steps it has before it: a chain that was sent earlier is not its any more."""
    return replace(move, step_at=now, task_ids=move.task_ids | {step: str(uuid.uuid4()) for step in move.steps_left})


def advance(move: Move, status: MigrationStatus, *, now: float, **changes: Any) -> Move:
    """The move after it has reached `status` at `now`; `changes` are further fields to set.

        planned ─> paused ─> captured ─> serialized ─> sent ─> acked ─> completed
           └─────────┴──────────┴────────────┴──────────┴────────┴────> rolled_back | failed | cancelled | completed

    planned      until the coordinator launches its chain; a reconciler drives it on after that.
    paused..acked  until the next step; after its step's deadline a reconciler sends it again, or ends it from the map.
    completed    the destination owns the unit. Reachable from every status, because the map decides: records lag
                 behind it when Redis lost its latest writes, or when a chain that was sent twice ran ahead.
    rolled_back  an error, and the source still owns the unit.
    failed       it cannot be carried out: the unit went elsewhere without it, or a node it needs is gone.
    cancelled    an operator stopped the plan, and the source still owns the unit.

    Reaching the same status again changes nothing but `changes`, because Celery runs steps twice. Raises NotApplicable
    for anything else that `TRANSITIONS` does not list: the caller is late, and somebody else has moved things on.
    """
    if status is move.status:
        return replace(move, **changes)
    if status not in TRANSITIONS[move.status]:
        raise NotApplicable(f"move {move.id} is {move.status} and cannot become {status}: read its record again")
    times = {"finished_at" if status in TERMINAL else f"{status}_at": now, "step_at": now}
    return replace(move, status=status, step=_NEXT_STEP.get(status), **(times | changes))


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorRow:
    """One live actor of a move: `index` counts from 0 within it. `version` is the actor's last journal sequence."""

    index: Count
    actor_id: Text
    version: Count | None = None
    state_bytes: Count | None = None
    digest: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorMigration:
    """What users see of one actor's migration: the fields of `ferry migrations --json`, no more and no fewer."""

    id: str
    plan_id: str
    move_id: str
    actor_id: str
    shard: int
    source: str
    destination: str
    status: MigrationStatus
    step: str | None
    version: int | None
    state_bytes: int | None
    digest: str | None
    attempts: int
    error: str | None
    messages_buffered: int | None
    blackout_ms: float | None
    created_at: float
    paused_at: float | None
    captured_at: float | None
    serialized_at: float | None
    sent_at: float | None
    acked_at: float | None
    finished_at: float | None
    task_ids: dict[str, str]

    @classmethod
    def of(cls, move: Move, row: ActorRow) -> ActorMigration:
        """The join of a move with one of its rows. An actor's own error says more than its move's."""
        shared = {name: getattr(move, name) for name in _SHARED_WITH_MOVE}
        own = {name: getattr(row, name) for name in _SHARED_WITH_ROW}
        return cls(**shared | own, id=migration_id(move.id, row.index), move_id=move.id, error=row.error or move.error)


_SHARED_WITH_ROW = ("actor_id", "version", "state_bytes", "digest")
_SHARED_WITH_MOVE = tuple(
    {f.name for f in fields(ActorMigration)} & {f.name for f in fields(Move)} - {*_SHARED_WITH_ROW, "id", "error"}
)


def migration_id(move_id: str, index: int) -> str:
    return f"{move_id}.{index}"


def parse_migration_id(text: str) -> tuple[str, int]:
    """The inverse of `migration_id`. Raises InvalidInput for text that it did not make."""
    move_id, _, index = text.rpartition(".")
    if not move_id or not (index.isascii() and index.isdigit()) or str(int(index)) != index:
        raise InvalidInput(f"migration {text!r} is malformed: use an id that `ferry migrations` lists")
    return move_id, int(index)


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationPlan:
    """Moves decided on together. Counts are of moves; `failed` are those that ended in any other way than completed."""

    id: Text
    reason: Text
    created_at: Measure
    started_at: Measure | None = None
    finished_at: Measure | None = None
    total: Count = 0
    completed: Count = 0
    failed: Count = 0
    cancelled: bool = False  # an operator asked for it; moves before their commit roll back
    actors_total: Count = 0
    state_bytes: Count = 0
    estimate_s: Measure | None = None

    @property
    def by_hand(self) -> bool:
        """Whether somebody asked for just these moves; the coordinator decides about all others."""
        return self.reason.endswith("by hand")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEvent:
    """One change of a move's status, as it was written down. Never changed afterwards."""

    at: Measure
    plan_id: Text
    move_id: Text
    unit: Text
    source: Text
    destination: Text
    before: MigrationStatus
    after: MigrationStatus
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterEvent:
    """Something that happened to the cluster, in words: a node came or went, a plan began or ended."""

    at: Measure
    what: Text


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedActor:
    actor_id: str
    state_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedMove:
    """One unit to be moved, why, and the actors that were live in it when the plan was made."""

    unit: str
    shard: int
    source: str
    destination: str
    reason: str
    actors: tuple[PlannedActor, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceRequest:
    """What `handle_rebalance_request` is handed. No unit is named twice.

    `waiting`: how many shards balance would move as well, and does not until an older node is upgraded.
    """

    plan_id: str
    reason: str
    moves: tuple[PlannedMove, ...]
    waiting: int = 0


# -- documents: the JSON form of what is stored, checked where it enters the process ---------------------------------

Stored = Move | ActorRow | MigrationPlan | AuditEvent | ClusterEvent
R = TypeVar("R", bound=Stored)

_NAMES = {kind: {f.name for f in fields(kind)} for kind in get_args(Stored)}


def to_document(record: Stored | ActorMigration) -> dict[str, Any]:
    """The record as JSON-like values, its fields in their order."""
    document: dict[str, Any] = msgspec.to_builtins(record)
    return document


def from_document(kind: type[R], document: dict[str, Any] | bytes) -> R:
    """Read a record of `kind` from JSON text or JSON-like values.

    Every field must be there, none may be unknown, and numbers must be numbers. Raises InvalidInput, one line that
    names what is wrong first.
    """
    try:
        values = jsonlike.loads(document) if isinstance(document, bytes) else document
        _check_names(values, _NAMES[kind])
        record = msgspec.convert(values, kind)
        _check(record)
    except (InvalidInput, *UNREADABLE) as error:
        raise InvalidInput(f"{kind.__name__} is malformed: {fault(error)}") from error
    return record


def _check_names(values: Any, names: set[str]) -> None:
    """msgspec would pass over a field that it does not know, and give one that is missing its default."""
    if not isinstance(values, dict):
        raise InvalidInput("expected a JSON object")
    if values.keys() != names:
        missing = [f"{name}: missing" for name in sorted(names - values.keys())]
        unknown = [f"{name}: unknown" for name in sorted(map(str, values.keys() - names))]
        raise InvalidInput("; ".join(missing + unknown))


def _check(record: Stored) -> None:
    """What the types of its fields do not say."""
    if isinstance(record, ActorRow):
        ActorId.parse(record.actor_id)
    if isinstance(record, Move) and record.step not in (*STEPS, None):
        raise InvalidInput(f"step: {jsonlike.shown(record.step)} is none of {', '.join(STEPS)}")
    if isinstance(record, (Move, AuditEvent)) and record.source == record.destination:
        raise InvalidInput(f"destination: {record.destination} owns it already")
