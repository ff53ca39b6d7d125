"""Saving moves: each with its rows, by compare-and-set, and as many in one round trip as are to be saved by then."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import orjson
from redis import exceptions
from redis.asyncio import Redis

from routing.errors import WrongSequence
from workflows.records import TERMINAL, ActorRow, MigrationStatus, Move
from workflows.store_keys import SAVE_MOVE, Keys

BATCH = 200  # moves read or written in one round trip
BATCH_ROWS = 2_000  # and rows of actors written: while it packs them, redis-py takes 4 kB for each
AUDIT_EVENTS = 200_000  # kept in the stream, about 60 MB; older ones are forgotten


class Saves:
    """Saves the moves of one cluster. For the record store, which gives each call its deadline."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis, self._keys = redis, keys
        self._save_move = redis.register_script(SAVE_MOVE)
        self._waiting: list[tuple[dict[str, Any], asyncio.Future[list[int]]]] = []
        self._turn = asyncio.Lock()

    async def save(self, move: Move, *, actors: Sequence[ActorRow], through: Sequence[Move]) -> Move:
        """See `RecordStore.save`."""
        return _accepted(move, await self._saved_together(self._saving(move, actors, through)))

    async def save_all(self, writes: Sequence[tuple[Move, Sequence[ActorRow]]]) -> list[Move]:
        """Save moves and their rows. Raises WrongSequence when some were refused; the others are saved."""
        verdicts: list[list[int]] = []
        waiting = list(writes)
        while waiting:
            count = _in_one_trip(len(rows) for _, rows in waiting)
            batch, waiting = waiting[:count], waiting[count:]
            async with self._redis.pipeline(transaction=False) as pipe:
                for move, rows in batch:
                    await self._save_move(**self._saving(move, rows), client=pipe)
                verdicts += await pipe.execute()
        refused = [move.id for (move, _), (accepted, *_) in zip(writes, verdicts, strict=True) if not accepted]
        if refused:
            raise WrongSequence(
                f"moves {', '.join(refused[:5])} ({len(refused)} in all) were saved by another: read again"
            )
        return [_accepted(move, verdict) for (move, _), verdict in zip(writes, verdicts, strict=True)]

    async def _saved_together(self, saving: dict[str, Any]) -> list[int]:
        """What SAVE_MOVE answers. What others want saved while one round trip is under way goes with the next one.

        A convoy's moves take their steps at the same time: six saves then cost two round trips, not six.
        """
        verdict: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._waiting.append((saving, verdict))
        try:
            async with self._turn:
                while not verdict.done():  # else who had the turn before has saved this, too
                    count = _in_one_trip(len(saving["args"]) // 2 for saving, _ in self._waiting)  # two for each row
                    batch, self._waiting = self._waiting[:count], self._waiting[count:]
                    await self._save_batch(batch)
            return await verdict
        finally:
            verdict.cancel()  # harmless when it is there; without a caller nobody else would look at it

    async def _save_batch(self, batch: Sequence[tuple[dict[str, Any], asyncio.Future[list[int]]]]) -> None:
        try:
            if len(batch) == 1:  # one command; a pipeline asks first whether the script is known
                answers: list[Any] = [await self._save_move(**batch[0][0])]
            else:
                async with self._redis.pipeline(transaction=False) as pipe:
                    for saving, _ in batch:
                        await self._save_move(**saving, client=pipe)
                    answers = await pipe.execute(raise_on_error=False)
        except BaseException as error:
            answers = [exceptions.ConnectionError(f"saves sent together were given up: {error!r}")] * len(batch)
            raise
        finally:
            _hand_out(answers, [verdict for _, verdict in batch])

    def _saving(self, move: Move, actors: Sequence[ActorRow], through: Sequence[Move] = ()) -> dict[str, Any]:
        """Keys and arguments of SAVE_MOVE, in the order in which it reads them."""
        keys = self._keys
        outcome = (
            "" if move.status not in TERMINAL else "completed" if move.status is MigrationStatus.COMPLETED else "failed"
        )
        document = orjson.dumps(replace(move, revision=move.revision + 1))
        # Not by a schema, which is ten times slower.
        rows = [part for row in actors for part in (str(row.index), orjson.dumps(row))]
        steps = (*through, move)
        rows_total = next((step.actors_total for step in steps if step.status is MigrationStatus.CAPTURED), "")
        passed = [part for step in steps for part in (step.status.value, _event(step))]
        return {
            "keys": [
                keys.move(move.id), keys.rows(move.id), keys.moves, keys.plan_moves(move.plan_id),
                keys.shard_moves(move.shard), keys.status_prefix, keys.unfinished, keys.finished,
                keys.plan(move.plan_id), keys.records, keys.audit,
            ],
            "args": [
                move.id, move.revision, document, outcome, move.created_at, AUDIT_EVENTS,
                rows_total, len(steps), *passed, *rows,
            ],
        }  # fmt: skip


def _hand_out(answers: Sequence[Any], verdicts: Sequence[asyncio.Future[list[int]]]) -> None:
    for answer, verdict in zip(answers, verdicts, strict=True):
        if verdict.done():
            continue  # its caller has given up
        if isinstance(answer, Exception):
            verdict.set_exception(answer)
        else:
            verdict.set_result(answer)


def _accepted(move: Move, verdict: Sequence[int]) -> Move:
    accepted, *stored = verdict
    if not accepted:
        raise WrongSequence(f"move {move.id} is stored at revision {stored[0]}, not {move.revision}: read it again")
    return replace(move, revision=move.revision + 1)


def _event(move: Move) -> bytes:
    """All of an audit event but the two statuses, which the script knows."""
    named = ("plan_id", "unit", "source", "destination", "error")
    shared = {name: getattr(move, name) for name in named}
    return orjson.dumps({"at": move.step_at or move.created_at, "move_id": move.id, **shared})


def _in_one_trip(rows: Iterable[int]) -> int:
    """How many of the moves that wait go in the next round trip, by the rows of each: one at least."""
    moves = total = 0
    for of_move in rows:
        total += of_move
        if moves and (moves >= BATCH or total > BATCH_ROWS):
            break
        moves += 1
    return moves
