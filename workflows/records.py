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
from typing import Any, TypeVar

import marshmallow
from marshmallow import validate

from routing import jsonlike
from routing.address import ActorId
from routing.errors import InvalidInput, NotApplicable

FAULT_CHARACTERS = 200  # a fault repeats a name that somebody sent
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

    id: str
    plan_id: str
    unit: str  # the key in the map: `shard.17`, or that of a pinned actor
    shard: int
    source: str
    destination: str
    status: MigrationStatus = MigrationStatus.PLANNED
    step: str | None = STEPS[0]  # the next step to run
    lock_revision: int | None = None  # revision of the map key that LOCK replaces
    epoch: int | None = None  # of the map key under the lock
    task_ids: dict[str, str] = field(default_factory=dict)  # step -> Celery task id, assigned before the launch
    attempts: int = 0
    error: str | None = None
    actors_total: int = 0
    state_bytes: int = 0
    messages_buffered: int | None = None
    blackout_ms: float | None = None
    created_at: float
    started_at: float | None = None  # when its chain was launched; the launcher sets it
    paused_at: float | None = None
    captured_at: float | None = None
    serialized_at: float | None = None
    sent_at: float | None = None
    acked_at: float | None = None
    finished_at: float | None = None
    step_at: float | None = None  # of the latest change of status: a reconciler's deadline counts from here
    revision: int = 0

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

    index: int
    actor_id: str
    version: int | None = None
    state_bytes: int | None = None
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

    id: str
    reason: str
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: bool = False  # an operator asked for it; moves before their commit roll back
    actors_total: int = 0
    state_bytes: int = 0
    estimate_s: float | None = None

    @property
    def by_hand(self) -> bool:
        """Whether somebody asked for just these moves; the coordinator decides about all others."""
        return self.reason.endswith("by hand")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEvent:
    """One change of a move's status, as it was written down. Never changed afterwards."""

    at: float
    plan_id: str
    move_id: str
    unit: str
    source: str
    destination: str
    before: MigrationStatus
    after: MigrationStatus
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterEvent:
    """Something that happened to the cluster, in words: a node came or went, a plan began or ended."""

    at: float
    what: str


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
    """What `handle_rebalance_request` is handed. No unit is named twice."""

    plan_id: str
    reason: str
    moves: tuple[PlannedMove, ...]


# -- documents: the JSON form of every record above, validated where it enters the process ---------------------------

Record = Move | ActorRow | ActorMigration | MigrationPlan | AuditEvent | ClusterEvent | RebalanceRequest
R = TypeVar("R", bound=Record)


def to_document(record: Record) -> dict[str, Any]:
    """The record as JSON-like values, its fields in their order."""
    document: dict[str, Any] = _SCHEMAS[type(record)].dump(record)
    return document


def from_document(kind: type[R], document: Mapping[str, Any] | bytes) -> R:
    """Read a record of `kind` from JSON text or JSON-like values.

    Every field must be there, none may be unknown, and numbers must be numbers. Raises InvalidInput, one line naming
    the faults.
    """
    try:
        read = jsonlike.loads(document) if isinstance(document, bytes) else document
        record: R = _SCHEMAS[kind].load(read)
    except ValueError as error:
        raise InvalidInput(f"{kind.__name__} is not JSON: {error}") from error
    except marshmallow.ValidationError as error:
        raise InvalidInput(f"{kind.__name__} is malformed: {_one_line(_faults(error.messages))}") from error
    return record


class _Schema(marshmallow.Schema):
    """Loads into the dataclass `record` instead of a dict."""

    record: type

    @marshmallow.validates_schema
    def _check_route(self, document: dict[str, Any], **_: Any) -> None:
        if "source" in document and document["source"] == document["destination"]:
            raise marshmallow.ValidationError(f"{document['source']} owns it already", "destination")

    @marshmallow.post_load
    def _make(self, document: dict[str, Any], **_: Any) -> Any:
        return self.record(**document)


