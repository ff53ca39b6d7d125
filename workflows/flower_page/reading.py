"""Which moves a request asks for, and how they are read."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from urllib.parse import urlencode

from routing.address import ActorId, shard_of
from routing.errors import InvalidInput
from workflows.flower_page.view import IN_FLIGHT, MoveView, Overview, TaskState
from workflows.records import ActorMigration, MigrationStatus, Move
from workflows.store import RecordStore

DEFAULT_LIMIT = 100
MOST = 500  # reading and rendering a move takes about 0.4 ms, during which Flower serves nobody else

IN_FLIGHT_FILTER = "in_flight"  # beside the ten statuses: all between the first step and the last


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """What `?plan=&status=&actor=&limit=` say; each may be missing or empty."""

    plan: str | None = None
    status: MigrationStatus | None = None
    in_flight: bool = False
    actor: ActorId | None = None
    limit: int = DEFAULT_LIMIT

    @classmethod
    def parse(cls, arguments: Mapping[str, str]) -> Filters:
        """Raises InvalidInput, saying what may be asked."""
        given = {name: value.strip() for name, value in arguments.items() if value.strip()}
        wanted = given.get("status")
        if wanted not in (None, IN_FLIGHT_FILTER, *MigrationStatus):
            raise InvalidInput(f"status {wanted!r} is unknown: use {', '.join((IN_FLIGHT_FILTER, *MigrationStatus))}")
        limit = given.get("limit", str(DEFAULT_LIMIT))
        if not (limit.isascii() and limit.isdigit() and 1 <= int(limit) <= MOST):
            raise InvalidInput(f"limit {limit!r} is malformed: use 1 to {MOST}")
        return cls(
            plan=given.get("plan"),
            status=MigrationStatus(wanted) if wanted not in (None, IN_FLIGHT_FILTER) else None,
            in_flight=wanted == IN_FLIGHT_FILTER,
            actor=ActorId.parse(given["actor"]) if "actor" in given else None,
            limit=int(limit),
        )

    @property
    def statuses(self) -> tuple[MigrationStatus | None, ...]:
        """Those to read; None reads all."""
        return IN_FLIGHT if self.in_flight else (self.status,)

    @property
    def status_text(self) -> str:
        return IN_FLIGHT_FILTER if self.in_flight else self.status or ""

    def query(self, **changes: str) -> str:
        """These filters as a query string with its question mark, with `changes` made; empty when nothing is asked."""
        asked = {
            "plan": self.plan, "status": self.status_text, "actor": str(self.actor or ""),
            "limit": "" if self.limit == DEFAULT_LIMIT else str(self.limit),
        } | changes  # fmt: skip
        text = urlencode({name: value for name, value in asked.items() if value})
        return f"?{text}" if text else ""


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads for the pages. Raises Unavailable when Redis does not serve."""

    store: RecordStore
    shards_total: int

    async def overview(self, filters: Filters, task_state: TaskState) -> Overview:
        asked = self.store.plan(filters.plan) if filters.plan else self.store.latest_plan()
        plan, moves = await asyncio.gather(asked, self._moves(filters))
        # A plan's moves are created at one time. By launch within it, so that a row never moves once it is there.
        moves.sort(key=lambda move: (move.created_at, move.started_at or 0.0, move.id), reverse=True)
        return Overview(plan=plan, moves=tuple(MoveView.of(move, task_state) for move in moves[: filters.limit]))

    async def move(self, move_id: str, task_state: TaskState) -> tuple[MoveView, list[ActorMigration]] | None:
        """A move and its actors' migrations."""
        move, rows = await asyncio.gather(self.store.move(move_id), self.store.actors(move_id))
        if move is None:
            return None
        return MoveView.of(move, task_state), [ActorMigration.of(move, row) for row in rows]

    async def migrations(self, filters: Filters) -> list[ActorMigration]:
        """As `ferry migrations` lists them, the newest move first."""
        actor = filters.actor
        found = await asyncio.gather(
            *(
                self.store.migrations(
                    status=status, plan=filters.plan, actor=str(actor) if actor else None, limit=filters.limit,
                    # An actor's moves are found among its shard's instead of among all.
                    shard=shard_of(actor, self.shards_total) if actor else None,
                )
                for status in filters.statuses
            )
        )  # fmt: skip
        return sorted(chain.from_iterable(found), key=lambda row: row.created_at, reverse=True)[: filters.limit]

    async def _moves(self, filters: Filters) -> list[Move]:
        if filters.actor is not None:
            ids = dict.fromkeys(row.move_id for row in await self.migrations(filters))
            read = await asyncio.gather(*(self.store.move(move_id) for move_id in ids))
            return [move for move in read if move is not None]
        # With all, ask for those in flight as well: in a plan of more moves than are shown they must not be missing.
        statuses = (*IN_FLIGHT, None) if filters.statuses == (None,) else filters.statuses
        found = await asyncio.gather(*(self.store.moves(filters.plan, filters.limit, status) for status in statuses))
        return list({move.id: move for move in chain.from_iterable(found)}.values())[: filters.limit]
