"""What worker, coordinator and nodes ask each other about moves: messages, read into their types, and asking.

Every request is one JSON object to `ctl.<node>.<verb>`; every answer is `{"ok": {...}}` or `{"error": {...}}`.
"""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from msgspec import Meta, Struct
from msgspec import json as typed_json

from routing import errors, jsonlike
from routing.errors import InvalidInput
from routing.link import Link
from routing.subjects import Subjects
from routing.typed import Count, reader

COORDINATOR = "_coordinator"  # no node id begins with _, so the leader has a control subject of its own
ROWS_PER_PAGE = 500  # a page of manifest or captured rows stays below 128 KiB, an eighth of NATS' default payload limit

Name = Annotated[str, Meta(min_length=1, max_length=200)]
Unit = Annotated[str, Meta(min_length=1, max_length=500)]  # an actor's, escaped, is the longest


# Whoever does not know a field of a request would do something else than was asked, and refuses it.
class StepRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A worker asks a node to take one step of a move. `offset` pages through the actors in the answer.

    `ahead` asks for a pause and, as far as they take no time, for the steps that follow from it.
    """

    move: Name
    unit: Unit
    epoch: Count
    source: Name
    destination: Name
    offset: Count = 0
    ahead: bool = False


class ManifestRow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One actor a source is about to send: its place in the move, and what its transfer will be.

    `captured_version` is set when the state is older than `version`: the log has what is in between.
    """

    index: Count
    actor_id: Annotated[str, Meta(min_length=1, max_length=400)]
    version: Count
    digest: Name
    state_bytes: Count
    transfer_bytes: Count
    captured_version: Count | None = None

    @property
    def state_version(self) -> int:
        """The version of the log that the transferred state stands at."""
        return self.version if self.captured_version is None else self.captured_version


class MigrationRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A source announces to the destination what it is about to send (`handle_migration_request`), page by page.

    `verify` is set on the last page, once the gate is closed: when nothing lacks there, because it was copied ahead,
    the answer is the acknowledgement already.
    """

    move: Name
    unit: Unit
    epoch: Count
    source: Name
    destination: Name
    rows: Annotated[tuple[ManifestRow, ...], Meta(max_length=ROWS_PER_PAGE)]
    verify: bool = False


class Verified(Struct):
    """What a destination has verified of a move: how many actors, and in which of its incarnations."""

    actors: Count
    incarnation: str


class Staged(Struct):
    """What it lacks of the actors that were announced, by index; where that was asked for, `Verified` as well."""

    lacking: tuple[Count, ...]
    actors: Count | None = None
    incarnation: str | None = None


class InventoryRequest(Struct):
    """Where a page of live actors begins: at a unit's name, and how many of its actors to skip."""

    after: str = ""
    skip: Count = 0


class Inventory(Struct):
    """A page of a node's live actors, each with the bytes of its state; what to ask for `next`, None after the last."""

    units: dict[str, list[tuple[str, Count]]]
    next: InventoryRequest | None = None


read_inventory_request = reader(InventoryRequest, "request")
read_step_request = reader(StepRequest, "request")
read_migration_request = reader(MigrationRequest, "request")


def encode(message: Struct | dict[str, Any]) -> bytes:
    return typed_json.encode(message) if isinstance(message, Struct) else orjson.dumps(message)


def decode(payload: bytes) -> dict[str, Any]:
    """Read an answer, or a request that is no type of its own. Raises InvalidInput."""
    try:
        return _object(jsonlike.loads(payload or b"{}"))
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
