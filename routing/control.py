"""What worker, coordinator and nodes ask each other about moves: messages, their schemas, and asking.

Every request is one JSON object to `ctl.<node>.<verb>`; every answer is `{"ok": {...}}` or `{"error": {...}}`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import orjson
from marshmallow import RAISE, Schema, ValidationError, fields, post_load, validate

from routing import errors, jsonlike
from routing.errors import InvalidInput
from routing.link import Link
from routing.subjects import Subjects

COORDINATOR = "_coordinator"  # no node id begins with _, so the leader has a control subject of its own
ROWS_PER_PAGE = 500  # a page of manifest or captured rows stays below 128 KiB, an eighth of NATS' default payload limit
FAULTS_CHARACTERS = 1_000  # of a refusal: a page of rows can be wrong in thousands of ways


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRequest:
    """A worker asks a node to take one step of a move. `offset` pages through the actors in the answer.

    `ahead` asks for a pause and, as far as they take no time, for the steps that follow from it.
    """

    move: str
    unit: str
    epoch: int
    source: str
    destination: str
    offset: int = 0
    ahead: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestRow:
    """One actor a source is about to send: its place in the move, and what its transfer will be.

    `captured_version` is set when the state is older than `version`: the log has what is in between.
    """

    index: int
    actor_id: str
    version: int
    digest: str
    state_bytes: int
    transfer_bytes: int
    captured_version: int | None = None

    @property
    def state_version(self) -> int:
        """The version of the log that the transferred state stands at."""
        return self.version if self.captured_version is None else self.captured_version


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationRequest:
    """A source announces to the destination what it is about to send (`handle_migration_request`), page by page.

    `verify` is set on the last page, once the gate is closed: when nothing lacks there, because it was copied ahead,
    the answer is the acknowledgement already.
    """

    move: str
    unit: str
    epoch: int
    source: str
    destination: str
    rows: tuple[ManifestRow, ...]
    verify: bool = False


class _Strict(Schema):
    class Meta:
        unknown = RAISE


_name = fields.String(required=True, validate=validate.Length(1, 200))
_unit = fields.String(required=True, validate=validate.Length(1, 500))  # an actor's, escaped, is the longest
_count = fields.Integer(required=True, strict=True, validate=validate.Range(0))


class _StepRequestSchema(_Strict):
    move = _name
    unit = _unit
    epoch = _count
    source = _name
    destination = _name
    offset = fields.Integer(load_default=0, strict=True, validate=validate.Range(0))
    ahead = fields.Boolean(load_default=False, truthy={True}, falsy={False})

    @post_load
    def build(self, values: dict[str, Any], **_: Any) -> StepRequest:
        return StepRequest(**values)


class _ManifestRows(fields.Field[tuple[ManifestRow, ...]]):
    """A page of rows, checked by hand: a schema for each row costs ten times as much, and their actors stand still."""

    def _deserialize(self, value: Any, *_: Any, **__: Any) -> tuple[ManifestRow, ...]:
        if not isinstance(value, list) or len(value) > ROWS_PER_PAGE:
            raise ValidationError(f"must be a list of at most {ROWS_PER_PAGE} rows")
        return tuple(_manifest_row(place, row) for place, row in enumerate(value))


_ROW_FIELDS = {field.name: str(field.type) for field in dataclasses.fields(ManifestRow)}
_LONGEST = {"actor_id": 400, "digest": 200}


def _manifest_row(place: int, row: Any) -> ManifestRow:
    """Raises ValidationError naming the row's place and what is wrong with it."""
    if not isinstance(row, dict) or row.keys() != _ROW_FIELDS.keys():
        raise ValidationError(f"row {place}: must have exactly {', '.join(_ROW_FIELDS)}")
    for name, kind in _ROW_FIELDS.items():
        if kind == "int | None" and row[name] is None:
            continue
        if kind.startswith("int"):
            if type(row[name]) is not int or row[name] < 0:  # a bool is an int as well
                raise ValidationError(f"row {place}: {name} must be a whole number, 0 or more")
        elif type(row[name]) is not str or not 1 <= len(row[name]) <= _LONGEST[name]:
            raise ValidationError(f"row {place}: {name} must be text of 1 to {_LONGEST[name]} characters")
    return ManifestRow(**row)


class _MigrationRequestSchema(_Strict):
    move = _name
    unit = _unit
    epoch = _count
    source = _name
    destination = _name
    rows = _ManifestRows(required=True)
    verify = fields.Boolean(load_default=False, truthy={True}, falsy={False})

    @post_load
    def build(self, values: dict[str, Any], **_: Any) -> MigrationRequest:
        return MigrationRequest(**values)


STEP_REQUEST: Schema = _StepRequestSchema()
MIGRATION_REQUEST: Schema = _MigrationRequestSchema()


def encode(message: Any) -> bytes:
    """A request dataclass, or a plain dict, as JSON."""
    return orjson.dumps(message)


def decode(payload: bytes, schema: Schema | None = None) -> Any:
    """Read a request; with a schema, validated and built. Raises InvalidInput naming the wrong fields."""
    try:
        document = jsonlike.loads(payload or b"{}")
        return schema.load(document) if schema is not None else _object(document)
    except ValidationError as error:
        raise InvalidInput(f"malformed request: {jsonlike.shown(error.messages, FAULTS_CHARACTERS)}") from error
    except ValueError as error:
        raise InvalidInput(f"request is not JSON: {error}") from error


def encode_result(result: dict[str, Any] | Exception) -> bytes:
    if isinstance(result, Exception):
        return orjson.dumps({"error": errors.to_wire(result)})
    return orjson.dumps({"ok": result})


async def ask(
    link: Link, subjects: Subjects, node: str, verb: str, message: Any = None, *, timeout_s: float
) -> dict[str, Any]:
    """Ask a node (or COORDINATOR) to do `verb`; returns what it answered.

    Raises the error the node reported, Unavailable when it is not there, Timeout when it does not answer in time.
    """
    payload = await link.request(subjects.control(node, verb), encode(message or {}), timeout_s=timeout_s)
    return result_of(payload)


def result_of(payload: bytes) -> dict[str, Any]:
    """What the other side answered. Raises the error it reported."""
    return result_in(decode(payload))


def result_in(answer: dict[str, Any]) -> dict[str, Any]:
    """The result in one answer. Raises the error in it."""
    if "error" in answer:
        raise errors.from_wire(_object(answer["error"]))
    return _object(answer.get("ok"))


def _object(document: Any) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise InvalidInput(f"expected a JSON object, got {type(document).__name__}")
    return document
