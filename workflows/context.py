"""What a step acts on: the map, the nodes, the records. One per worker process, made on first use."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import structlog
import uvloop

from routing import control, shard_map
from routing.birth import read_birth
from routing.control import ROWS_PER_PAGE, StepRequest
from routing.directory import Directory, MapEntry
from routing.errors import InvalidInput, NotApplicable, Timeout, TransientError, Unavailable, WrongSequence
from routing.failpoints import Failpoints
from routing.jsonlike import shown
from routing.link import Link
from routing.nats_link import NatsLink
from routing.settings import Settings
from routing.shard_map import Outcome
from routing.subjects import Subjects
from workflows import settlement
from workflows.records import TERMINAL, ActorRow, MigrationStatus, Move, advance
from workflows.settlement import Settlement
from workflows.store import RecordStore

log = structlog.get_logger("ferry.context")

K = TypeVar("K")
T = TypeVar("T")

MOVES_RECALLED = 256  # a worker has few moves on their way at a time
SAVE_ATTEMPTS = 8  # a move has six steps, each of which saves once


class StepContext:
    """The world of a migration step. Knows nothing of Celery, so that tests and simulation drive steps directly."""

    def __init__(
        self, *, link: Link, subjects: Subjects, directory: Directory, store: RecordStore, settings: Settings,
        failpoints: Failpoints | None = None, wall_clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.link, self.subjects, self.directory, self.store = link, subjects, directory, store
        self.settings, self.failpoints = settings, failpoints or Failpoints()
        self.now = wall_clock
        self._saving: OrderedDict[str, asyncio.Task[Move]] = OrderedDict()
        self._asked: OrderedDict[tuple[str, str], asyncio.Task[dict[str, Any]]] = OrderedDict()

    # -- asking a node -----------------------------------------------------------------------------------------------
    async def ask(self, node: str, verb: str, move: Move, *, offset: int = 0) -> dict[str, Any]:
        """Ask a node for one verb of a move. Raises what the node reported, Unavailable, Timeout."""
        asked = self._asked.pop((move.id, verb), None) if offset == 0 else None
        return await (asked if asked is not None else self._ask(node, verb, move, offset))

    def ask_ahead(self, node: str, verb: str, move: Move) -> None:
        """Ask for the verb of the step that comes next, while Celery hands the chain on. `ask` then has the answer.

        For verbs that may as well be asked twice, or for nothing: all but COMMIT, which waits for its own task.
        """
        _begin(self._asked, (move.id, verb), self._ask(node, verb, move, 0))

    async def _ask(self, node: str, verb: str, move: Move, offset: int) -> dict[str, Any]:
        request = StepRequest(
            move=move.id, unit=move.unit, epoch=move.epoch or 0, source=move.source, destination=move.destination,
            offset=offset,
        )  # fmt: skip
        return await control.ask(self.link, self.subjects, node, verb, request, timeout_s=self.settings.step_timeout_s)

    async def ask_through(self, node: str, verb: str, move: Move) -> tuple[Move, dict[str, Any]]:
        """Ask again while the node answers that it is still at it; the record then says so, or a reconciler steps in.

        Returns the move as recorded last, and the last answer.
        """
        answer = await self.ask(node, verb, move)
        while answer.get("pending"):
            move = await self.store.save(replace(move, step_at=self.now()))
            answer = await self.ask(node, verb, move)
        return move, answer

    async def ask_rows(self, node: str, verb: str, move: Move) -> list[dict[str, Any]]:
        """Ask for a verb that answers with a row per actor, page by page."""
        rows: list[dict[str, Any]] = []
        offset: int | None = 0
        while offset is not None:
            page = await self.ask(node, verb, move, offset=offset)
            following = page.get("next")
            if not isinstance(page.get("rows"), list) or not (following is None or following == offset + ROWS_PER_PAGE):
                raise InvalidInput(f"{node} answered {verb} with {shown(page)}: expected a page of rows")
            rows.extend(page["rows"])
            offset = following
        return rows

    # -- writing down ------------------------------------------------------------------------------------------------
    async def reached(
        self, move: Move, status: MigrationStatus, *, actors: list[ActorRow] | None = None, **changes: Any
    ) -> Move:
        """Record that a move has reached a status. Raises WrongSequence when somebody else recorded meanwhile."""
        return await self.store.save(advance(move, status, now=self.now(), **changes), actors=actors or [])

    def passed(
        self, move: Move, status: MigrationStatus, *, actors: list[ActorRow] | None = None, **changes: Any
    ) -> Move:
        """Record that a move is past a step, while Celery hands its chain on. `recall` waits for it and sees failures.

        Should this process die first, the record is a step behind; the next step then takes that one again.
        """
        after = advance(move, status, now=self.now(), **changes)
        _begin(self._saving, move.id, self.store.save(after, actors=actors or []))
        return after

    async def recall(self, move_id: str, *, fresh: bool = False) -> Move | None:
        """A move's record as this process saved it last, or, with `fresh` or without such, as stored.

        The former may be out of date: then nodes refuse what is asked, and the store what is saved. Raises Unavailable,
        Timeout when that save failed.
        """
        saving = self._saving.pop(move_id, None)
        if saving is not None:
            try:
                saved = await saving
            except WrongSequence as error:
                log.info("record was saved by another", move=move_id, error=str(error))
            except TransientError:
                if not fresh:
                    raise  # the step is tried again, later each time, and reads what is stored
            else:
                if not fresh:
                    return saved
        return await self.store.move(move_id)

    # -- the map -----------------------------------------------------------------------------------------------------
    async def lock(self, move: Move) -> MapEntry:
        """LOCK the unit for this move, or find it locked for it already.

        The previous move of the unit is recorded first: the lock's own outcome will overwrite what the map says of
        it. Raises NotApplicable when the unit has changed since the move was planned, WrongSequence, InDoubt.
        """
        entry = await self.directory.refresh(move.unit)
        if entry is None:
            raise NotApplicable(f"{move.unit} has no owner: nothing to move")
        if entry.ownership.move == move.id:
            return entry
        if entry.revision != move.lock_revision or entry.ownership.outcome_of(move.id) is not None:
            raise NotApplicable(f"{move.unit} has changed hands since this move was planned: plan again")
        previous = entry.ownership.last
        if previous is not None:
            await self.settle(previous.move)
        locked = shard_map.lock(entry.ownership, move=move.id, destination=move.destination)
        return await self.directory.transition(move.unit, entry, locked)

    async def settle(self, move_id: str, *, error: str | None = None) -> Move | None:
        """End a move from what the map says of it, aborting it if it is still locked. Safe for anyone, any time.

        completed     the map says committed, whatever went wrong afterwards: roll forward
        cancelled     it was never launched, or an operator stopped its plan
        rolled_back   the map says aborted, or was never locked for it

        Raises Unavailable, Timeout, InDoubt: the outcome is not known yet, ask again.
        """
        for _ in range(SAVE_ATTEMPTS):
            move = await self.store.move(move_id)
            if move is None or move.status in TERMINAL:
                return move
            try:
                return await self._end(move, error)
            except WrongSequence:
                continue  # it advanced meanwhile, or was launched even: what was concluded may no longer be true
        raise Unavailable(f"record of move {move_id} changed {SAVE_ATTEMPTS} times while being ended: try again")

    async def _end(self, move: Move, error: str | None) -> Move:
        """Write down how `move` ended, as the map tells now. Raises WrongSequence when its record has changed."""
        if await self._outcome(move) is Outcome.COMMITTED:
            return await self.reached(move, MigrationStatus.COMPLETED)
        plan = await self.store.plan(move.plan_id)
        cancelled = move.started_at is None or (plan is not None and plan.cancelled)
        status = MigrationStatus.CANCELLED if cancelled else MigrationStatus.ROLLED_BACK
        return await self.reached(move, status, error=error or move.error or "aborted: nobody drove it on in time")

    async def _outcome(self, move: Move) -> Outcome:
        """How the map ended this move; a lock still held is aborted, and one still in flight is fenced off."""

        def change(view: shard_map.Ownership) -> shard_map.Ownership:
            match self._settlement(move):
                case Settlement.ABORT:
                    return shard_map.abort(view, move=move.id)
                case Settlement.FENCE:
                    return replace(view)
                case verdict:
                    raise NotApplicable(f"nothing to write for {move.id}: {verdict}")

        with suppress(NotApplicable):
            await self.directory.decide(move.unit, change)
        match self._settlement(move):
            case Settlement.COMMITTED:
                return Outcome.COMMITTED
            case Settlement.ABORTED:
                return Outcome.ABORTED
            case verdict:
                raise Unavailable(f"{move.unit} was read too early to tell how {move.id} ends ({verdict}): read again")

    def _settlement(self, move: Move) -> Settlement:
        entry = self.directory.get(move.unit)
        return settlement.settlement(
            entry.ownership if entry is not None else None, entry.revision if entry is not None else 0,
            move=move.id, lock_revision=move.lock_revision,
        )  # fmt: skip


def _begin(begun: OrderedDict[K, asyncio.Task[T]], name: K, work: Coroutine[Any, Any, T]) -> None:
    """Begin something that a later step waits for. Its failure is that step's, or nobody's if that never comes."""
    task = begun[name] = asyncio.get_running_loop().create_task(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    while len(begun) > MOVES_RECALLED:
        begun.popitem(last=False)


class Worker:
    """The bridge from Celery's threads to one event loop with one NATS connection.

    One per process id, made on first use: a forked pool child must not share its parent's connection, and nothing
    connects at import. Celery has no native asyncio: an `async def` task is silently never run.
    """

    _current: Worker | None = None
    _guard = threading.Lock()

    def __init__(self, settings: Settings) -> None:
        self._settings, self._pid = settings, os.getpid()
        self._loop = uvloop.new_event_loop()
        self._context: StepContext | None = None
        self._connecting: asyncio.Lock | None = None
        threading.Thread(target=self._loop.run_forever, name="ferry-worker-loop", daemon=True).start()

    @classmethod
    def get(cls, settings: Settings) -> Worker:
        with cls._guard:
            if cls._current is None or cls._current._pid != os.getpid():
                cls._current = cls(settings)
            return cls._current

    def run(self, act: Callable[[StepContext], Coroutine[Any, Any, T]]) -> T:
        """Run `act` on the loop and wait for it, at most the task time limit. Raises Timeout after that."""
        future = asyncio.run_coroutine_threadsafe(self._run(act), self._loop)
        try:
            return future.result(timeout=self._settings.task_time_limit_s)
        except TimeoutError as error:
            future.cancel()
            raise Timeout(f"step did not end within {self._settings.task_time_limit_s:g} s") from error

    async def _run(self, act: Callable[[StepContext], Coroutine[Any, Any, T]]) -> T:
        if self._connecting is None:
            self._connecting = asyncio.Lock()
        async with self._connecting:
            if self._context is None:
                self._context = await open_context(self._settings)
        return await act(self._context)


async def open_context(settings: Settings, *, name: str = "ferry-worker") -> StepContext:
    """Connect to NATS and Redis. Raises Unavailable, Incompatible."""
    link = await NatsLink.connect(settings.nats_url, name=name)
    try:
        born = await read_birth(link, settings.subjects)
        subjects = Subjects(settings.cluster, born.logs)
        directory = Directory(link, subjects, shards_total=born.shards, timeout_s=settings.append_timeout_s)
        store = RecordStore.connect(settings.redis_url, settings.cluster)
        return StepContext(
            link=link, subjects=subjects, directory=directory, store=store, settings=settings,
            failpoints=Failpoints.from_environment(),
        )  # fmt: skip
    except BaseException:
        await link.close()
        raise
