"""Records that cannot be read: damaged, lost, or of another version. All others are found, and a move can be ended.

Records are read strictly, because a save writes the whole document: a field that its reader had passed over would be
lost to the version that knows it. What is looked at here is only where a document is filed, and that a move has ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import orjson
import structlog
from redis.asyncio import Redis

from routing import jsonlike
from routing.errors import InvalidInput
from workflows.records import MigrationStatus
from workflows.store_keys import END_MOVE, Keys

log = structlog.get_logger("ferry.store")

S = TypeVar("S")
T = TypeVar("T")


class Unreadable:
    """What of one cluster's records cannot be read. For the record store, which gives each call its deadline."""

    def __init__(self, redis: Redis, keys: Keys, counters: Counter[str]) -> None:
        self._redis, self._keys, self._counters = redis, keys, counters
        self._end_move = redis.register_script(END_MOVE)

    def leave_out(self, read: Callable[[S], T], stored: Iterable[S]) -> list[T]:
        """What `read` makes of the others. It raises InvalidInput for those that are left out, logged and counted."""
        records = []
        for document in stored:
            try:
                records.append(read(document))
            except InvalidInput as error:
                self._counters["malformed"] += 1
                log.error("record ignored", document=jsonlike.shown(document), error=str(error))
        return records

    async def revisions(self, move_ids: Sequence[str]) -> dict[str, int]:
        """At which revision each of these moves is stored, read or not; 0: nothing is."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for move_id in move_ids:
                pipe.hget(self._keys.move(move_id), "revision")
            revisions = await pipe.execute() if move_ids else []
        return {move_id: int(revision or 0) for move_id, revision in zip(move_ids, revisions, strict=True)}

    async def end(self, move_id: str, *, plans: Sequence[str], revision: int, now: float, error: str) -> bool:
        """End a move, which may be one of `plans`: see `RecordStore.end_unreadable`."""
        keys = self._keys
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hget(keys.move(move_id), "document")
            for plan_id in plans:
                pipe.zscore(keys.plan_moves(plan_id), move_id)
            document, *places = await pipe.execute()
        plan = next((plan_id for plan_id, place in zip(plans, places, strict=True) if place is not None), "")
        done = await self._end_move(
            keys=[
                keys.move(move_id), keys.unfinished, keys.finished, keys.moves, keys.plan(plan), keys.status_prefix,
            ],
            args=[
                move_id, revision, _ended(document, revision=revision + 1, now=now, error=error),
                MigrationStatus.FAILED.value,
            ],
        )  # fmt: skip
        return bool(done)


def filed_under(document: bytes | None) -> tuple[str, str]:
    """(plan, shard) in whose lists a move stands; empty, which no list is called, when its document does not say."""
    found = _object(document)
    plan_id, shard = found.get("plan_id"), found.get("shard")
    return plan_id if isinstance(plan_id, str) else "", str(shard) if type(shard) is int else ""


def _ended(document: bytes | None, *, revision: int, now: float, error: str) -> bytes:
    """The document as whoever can read it shall find it: failed. Empty for one that is not even JSON."""
    found = _object(document)
    if not found:
        return b""
    end = {"status": MigrationStatus.FAILED, "step": None, "finished_at": now, "step_at": now, "error": error}
    return orjson.dumps({**found, **end, "revision": revision})


def _object(document: bytes | None) -> dict[str, Any]:
    try:
        found = jsonlike.loads(document or b"")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