class _Number(marshmallow.fields.Float):
    """A finite number from 0 up; text and booleans are not numbers."""

    def _validated(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.make_error("invalid", input=value)
        return super()._validated(value)


class _Whole(marshmallow.fields.Integer):
    """A whole number from 0 up; text, booleans and 1.0 are not whole numbers."""

    def _validated(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.make_error("invalid", input=value)
        return super()._validated(value)


class _Items(marshmallow.fields.List[Any]):
    """A list that loads as a tuple, so that a frozen record stays frozen."""

    def _deserialize(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(super()._deserialize(*args, **kwargs))


def _check_actor_id(text: str) -> None:
    try:
        ActorId.parse(text)
    except InvalidInput as error:
        raise marshmallow.ValidationError(str(error)) from error


def _check_units(moves: tuple[PlannedMove, ...]) -> None:
    units = [move.unit for move in moves]
    if len(set(units)) < len(units):
        raise marshmallow.ValidationError("a unit is named twice")


_FROM_ZERO = validate.Range(min=0)
_FIELD_OF_TYPE: Mapping[str, Any] = {
    "str": lambda: marshmallow.fields.String(required=True, validate=validate.Length(min=1)),
    "str | None": lambda: marshmallow.fields.String(required=True, allow_none=True),
    "int": lambda: _Whole(required=True, validate=_FROM_ZERO),
    "int | None": lambda: _Whole(required=True, allow_none=True, validate=_FROM_ZERO),
    "float": lambda: _Number(required=True, validate=_FROM_ZERO),
    "float | None": lambda: _Number(required=True, allow_none=True, validate=_FROM_ZERO),
    "bool": lambda: marshmallow.fields.Boolean(required=True, truthy={True}, falsy={False}),
    "dict[str, str]": lambda: marshmallow.fields.Dict(
        keys=marshmallow.fields.String(), values=marshmallow.fields.String(), required=True
    ),
    "MigrationStatus": lambda: marshmallow.fields.Enum(MigrationStatus, by_value=True, required=True),
}


def _schema_of(record: type, **special: Any) -> _Schema:
    """A schema with the fields of the dataclass, so that the two cannot drift apart."""
    named = {f.name: special.get(f.name) or _FIELD_OF_TYPE[str(f.type)]() for f in fields(record)}
    schema: _Schema = type(f"{record.__name__}Schema", (_Schema,), {**named, "record": record})()
    return schema


def _one_line(faults: list[str]) -> str:
    """The first few: a request of ten thousand actors must not become a message of as many faults."""
    faults = [" ".join(fault.split())[:FAULT_CHARACTERS] for fault in faults[:5]] + faults[5:]
    return "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")


def _faults(messages: Any, path: str = "") -> list[str]:
    if isinstance(messages, dict):
        return [
            fault for key, value in messages.items() for fault in _faults(value, f"{path}.{key}" if path else str(key))
        ]
    return [f"{path}: {' '.join(str(message) for message in messages).rstrip('.')}"]


def _step() -> Any:
    return marshmallow.fields.String(required=True, allow_none=True, validate=validate.OneOf(STEPS))


def _actor_id() -> Any:
    return marshmallow.fields.String(required=True, validate=_check_actor_id)


def _nested(schema: _Schema, **options: Any) -> Any:
    return _Items(marshmallow.fields.Nested(schema), required=True, **options)


_PLANNED_ACTOR = _schema_of(PlannedActor, actor_id=_actor_id())
_PLANNED_MOVE = _schema_of(PlannedMove, actors=_nested(_PLANNED_ACTOR))
_SCHEMAS: Mapping[type, _Schema] = {
    Move: _schema_of(Move, step=_step()),
    ActorRow: _schema_of(ActorRow, actor_id=_actor_id()),
    ActorMigration: _schema_of(ActorMigration, step=_step(), actor_id=_actor_id()),
    MigrationPlan: _schema_of(MigrationPlan),
    AuditEvent: _schema_of(AuditEvent),
    ClusterEvent: _schema_of(ClusterEvent),
    RebalanceRequest: _schema_of(RebalanceRequest, moves=_nested(_PLANNED_MOVE, validate=_check_units)),
}
