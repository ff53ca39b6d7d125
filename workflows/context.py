"""What a step acts on: the map, the nodes, the records. One per worker process, made on first use."""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import structlog
import uvloop
from msgspec import Struct

from routing import control, shard_map
from routing.birth import read_birth
from routing.control import ROWS_PER_PAGE, StepRequest
from routing.directory import Directory, MapEntry
from routing.errors import (
    Incompatible,
    InvalidInput,
    NotApplicable,
    Timeout,
    TransientError,
    Unavailable,
    WrongSequence,
)
from routing.failpoints import Failpoints
from routing.identity import Identity
from routing.link import Link
from routing.nats_link import NatsLink
from routing.settings import Settings
from routing.shard_map import Outcome
from routing.subjects import Subjects
from routing.typed import Count, taken_as
from workflows import settlement
from workflows.ahead import Ahead
from workflows.foreground import collect_less_often
from workflows.records import STEPS, TERMINAL, ActorRow, MigrationStatus, Move, advance
from workflows.settlement import Settlement
from workflows.standing_still import StandingStill
from workflows.store import RecordStore

log = structlog.get_logger("ferry.context")

K = TypeVar("K")
T = TypeVar("T")

MOVES_RECALLED = 256  # a worker has few moves on their way at a time
PROMPT_S = 0.01  # a status is recorded by then at the latest; most often several go in one save
SAVE_ATTEMPTS = 8  # a move has six steps, each of which is saved once at most, as a rule


class _Page(Struct):
    rows: list[ActorRow]
    next: Count | None = None


