"""Drives on or ends every move that does not advance, and finishes plans. Needs neither Celery nor a live chain.

Celery on Redis can lose a task for good: it pops a message and notes the pop in a second round trip, and a worker
killed between the two leaves it nowhere. The map always tells how a move stands, so nothing depends on a task.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import structlog

from routing.directory import Directory
from routing.lease import boottime_s
from workflows.admission import Admission
from workflows.context import StepContext
from workflows.records import STEPS, MigrationPlan, Move
from workflows.store import RecordStore

log = structlog.get_logger("ferry.reconciler")

EVERY_S = 1.0
STUCK_STEPS = 1.2  # step timeouts without advance before a step is sent again: more than one, less than the pause lease
RELAUNCHES = 2  # then a move that does not advance is ended


class Reconciler:
    """Compares unfinished records with the map. Only the leader runs one, but two would do no harm.

    How long a record has stood still is told by the reconciler's own clock, from when it first saw the record so: what
    workers write into records is their time of day, and one that is an hour ahead must not hold a move up for an hour.
    """

    def __init__(
        self, *, store: RecordStore, directory: Directory, context: StepContext, admission: Admission,
        records_kept: int, wall_clock: Callable[[], float], clock: Callable[[], float] = boottime_s,
    ) -> None:  # fmt: skip
        self._store, self._directory, self._context, self._admission = store, directory, context, admission
        self._records_kept, self._wall_clock, self._clock = records_kept, wall_clock, clock
        settings = context.settings
        self._stuck_s = STUCK_STEPS * settings.step_timeout_s
        # A plan that is just being written must not be taken for a dead leader's.
        self._orphan_s = settings.lock_lease_s
        # How long a record may lag behind the map before it is written here.
        self._lag_s = settings.append_timeout_s
        self._relaunched: Counter[str] = Counter()
        self._standing: dict[str, tuple[float | None, float]] = {}  # move -> its latest step, since when seen here

    async def reconcile(self) -> list[MigrationPlan]:
        """One round; returns the plans that have just finished.

        Raises Unavailable, Timeout while Redis or NATS is away: the next round goes on.
        """
        unfinished = {move.id: move for move in await self._store.unfinished_moves()}
        unreadable = await self._store.unreadable_moves(besides=unfinished.keys())
        for ended in self._admission.running.keys() - unfinished.keys():
            del self._admission.running[ended]
        self._relaunched = Counter({move_id: n for move_id, n in self._relaunched.items() if move_id in unfinished})
        known = unfinished.keys() | unreadable.keys()
        self._standing = {move_id: seen for move_id, seen in self._standing.items() if move_id in known}
        cancelled = {plan.id for plan in await self._store.running_plans() if plan.cancelled}
        for move in unfinished.values():
            if move.plan_id in cancelled:  # whoever cancelled it may have died on the way
                await self._context.settle(move.id, error="its plan was cancelled")
            elif move.id not in self._admission.waiting:
                await self._look_at(move)
        for move_id, revision in unreadable.items():
            if move_id not in self._admission.waiting:  # else its launch writes it anew
                await self._look_at_unreadable(move_id, revision)
        return await self._finish_plans()

    def _idle_s(self, move_id: str, latest: float | None) -> float:
        """For how long the move has been seen here at `latest`, its latest step ahead, launch or revision."""
        now_s = self._clock()
        known, since_s = self._standing.get(move_id, (latest, now_s))
        if known != latest:
            since_s = now_s
        self._standing[move_id] = latest, since_s
        return now_s - since_s

    async def _look_at(self, move: Move) -> None:
        idle_s = self._idle_s(move.id, move.step_at or move.started_at)
        if move.started_at is None:
            if idle_s > self._orphan_s:
                await self._context.settle(move.id, error="its plan was never completed: the leader died")
            return
        entry = self._directory.get(move.unit)
        if entry is None or entry.ownership.outcome_of(move.id) is not None:
            if idle_s > self._lag_s:
                await self._context.settle(move.id)
        elif idle_s > self._stuck_s:
            await self._drive_on(move, locked=entry.ownership.move == move.id)

    async def _look_at_unreadable(self, move_id: str, revision: int) -> None:
        """End it, or its plan never would. Until then whoever can read it, in a rolling upgrade, may go on with it.

        What it had locked its source has unlocked by then: that needs the map alone.
        """
        if self._idle_s(move_id, revision) > self._orphan_s:
            log.warning("move cannot be read: ending it", move=move_id, revision=revision)
            error = "its record could not be read, and nobody drove it on"
            await self._store.end_unreadable(move_id, revision=revision, now=self._wall_clock(), error=error)

    async def _drive_on(self, move: Move, *, locked: bool) -> None:
        self._relaunched[move.id] += 1
        if self._relaunched[move.id] > RELAUNCHES or not (locked or move.step == STEPS[0]):
            log.warning("move does not advance: ending it", move=move.id, unit=move.unit, step=move.step)
            await self._context.settle(move.id, error=move.error or f"{move.step}: no worker took this step in time")
        else:
            log.warning("move does not advance: its step is sent again", move=move.id, unit=move.unit, step=move.step)
            await self._admission.launch_again(move)

    async def _finish_plans(self) -> list[MigrationPlan]:
        finished, running = [], await self._store.running_plans()
        for plan_id in await self._store.end_unreadable_plans(
            besides=[plan.id for plan in running], now=self._wall_clock()
        ):
            log.warning("plan cannot be read: ended with its moves", plan=plan_id)
        for plan in running:
            if plan.completed + plan.failed >= plan.total:
                moves = await self._store.moves(plan_id=plan.id, limit=plan.total)
                ended_at = max((move.finished_at or 0.0 for move in moves), default=self._wall_clock())
                finished.append(await self._store.save_plan(replace(plan, finished_at=ended_at)))
        if finished:
            await self._store.trim(self._records_kept)
        return finished
