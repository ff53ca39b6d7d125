"""Looking one thing up: an actor's place, records of migrations. All answers are JSON-like, ready to be printed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from routing.address import ActorId, shard_of
from routing.errors import FerryError, InvalidInput, NotApplicable, Unavailable
from routing.settings import Settings
from workflows.records import MigrationStatus, to_document
from workflows.session import STORE_S, open_session
from workflows.store import RecordStore

MOST_ROWS = 10_000  # of one move

# When a record reached what, in order. `started_at` is the launch of the chain, which only a move knows.
_TIMES = (
    ("plan", "planned", "created_at"),
    ("launch", "launched", "started_at"),
    ("pause", "paused", "paused_at"),
    ("capture", "captured", "captured_at"),
    ("serialize", "serialized", "serialized_at"),
    ("send", "sent", "sent_at"),
    ("await_ack", "acked", "acked_at"),
)


async def migrations(
    settings: Settings, *, status: str | None, plan: str | None, actor: ActorId | None, limit: int
) -> list[dict[str, Any]]:
    """The newest move first. Raises Unavailable when Redis is away."""
    shard = await _shard_of(settings, actor) if actor is not None else None
    async with _open_store(settings) as store:
        found = await store.migrations(
            status=MigrationStatus(status) if status is not None else None, plan=plan,
            actor=str(actor) if actor is not None else None, shard=shard, limit=limit,
        )  # fmt: skip
    return [to_document(migration) for migration in found]


async def record(settings: Settings, text: str) -> dict[str, Any]:
    """The migration, or the move with its migrations, that `text` names; with `steps`.

    Raises NotApplicable when there is none, Unavailable when Redis is away.
    """
    async with _open_store(settings) as store:
        move = await store.move(text)
        if move is not None:
            of_shard = await store.migrations(shard=move.shard, plan=move.plan_id, limit=MOST_ROWS)
            document = to_document(move)
            rows = [to_document(row) for row in of_shard if row.move_id == move.id]
            return document | {"steps": steps(document), "migrations": rows}
        try:
            migration = await store.migration(text)
        except InvalidInput:
            migration = None  # not even the form of an id: unknown all the same
    if migration is None:
        raise NotApplicable(f"no record {text!r}: `ferry migrations` lists those there are")
    document = to_document(migration)
    return document | {"steps": steps(document)}


async def where(settings: Settings, actor: ActorId) -> dict[str, Any]:
    """Where an actor lives, read from the map's leader. Raises Unavailable while nobody owns its shard."""
    async with open_session(settings) as session:
        shard = shard_of(actor, session.shards_total)
        _, entry = await session.directory.locate(actor)
    if entry is None:
        raise Unavailable(f"shard {shard} of {actor} has no owner yet: start a node and a coordinator")
    view = entry.ownership
    if view.retired:
        raise Unavailable(f"{actor} is just going back to shard {shard}: try again in a moment")
    return {
        "actor": str(actor), "node": view.owner, "shard": shard, "epoch": view.epoch, "incarnation": view.incarnation,
        "move": view.move, "destination": view.destination, "pinned": view.pinned,
    }  # fmt: skip


def steps(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`{step, status, reached_at, ms}` of what was reached; `ms` counts from the one before, None for the first."""
    reached = [(step, status, document.get(field)) for step, status, field in _TIMES]
    ended = document["status"] if document["finished_at"] is not None else ""
    reached.append(("delete" if ended == "completed" else "end", ended, document["finished_at"]))
    found: list[dict[str, Any]] = []
    for step, status, at in reached:
        if at is not None:
            ms = round((at - found[-1]["reached_at"]) * 1000, 3) if found else None
            found.append({"step": step, "status": status, "reached_at": at, "ms": ms})
    return found


async def _shard_of(settings: Settings, actor: ActorId) -> int | None:
    """The actor's shard, which narrows the search to a few records; None when NATS cannot say how many there are."""
    try:
        async with open_session(settings) as session:
            return shard_of(actor, session.shards_total)
    except FerryError:
        return None  # every record is read then: slower, and the same answer


@asynccontextmanager
async def _open_store(settings: Settings) -> AsyncIterator[RecordStore]:
    store = RecordStore.connect(settings.redis_url, settings.cluster, timeout_s=STORE_S)
    try:
        yield store
    finally:
        await store.close()
