"""Records in Redis: compare-and-set saves, the indexes to find them by, and the audit stream.

Every change of a move is one script (workflows/store_keys.py), so a crash leaves either all of it or nothing: document,
rows, indexes, counters and audit event never disagree. Nothing here decides who owns a shard: losing all of Redis loses
reports, not actors.

Every method raises Unavailable when Redis cannot serve it within `timeout_s`, or twelve times that for many records. A
write may then have landed all the same: repeat it, and read the record again when that raises WrongSequence.

A record that cannot be read is logged, counted and left out: it must not hide all others, nor stop the leader. It can
still be ended (`end_unreadable`) and deleted (`trim`); workflows/store_unreadable.py has what can be done with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import fields, replace
from functools import partial
from typing import Any, TypeVar, cast

import orjson
from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from routing.errors import InvalidInput, NotApplicable
from routing.jsonlike import shown
from workflows.records import (
    ActorMigration,
    ActorRow,
    AuditEvent,
    ClusterEvent,
    MigrationPlan,
    MigrationStatus,
    Move,
    from_document,
    parse_migration_id,
    to_document,
)
from workflows.store_deadlines import many_trips, one_trip
from workflows.store_keys import DELETE_MOVE, SAVE_PLAN, Keys
from workflows.store_reads import Reads
from workflows.store_saves import BATCH, Saves
from workflows.store_unreadable import Unreadable, filed_under

CONNECTIONS = 16  # per process; more callers than that wait for one, at most `timeout_s`
RUNNING_PLANS = 1_000  # read at once; one or two run as a rule
PAGE = 32  # moves read in one round trip while looking for those that match
CLUSTER_EVENTS = 10_000

T = TypeVar("T")


class RecordStore:
    """The records of one cluster. Safe to share between tasks of one event loop, not between loops."""

    def __init__(self, redis: Redis, cluster: str, *, timeout_s: float = 5.0) -> None:
        self._redis, self.timeout_s = redis, timeout_s
        self.counters: Counter[str] = Counter()
        self._keys = Keys(cluster)
        self._unreadable = Unreadable(redis, self._keys, self.counters)
        self._saves = Saves(redis, self._keys)
        self._move_reads = Reads(self._moves, timeout_s=timeout_s)
        self._plan_reads = Reads(self._plans, timeout_s=timeout_s)
        self._save_plan = redis.register_script(SAVE_PLAN)
        self._delete_move = redis.register_script(DELETE_MOVE)

    @classmethod
    def connect(cls, url: str, cluster: str, *, timeout_s: float = 5.0) -> RecordStore:
        """A store that connects when it is first used. Raises InvalidInput for a malformed URL.

        A connection found dead is replaced once, because an idle one dies with every restart of Redis; a timeout is
        not tried again, because the caller's deadline has passed by then.
        """
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=CONNECTIONS,
                timeout=timeout_s,
                socket_timeout=None,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 1, supported_errors=(exceptions.ConnectionError,)),
            )
        except ValueError as error:
            raise InvalidInput(f"FERRY_REDIS_URL is malformed: {error}") from error
        return cls(Redis.from_pool(pool), cluster, timeout_s=timeout_s)

    async def close(self) -> None:
        await self._redis.aclose()

    @property
    def address(self) -> str:
        """Where Redis is, without its password."""
        known = self._redis.connection_pool.connection_kwargs
        return str(known.get("path") or f"{known.get('host', 'localhost')}:{known.get('port', 6379)}")

    @one_trip
    async def ping(self) -> None:
        await self._redis.ping()

    # -- plans -----------------------------------------------------------------------------------------------------
    @many_trips
    async def create_plan(
        self, plan: MigrationPlan, moves: Sequence[Move], actors: Mapping[str, Sequence[ActorRow]]
    ) -> list[Move]:
        """Store a plan with its moves and their rows (`actors`: move id -> rows); return the moves as stored.

        The plan's counts are the store's from here on. It is listed only once all its moves are stored: a crash on
        the way leaves moves of status planned, which the reconciler ends, and no plan that looks smaller than it is.
        Repeating the call with equal arguments (times, too) is safe. Raises WrongSequence when a move is stored
        already and differs.
        """
        document = to_document(replace(plan, total=0, completed=0, failed=0))
        async with self._redis.pipeline(transaction=True) as pipe:
            for name, value in document.items():
                if value is not None:
                    pipe.hsetnx(self._keys.plan(plan.id), name, orjson.dumps(value))
            await pipe.execute()
        stored = await self._saves.save_all([(move, actors.get(move.id, ())) for move in moves])
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.zadd(self._keys.plans, {plan.id: plan.created_at})
            if plan.finished_at is None:
                pipe.zadd(self._keys.running, {plan.id: plan.created_at})
            await pipe.execute()
        return stored

    @one_trip
    async def save_plan(self, plan: MigrationPlan) -> MigrationPlan:
        """Write down that a plan was started, finished or cancelled; return the plan as stored.

        Only `started_at`, `finished_at` (each once) and `cancelled` (never back) are written, so two writers cannot
        undo each other. Raises NotApplicable when the plan is not stored.
        """
        document = to_document(plan)
        flags = [orjson.dumps(document[name]) for name in ("started_at", "finished_at", "cancelled")]
        await self._save_plan(keys=[self._keys.plan(plan.id), self._keys.running], args=[plan.id, *flags])
        stored = await self._plan_reads.one(plan.id)
        if stored is None:
            raise NotApplicable(f"plan {plan.id} is not stored (any more): list the plans again")
        return stored

    @one_trip
    async def plan(self, plan_id: str) -> MigrationPlan | None:
        return await self._plan_reads.one(plan_id)

    @many_trips
    async def latest_plan(self) -> MigrationPlan | None:
        return next(iter(await self._plans(await self._ids(self._keys.plans, 0, 1))), None)

    @many_trips
    async def plans(self, limit: int = 100) -> list[MigrationPlan]:
        """Newest first."""
        return await self._plans(await self._ids(self._keys.plans, 0, limit))

    @many_trips
    async def running_plans(self) -> list[MigrationPlan]:
        """Those without `finished_at`, oldest first."""
        return await self._plans(await self._ids(self._keys.running, 0, RUNNING_PLANS, oldest_first=True))

    # -- moves -----------------------------------------------------------------------------------------------------
    @one_trip
    async def save(self, move: Move, *, actors: Sequence[ActorRow] = (), through: Sequence[Move] = ()) -> Move:
        """Write a move and these of its rows in one round trip; return the move with its new revision.

        `through` is the move at each status that it has passed since it was saved, for the audit stream. With the
        rows captured those planned for actors that rest by now are deleted.
        Raises WrongSequence when `move.revision` is no longer the stored one: somebody wrote first, read again.
        """
        return await self._saves.save(move, actors=actors, through=through)

    @one_trip
    async def move(self, move_id: str) -> Move | None:
        return await self._move_reads.one(move_id)

    @many_trips
    async def moves(
        self, plan_id: str | None = None, limit: int = 100, status: MigrationStatus | None = None
    ) -> list[Move]:
        """Newest first."""
        found: list[Move] = []
        async with aclosing(self._pages(plan=plan_id, status=status)) as pages:
            async for page in pages:
                found.extend(page)
                if len(found) >= limit:
                    break
        return found[: max(limit, 0)]

    @many_trips
    async def moves_named(self, ids: Sequence[str]) -> list[Move]:
        """Those of the moves that are stored, in the order of `ids`; as many as BATCH in one round trip."""
        return [move for batch in _batches(ids, BATCH) for move in await self._moves(batch)]

    @many_trips
    async def unfinished_moves(self) -> list[Move]:
        """Every move that is not terminal, oldest first: what a new leader has to drive on."""
        ids = await self._unfinished()
        found = await self.moves_named(ids)
        return sorted(found, key=lambda move: (move.created_at, move.id))

    @many_trips
    async def unreadable_moves(self, *, besides: Collection[str]) -> dict[str, int]:
        """Ids and revisions of the moves that are not terminal and not among `besides`: what `unfinished_moves` found.

        Some may just have been created. The revision of one of which nothing is stored is 0.
        """
        ids = [move_id for move_id in await self._unfinished() if move_id not in besides]
        return await self._unreadable.revisions(ids)

    @many_trips
    async def end_unreadable(self, move_id: str, *, revision: int, now: float, error: str) -> bool:
        """End a move that cannot be read: its plan counts it as failed, and its document says so if it is JSON.

        False when somebody has saved or ended it since it was at `revision`. The audit stream does not hear of it.
        """
        running = await self._ids(self._keys.running, 0, RUNNING_PLANS)
        return await self._unreadable.end(move_id, plans=running, revision=revision, now=now, error=error)

    @many_trips
    async def end_unreadable_plans(self, *, besides: Collection[str], now: float) -> list[str]:
        """End the plans that cannot be read and have no unfinished move (any more): their counts tell nobody so.

        `besides` are those that `running_plans` found. Returns which have ended.
        """
        running = await self._ids(self._keys.running, 0, RUNNING_PLANS, oldest_first=True)
        lost = [plan_id for plan_id in running if plan_id not in besides]
        just_created = {plan.id for plan in await self._plans(lost)}
        unfinished, ended = set(await self._unfinished()) if lost else set(), []
        for plan_id in lost:
            moves = cast("list[bytes]", await self._redis.zrange(self._keys.plan_moves(plan_id), 0, -1))
            if plan_id not in just_created and unfinished.isdisjoint(move_id.decode() for move_id in moves):
                flags = [b"null", orjson.dumps(now), b"false"]
                await self._save_plan(keys=[self._keys.plan(plan_id), self._keys.running], args=[plan_id, *flags])
                ended.append(plan_id)
        return ended

    @one_trip
    async def actors(self, move_id: str) -> list[ActorRow]:
        return (await self._rows([move_id]))[0]

    # -- what users see --------------------------------------------------------------------------------------------
    @many_trips
    async def migrations(
        self, *, status: MigrationStatus | None = None, plan: str | None = None, actor: str | None = None,
        shard: int | None = None, limit: int = 100,
    ) -> list[ActorMigration]:  # fmt: skip
        """Those that match everything given, the newest move first.

        `actor` alone reads every move there is; with its shard as well it reads that shard's.
        """
        found: list[ActorMigration] = []
        async with aclosing(self._pages(plan=plan, shard=shard, status=status)) as pages:
            async for page in pages:
                for move, rows in zip(page, await self._rows([move.id for move in page]), strict=True):
                    found.extend(ActorMigration.of(move, row) for row in rows if actor in (None, row.actor_id))
                if len(found) >= limit:
                    break
        return found[: max(limit, 0)]

    @one_trip
    async def migration(self, migration_id: str) -> ActorMigration | None:
        """Raises InvalidInput when the id is malformed."""
        move_id, index = parse_migration_id(migration_id)
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hget(self._keys.move(move_id), "document")
            pipe.hget(self._keys.rows(move_id), str(index))
            move, row = await pipe.execute()
        if move is None or row is None:
            return None
        return ActorMigration.of(from_document(Move, move), from_document(ActorRow, row))

    @many_trips
    async def audit(self, limit: int = 100) -> list[AuditEvent]:
        """The latest changes of a move's status, newest first."""
        entries = await self._redis.xrevrange(self._keys.audit, count=limit) if limit > 0 else []
        stored = (entry for _, entry in cast("list[tuple[bytes, dict[bytes, bytes]]]", entries))
        return self._unreadable.leave_out(_audit_event, stored)

    @one_trip
    async def note(self, event: ClusterEvent) -> None:
        """Keep an event of the cluster; the oldest beyond CLUSTER_EVENTS are forgotten."""
        entry: Any = {"event": orjson.dumps(to_document(event))}
        await self._redis.xadd(self._keys.events, entry, maxlen=CLUSTER_EVENTS, approximate=True)

    @one_trip
    async def events(self, limit: int = 20) -> list[ClusterEvent]:
        """The latest events of the cluster, newest first."""
        entries = await self._redis.xrevrange(self._keys.events, count=limit) if limit > 0 else []
        stored = (entry.get(b"event", b"") for _, entry in cast("list[tuple[bytes, dict[bytes, bytes]]]", entries))
        return self._unreadable.leave_out(partial(from_document, ClusterEvent), stored)

    # -- housekeeping ----------------------------------------------------------------------------------------------
    @many_trips
    async def trim(self, keep: int) -> int:
        """Delete the oldest terminal moves with their rows until at most `keep` records are left; return how many went.

        A record is an actor's row; a move without rows counts as one. Unfinished moves are never deleted. Nothing is
        read as a record, so what cannot be read goes, too. Of a move whose document is lost altogether its id is left
        in the lists of its plan, its shard and its status: nothing says which they are.
        """
        deleted = 0
        while (surplus := int(await self._redis.get(self._keys.records) or 0) - keep) > 0:
            ids = await self._ids(self._keys.finished, 0, PAGE, oldest_first=True)
            if not ids:
                break
            async with self._redis.pipeline(transaction=False) as pipe:
                for move_id in ids:
                    pipe.hmget(self._keys.move(move_id), "document", "status")
                stored = await pipe.execute()
            for move_id, (document, status) in zip(ids, stored, strict=True):
                if surplus > 0:
                    weight = await self._delete(move_id, *filed_under(document), (status or b"").decode())
                    deleted, surplus = deleted + weight, surplus - weight
        return deleted

    async def _delete(self, move_id: str, plan_id: str, shard: str, status: str) -> int:
        keys = self._keys
        weight: int = await self._delete_move(
            keys=[
                keys.move(move_id), keys.rows(move_id), keys.moves, keys.plan_moves(plan_id),
                keys.shard_moves(shard), keys.status_moves(status), keys.finished,
                keys.plan(plan_id), keys.plans, keys.running, keys.records,
            ],
            args=[move_id, plan_id],
        )  # fmt: skip
        return weight

    # -- reading ---------------------------------------------------------------------------------------------------
    async def _plans(self, ids: Sequence[str]) -> list[MigrationPlan]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for plan_id in ids:
                pipe.hgetall(self._keys.plan(plan_id))
            hashes = await pipe.execute() if ids else []
        return self._unreadable.leave_out(_plan, filter(None, hashes))

    async def _unfinished(self) -> list[str]:
        members = cast("set[bytes]", await self._redis.smembers(self._keys.unfinished))
        return [move_id.decode() for move_id in members]

    async def _moves(self, ids: Sequence[str]) -> list[Move]:
        """Those of the moves that are still stored, in the order of `ids`."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for move_id in ids:
                pipe.hget(self._keys.move(move_id), "document")
            documents = await pipe.execute() if ids else []
        found = (document for document in documents if document is not None)
        return self._unreadable.leave_out(partial(from_document, Move), found)

    async def _rows(self, move_ids: Sequence[str]) -> list[list[ActorRow]]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for move_id in move_ids:
                pipe.hvals(self._keys.rows(move_id))
            stored = await pipe.execute() if move_ids else []
        rows = (self._unreadable.leave_out(partial(from_document, ActorRow), documents) for documents in stored)
        return [sorted(of_one_move, key=lambda row: row.index) for of_one_move in rows]

    async def _pages(
        self, *, plan: str | None = None, shard: int | None = None, status: MigrationStatus | None = None
    ) -> AsyncGenerator[list[Move], None]:
        """The moves that match everything given, newest first, read from the narrowest index."""
        if shard is not None:
            index = self._keys.shard_moves(shard)
        elif plan is not None:
            index = self._keys.plan_moves(plan)
        else:
            index = self._keys.moves if status is None else self._keys.status_moves(status)
        start, seen = 0, set[str]()
        while ids := await self._ids(index, start, PAGE):
            fresh = await self._moves([move_id for move_id in ids if move_id not in seen])
            yield [
                move
                for move in fresh
                if plan in (None, move.plan_id) and shard in (None, move.shard) and status in (None, move.status)
            ]
            seen.update(ids)  # A move created meanwhile shifts the index, and the next page repeats some.
            start += PAGE

    async def _ids(self, index: str, start: int, count: int, *, oldest_first: bool = False) -> list[str]:
        """`count` ids of an index from position `start`, newest first."""
        if count <= 0:
            return []
        ids = await self._redis.zrange(index, start, start + count - 1, desc=not oldest_first)
        return [move_id.decode() for move_id in cast("list[bytes]", ids)]


def _plan(stored: Mapping[bytes, bytes]) -> MigrationPlan:
    """Fields that were never set are not stored, so that the script can set them once. Raises InvalidInput."""
    unset = dict.fromkeys(f.name for f in fields(MigrationPlan))
    try:
        found = {name.decode(): orjson.loads(value) for name, value in stored.items()}
    except ValueError as error:
        raise InvalidInput(f"plan is not JSON: {shown(error)}") from error
    return from_document(MigrationPlan, unset | found)


def _audit_event(entry: Mapping[bytes, bytes]) -> AuditEvent:
    """Raises InvalidInput."""
    try:
        statuses = {name: entry[name.encode()].decode() for name in ("before", "after")}
        return from_document(AuditEvent, {**orjson.loads(entry[b"event"]), **statuses})
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"audit event is malformed: {shown(error)}") from error


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