class StepContext:
    """The world of a migration step. Knows nothing of Celery, so that tests and simulation drive steps directly."""

    def __init__(
        self, *, link: Link, subjects: Subjects, directory: Directory, store: RecordStore, settings: Settings,
        failpoints: Failpoints | None = None, wall_clock: Callable[[], float] = time.time,
        identity: Identity | None = None,
    ) -> None:  # fmt: skip
        self.identity = identity  # None: somebody else looks after it
        self.link, self.subjects, self.directory, self.store = link, subjects, directory, store
        self.settings, self.failpoints = settings, failpoints or Failpoints()
        self.now = wall_clock
        self.standing_still = StandingStill(asyncio.get_running_loop().time)
        self._saving: OrderedDict[str, asyncio.Task[Move]] = OrderedDict()
        self._revisions: OrderedDict[str, int] = OrderedDict()  # of the records as saved behind their steps
        self._unsaved: dict[str, list[tuple[Move, Sequence[ActorRow]]]] = {}
        self._about_to_save: set[str] = set()
        self._ahead: OrderedDict[str, Ahead] = OrderedDict()
        self._running: set[asyncio.Task[None]] = set()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._answers: OrderedDict[tuple[str, str], dict[str, Any]] = OrderedDict()
        self._taken_at: OrderedDict[tuple[str, str], float] = OrderedDict()

    def turn(self, move_id: str) -> asyncio.Lock:
        """Who holds it is alone in taking a step of this move here: a chain that comes twice may run twice at once."""
        return self._turns.setdefault(move_id, asyncio.Lock())

    # -- running ahead -----------------------------------------------------------------------------------------------
    def run_ahead(self, move_id: str, steps: Sequence[str], work: Callable[[Ahead], Coroutine[Any, Any, None]]) -> None:
        """Take steps of a move while Celery still hands its chain on; their tasks then find them taken."""
        ahead = Ahead(steps)

        async def run() -> None:
            try:
                await work(ahead)
            finally:
                ahead.end()
                self.write_down(move_id)

        _keep(self._ahead, move_id, ahead)
        task = asyncio.get_running_loop().create_task(run())
        self._running.add(task)
        task.add_done_callback(self._ran)

    def _ran(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.info("not taken ahead, its task will tell", error=str(error))

    def relieved(self, move_id: str, step: str) -> bool:
        """Whether this process takes a step ahead of its task, which then has nothing to do. Any thread may ask."""
        ahead = self._ahead.get(move_id)
        return ahead is not None and ahead.relieves(step)

    async def relieves(self, move_id: str, step: str) -> bool:
        """The same, once it is certain of the last step that this process is just about to take. Raises its refusal."""
        ahead = self._ahead.get(move_id)
        return ahead is not None and await ahead.take(step)

    async def prepare(self, move: Move, steps: Sequence[str]) -> None:
        """Have the source take steps that follow from the pause in one go, unless it has done so together with that.

        `ask` then has what it answered, as far as it got.
        """
        known = [self._answers.get((move.id, step), {}) for step in steps]
        if all("ok" in answer for answer in known) or any("error" in answer for answer in known):
            return
        asking = asyncio.get_running_loop().create_task(self._ask(move.source, "prepare", move))
        await asyncio.wait([asking], timeout=PROMPT_S)
        if not asking.done():
            self.write_down(move.id)
        self.keep_prepared(move.id, await asking)

    def keep_prepared(self, move_id: str, answers: Any) -> None:
        """Keep what a source has answered to steps that were not asked for one by one."""
        for verb, answer in answers.items() if isinstance(answers, dict) else ():
            if isinstance(answer, dict):
                _keep(self._answers, (move_id, verb), answer)
                if "ok" in answer:
                    self.taken(move_id, verb, answer.get("ago_s"))

    def taken(self, move_id: str, verb: str, ago_s: Any) -> None:
        """A node says how long ago it took a step; the record will name that time."""
        _keep(self._taken_at, (move_id, verb), self.now() - _seconds(ago_s))

    def is_prepared(self, move_id: str, verb: str) -> bool:
        """Whether `ask` has the answer already, and it is no refusal: that is for the step's own task."""
        return "ok" in self._answers.get((move_id, verb), {})

    # -- asking a node -----------------------------------------------------------------------------------------------
    async def ask(self, node: str, verb: str, move: Move, *, offset: int = 0, ahead: bool = False) -> dict[str, Any]:
        """Ask a node for one verb of a move. Raises what the node reported, Unavailable, Timeout."""
        prepared = self._answers.pop((move.id, verb), None) if offset == 0 else None
        if prepared is not None:
            return control.result_in(prepared)
        self.write_down(move.id)  # what it has passed is saved while the node is at work
        return await self._ask(node, verb, move, offset=offset, ahead=ahead)

    async def _ask(self, node: str, verb: str, move: Move, *, offset: int = 0, ahead: bool = False) -> dict[str, Any]:
        request = StepRequest(
            move=move.id, unit=move.unit, epoch=move.epoch or 0, source=move.source, destination=move.destination,
            offset=offset, ahead=ahead,
        )  # fmt: skip
        return await control.ask(self.link, self.subjects, node, verb, request, timeout_s=self.settings.step_timeout_s)

    async def ask_through(
        self, node: str, verb: str, move: Move, *, ahead: bool = False
    ) -> tuple[Move, dict[str, Any]]:
        """Ask again while the node answers that it is still at it; the record then says so, or a reconciler steps in.

        Returns the move as recorded last, and the last answer.
        """
        answer = await self.ask(node, verb, move, ahead=ahead)
        while answer.get("pending"):
            move = await self._save_behind(replace(move, step_at=self.now()))
            answer = await self.ask(node, verb, move, ahead=ahead)
        return move, answer

    async def ask_rows(self, node: str, verb: str, move: Move) -> list[ActorRow]:
        """Ask for a verb that answers with a row per actor, page by page. Raises InvalidInput for another answer."""
        rows: list[ActorRow] = []
        offset: int | None = 0
        while offset is not None:
            answer = await self.ask(node, verb, move, offset=offset)
            page = taken_as(_Page, answer, f"answer of {node} to {verb}")
            if page.next not in (None, offset + ROWS_PER_PAGE):
                raise InvalidInput(f"{node} answered {verb} with rows that go on at {page.next}")
            if any(row.version is None or row.digest is None for row in page.rows):
                raise InvalidInput(f"{node} answered {verb} with rows that lack a version or a digest")
            rows.extend(page.rows)
            offset = page.next
        return rows

    # -- writing down ------------------------------------------------------------------------------------------------
    async def reached(self, move: Move, status: MigrationStatus, **changes: Any) -> Move:
        """Record that a move has reached a status. Raises WrongSequence when somebody else recorded meanwhile."""
        return await self.store.save(advance(move, status, now=self.now(), **changes))

    def passed(self, move: Move, status: MigrationStatus, *, actors: Sequence[ActorRow] = (), **changes: Any) -> Move:
        """Note that a move is past a step, to be recorded soon (`write_down`), while Celery hands its chain on.

        `recall` waits for the save and sees its failure. Should this process die first, the record is some steps
        behind; the next task then takes those again.
        """
        taken_at = self._taken_at.pop((move.id, move.step or ""), math.inf)  # when its node took it, if ahead of us
        # As far as can be told: one answer may have been on its way for longer than the next, and seem to be after it.
        taken_at = max(taken_at, move.step_at or -math.inf)
        after = advance(move, status, now=min(taken_at, self.now()), **changes)
        self._unsaved.setdefault(move.id, []).append((after, actors))
        return after

    def write_down(self, move_id: str) -> None:
        """Begin to save what a move has passed, unless a save is just about to begin, which takes it along."""
        if move_id in self._unsaved and move_id not in self._about_to_save:
            self._about_to_save.add(move_id)
            saving = asyncio.get_running_loop().create_task(self._save_passed(move_id, self._saving.get(move_id)))
            saving.add_done_callback(lambda done: done.cancelled() or done.exception())  # it is the next step's
            _keep(self._saving, move_id, saving)

    async def _save_passed(self, move_id: str, before: asyncio.Task[Move] | None) -> Move:
        """Save what a move has passed since the save `before` this one, on whose revision it builds."""
        try:
            if before is not None:
                await before
        finally:
            passed = self._unsaved.pop(move_id)
            self._about_to_save.discard(move_id)
        *through, (last, _) = passed
        rows = {row.index: row for _, rows in passed for row in rows}
        return await self._save_on_top(last, actors=list(rows.values()), through=[move for move, _ in through])

    async def _save_on_top(self, move: Move, *, actors: Sequence[ActorRow] = (), through: Sequence[Move] = ()) -> Move:
        """Save a move on top of what this process saved behind its steps last."""
        move = replace(move, revision=max(move.revision, self._revisions.get(move.id, 0)))
        saved = await self.store.save(move, actors=actors, through=through)
        _keep(self._revisions, move.id, saved.revision)
        return saved

    async def _save_behind(self, move: Move) -> Move:
        """Save a move after what it has passed. Raises WrongSequence when somebody else recorded meanwhile."""
        self.write_down(move.id)
        before = self._saving.get(move.id)
        if before is not None:
            await asyncio.shield(before)
        return await self._save_on_top(move)

    async def recall(self, move_id: str, *, fresh: bool = False) -> Move | None:
        """A move's record as this process saved it last, or, with `fresh` or without such, as stored.

        The former may be out of date: then nodes refuse what is asked, and the store what is saved. Raises Unavailable,
        Timeout when that save failed.
        """
        self.write_down(move_id)
        saving = self._saving.get(move_id)
        if saving is not None:
            try:
                saved = await asyncio.shield(saving)
            except WrongSequence as error:
                log.info("record was saved by another", move=move_id, error=str(error))
            except TransientError:
                if not fresh:
                    raise  # the step is tried again, later each time, and reads what is stored
            else:
                if not fresh:
                    return saved
            finally:  # whoever was told to end meanwhile leaves it to the next to wait for
                if saving.done() and self._saving.get(move_id) is saving:
                    del self._saving[move_id]
        stored = await self.store.move(move_id)
        if stored is not None and stored.revision < self._revisions.get(move_id, 0):
            self._revisions[move_id] = stored.revision  # Redis has lost what it had acknowledged
        return stored

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
            return await self.reached(move, MigrationStatus.COMPLETED, error=None)
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


def _seconds(value: Any) -> float:
    """How long ago something was, as a node says; now, when it says nothing that can be."""
    return float(value) if type(value) in (int, float) and 0 <= value < math.inf else 0.0


def _keep(kept: OrderedDict[K, T], name: K, value: T) -> None:
    kept[name] = value
    kept.move_to_end(name)
    while len(kept) > MOVES_RECALLED * len(STEPS):
        kept.popitem(last=False)


class Worker:
    """The bridge from Celery's threads to one event loop with one NATS connection.

    One per process id, made on first use: a forked pool child must not share its parent's connection, and nothing
    connects at import. Celery has no native asyncio: an `async def` task is silently never run.
    """

    _current: Worker | None = None
    _guard = threading.Lock()

    def __init__(self, settings: Settings) -> None:
        collect_less_often()
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

    def relieved(self, step: str, move_ids: Sequence[str]) -> bool:
        """Whether the task of a step has nothing to do for any of the moves: then no thread has to wait for another."""
        context = self._context
        return context is not None and all(context.relieved(move_id, step) for move_id in move_ids)

    def begin(self, act: Callable[[StepContext, str], object], move_ids: Sequence[str]) -> None:
        """Have the loop call `act` for each move soon. For what a `relieved` step leaves to be begun."""
        assert self._context is not None
        for move_id in move_ids:
            self._loop.call_soon_threadsafe(act, self._context, move_id)

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
            context = self._context = await self._same_or_new(self._context)
        return await act(context)

    async def _same_or_new(self, context: StepContext | None) -> StepContext:
        """The context, or a new one when NATS holds another cluster by now: a worker keeps nothing worth ending for.

        Raises Unavailable, Timeout, Incompatible.
        """
        if context is not None and context.identity is not None:
            try:
                await context.identity.confirm()
            except Incompatible as error:
                log.warning("begun anew", error=str(error))
                self._context = await open_context(self._settings)
                await context.link.close()
                await context.store.close()
                return self._context
        return context or await open_context(self._settings)


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
            failpoints=Failpoints.from_environment(), identity=Identity(link, subjects, born),
        )  # fmt: skip
    except BaseException:
        await link.close()
        raise
