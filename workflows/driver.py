"""What a task of the chain does with its step: takes it once for each move that it carries, and gets ahead of the next.

    alone       a step that is not its move's turn is let alone; one before it that is not on record is taken first
    ahead       what follows from a step that is done is begun while Celery hands the chain on (workflows/ahead.py)
    together    small moves share a chain, a convoy; one that fails for now leaves it, the others do not wait for it

What the steps do, and why they may be repeated, is in workflows/migration.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import structlog

from routing.errors import FerryError, InDoubt, NotApplicable, PermanentError, Timeout, TransientError, WrongSequence
from workflows.ahead import Ahead
from workflows.context import SAVE_ATTEMPTS, StepContext
from workflows.records import STEPS, TERMINAL, Move, in_a_new_chain

log = structlog.get_logger("ferry.migration")

STEP_RETRIES = (
    4  # then the move rolls back; with the back-off of its tasks that is 1.5 to 3 s, well within the pause lease
)
ERROR_CHARACTERS = 500  # of a refusal on record: every save and every event of the move repeats it
GRACE_S = 0.5  # while actors stand still; far more than moves of one convoy are apart when nothing is wrong
BEHIND_S = (0.005, 0.02)  # steps are recorded while the chain is handed on: another worker may have to wait a moment

Act = Callable[[StepContext, Move], Awaitable[Move]]


class _Hurried(Timeout):
    """A try was given up because others in its chain had taken the step."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step: its name, what it does, and how urgent its task is."""

    name: str
    act: Act
    priority: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Parted:
    """The moves that do not go on with their chain: `lost` are to be rolled back, `behind` launched again alone."""

    lost: Sequence[str] = ()
    behind: Sequence[Move] = ()


class Driver:
    """Takes the steps of one chain, in any process that has their tasks."""

    def __init__(self, chain: Sequence[Step]) -> None:
        self._chain = tuple(chain)
        self._pause, *self._preparing, self._delete = self._chain  # those in between follow from it, ABORT undoes them
        self.before_commit = self._preparing[-1]

    async def drive(
        self, step: Step, context: StepContext, move_ids: Sequence[str], attempt: int, task_id: str
    ) -> Parted:
        """What one task does: take its step of one move, or of a convoy. Returns and raises as `take_together`."""
        if step is self._pause and attempt == 0:
            await self._stand_in_line(context, move_ids, task_id)
        if len(move_ids) > 1:
            return await self.take_together(step, context, move_ids, attempt, task_id)
        await self.take(step, context, move_ids[0], attempt)
        return Parted()

    async def take(
        self, step: Step, context: StepContext, move_id: str, attempt: int, *, convoy_task: str | None = None
    ) -> bool:
        """Take one step of a move if it is its turn; otherwise return quietly: it was taken, or the move has ended.

        A step before it that is not recorded, because its worker died too early, is taken again first. With the id of
        its convoy's task, a move that has left the convoy is let alone as well. Returns whether the move is past the
        step and goes on with this chain; False for one that had ended before, or has another.
        """
        if attempt == 0 and await context.relieves(move_id, step.name):
            self.go_on_ahead(step, context, move_id)
            return True
        async with context.turn(move_id):
            return await self._take(step, context, move_id, attempt, convoy_task)

    async def _take(
        self, step: Step, context: StepContext, move_id: str, attempt: int, convoy_task: str | None = None
    ) -> bool:
        move = await context.recall(move_id, fresh=attempt > 0)
        for pause_s in BEHIND_S:
            if _waits_for(move, convoy_task, _before(step)):  # another worker's record, perhaps on its way
                await asyncio.sleep(pause_s)
                move = await context.recall(move_id, fresh=True)
        while move is not None and _waits_for(move, convoy_task, _up_to(step)):
            due = self._chain[STEPS.index(move.step)]
            try:
                done = await self._act(due, context, move, attempt)
            except WrongSequence:
                move = await context.recall(move_id, fresh=True)
                if move is None or move.status not in TERMINAL:
                    raise
                continue  # another worker, or whoever ends moves, has recorded the end meanwhile
            if due is step:
                self.go_on_ahead(step, context, move_id, done)
                return True
            move = await context.recall(move_id)
        log.info("step does not apply", step=step.name, move=move_id, status=move.status if move else "unknown")
        return _waits_for(move, convoy_task, STEPS)

    def go_on_ahead(self, step: Step, context: StepContext, move_id: str, done: Move | None = None) -> None:
        """Begin to take what may be taken while Celery hands the chain on from a step that is `done`, or was before."""
        if step is self._pause and done is not None and done.status not in TERMINAL:
            context.run_ahead(
                move_id, [step.name for step in self._preparing], partial(self._prepare_ahead, context, done)
            )
        elif step is self.before_commit:
            context.run_ahead(move_id, [self._delete.name], partial(self._commit_ahead, context, move_id))
        else:
            context.write_down(move_id)

    async def _prepare_ahead(self, context: StepContext, move: Move, ahead: Ahead) -> None:
        """The steps up to COMMIT, as far as the source has taken them. The next one's own task goes on from there."""
        await context.prepare(move, [step.name for step in self._preparing])
        for step in self._preparing:
            if not context.is_prepared(move.id, step.name):
                return
            context.failpoints.hit(f"{step.name}.begin")
            move = await step.act(context, replace(move, attempts=move.attempts + 1))
            context.failpoints.hit(f"{step.name}.end")
            ahead.taken(step.name)

    async def _commit_ahead(self, context: StepContext, move_id: str, ahead: Ahead) -> None:
        """COMMIT, once the steps before it are on record. A refusal is kept for its task, as that one's first try."""
        try:
            async with context.turn(move_id):
                await self._take(self._delete, context, move_id, 0)
        except (PermanentError, TransientError, InDoubt) as error:
            ahead.refused(error)
            raise
        ahead.taken(self._delete.name)

    async def _act(self, step: Step, context: StepContext, move: Move, attempt: int) -> Move:
        """One step. What is refused is written into the move's record: whoever ends it may not have heard of it."""
        plan = await context.store.plan(move.plan_id) if step is self._pause else None
        if plan is not None and plan.cancelled:
            return await context.settle(move.id, error="its plan was cancelled") or move
        try:
            context.failpoints.hit(f"{step.name}.begin")
            done = await step.act(context, replace(move, attempts=move.attempts + 1 + attempt, error=None))
        except (PermanentError, TransientError, InDoubt) as error:
            await _write_refusal(step, context, move.id, error, attempt)
            raise
        context.failpoints.hit(f"{step.name}.end")
        log.info("step done", step=step.name, move=move.id, unit=move.unit, status=done.status)
        return done

    async def take_together(
        self, step: Step, context: StepContext, move_ids: Sequence[str], attempt: int, task_id: str
    ) -> Parted:
        """Take one step of every move of a convoy; returns those that cannot go on with the others.

        What may pass is raised while no move has taken the step, and then all are tried again. Once one has, its actors
        would stand still for the tries of the others: those leave the convoy, and soon, for one try of a pause lasts
        as long as handlers may. Nobody stands still for a move that has ended, or goes on in another chain.
        Who was merely hurried has not failed, not at the last attempt either: it has one try more, alone.
        """
        outcomes = await _together(
            self.take(step, context, move_id, attempt, convoy_task=task_id) for move_id in move_ids
        )
        errors = {
            move_id: outcome
            for move_id, outcome in zip(move_ids, outcomes, strict=True)
            if isinstance(outcome, BaseException)
        }
        for error in errors.values():
            if not isinstance(error, (PermanentError, TransientError, InDoubt)):
                raise error
        lost = [
            move_id
            for move_id, error in errors.items()
            if isinstance(error, PermanentError) or (attempt >= STEP_RETRIES and not isinstance(error, _Hurried))
        ]
        may_pass = [move_id for move_id in errors if move_id not in lost]
        if may_pass and True not in outcomes:
            raise errors[may_pass[0]]
        left = [await self._leave(step, context, move_id, task_id) for move_id in may_pass]
        return Parted(lost=lost, behind=[move for move in left if move is not None])

    async def _leave(self, step: Step, context: StepContext, move_id: str, task_id: str) -> Move | None:
        """Have a move leave its convoy: its record names new task ids for the steps before it. Returns that record.

        None when it needs no chain of its own: it has taken the step or ended, and somebody else wrote that down, or it
        has another chain. Should this process die before that chain is sent, the reconciler sends one. While its record
        cannot be written the move stays: the next task of the convoy takes this step of it first, and after the last
        the reconciler sends it again.
        """
        context.standing_still.end(move_id)
        try:
            async with context.turn(move_id):
                for _ in range(SAVE_ATTEMPTS):
                    move = await context.recall(move_id, fresh=True)
                    if move is None or not _waits_for(move, task_id, _up_to(step)):
                        return None
                    with suppress(WrongSequence):
                        return await context.store.save(in_a_new_chain(move, now=context.now()))
        except (TransientError, InDoubt) as error:
            log.warning("stays in its convoy", step=step.name, move=move_id, error=str(error))
        return None

    async def _stand_in_line(self, context: StepContext, move_ids: Sequence[str], task_id: str) -> None:
        """Before the first gate of a chain is closed: copy ahead, and let the chain before it commit.

        A move that is alone in its chain, with none before it, is copied ahead by its `pause`.
        """
        if len(move_ids) > 1 or context.standing_still.would_wait(move_ids):
            convoy_task = task_id if len(move_ids) > 1 else None
            async with context.standing_still.copying_ahead(move_ids):
                await asyncio.gather(*(self._copy_ahead(context, move_id, convoy_task) for move_id in move_ids))
        await context.standing_still.begin(move_ids)

    async def _copy_ahead(self, context: StepContext, move_id: str, convoy_task: str | None) -> None:
        """LOCK one move and copy it ahead, with its gate open. `pause` tells what fails."""
        async with context.turn(move_id):
            move = await context.recall(move_id)
            if move is None or not _waits_for(move, convoy_task, [self._pause.name]):
                return
            try:
                entry = await context.lock(move)
                await context.ask_through(move.source, "precopy", replace(move, epoch=entry.ownership.epoch))
            except (PermanentError, TransientError, InDoubt, WrongSequence) as error:
                log.info("not copied ahead", move=move_id, error=str(error))


async def _together(tries: Iterable[Coroutine[Any, Any, bool]]) -> list[BaseException | bool]:
    """What each try has raised, or returned. Once one is True, the others have GRACE_S left: `_Hurried` then."""
    tasks = [asyncio.create_task(one) for one in tries]
    try:
        waiting, left_s = set(tasks), None
        while waiting and left_s is None:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            passed = any(not task.cancelled() and task.exception() is None and task.result() for task in done)
            left_s = GRACE_S if passed else None
        if waiting:
            await asyncio.wait(waiting, timeout=left_s)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    hurried = _Hurried(f"it takes more than {GRACE_S:g} s longer than others in its chain")
    return [hurried if task.cancelled() else task.exception() or task.result() for task in tasks]


def _before(step: Step) -> Sequence[str]:
    return STEPS[: STEPS.index(step.name)]


def _up_to(step: Step) -> Sequence[str]:
    return (*_before(step), step.name)


def _waits_for(move: Move | None, convoy_task: str | None, steps: Sequence[str]) -> bool:
    """Whether a move has one of these steps before it, and no other chain to take it."""
    if move is None or move.status in TERMINAL or move.step not in steps:
        return False
    return convoy_task is None or convoy_task in move.task_ids.values()


async def _write_refusal(step: Step, context: StepContext, move_id: str, error: FerryError, attempt: int) -> None:
    """Note in a move's record why a try of a step has failed; the next step that passes takes that away.

    Raises Unavailable, Timeout when the move ends with this error, and the record cannot be written: the rollback runs
    elsewhere. That the map, or the record, has moved on says nothing of why it did, so a refusal before that stays.
    """
    last = isinstance(error, PermanentError) or attempt >= STEP_RETRIES
    if isinstance(error, WrongSequence) and not last:
        return
    try:
        move = await context.recall(move_id, fresh=True)
        if move is None or move.status in TERMINAL:
            return
        kept = move.error if isinstance(error, (NotApplicable, WrongSequence)) else None
        attempts = move.attempts + 1 + attempt if last else move.attempts
        with suppress(WrongSequence):  # it has gone on meanwhile, and what went wrong is in the log
            said = kept or f"{step.name}: {error}"[:ERROR_CHARACTERS]
            await context.store.save(replace(move, error=said, attempts=attempts))
    except TransientError as away:
        if last:
            raise
        log.warning("refusal not on record", step=step.name, move=move_id, error=str(error), reason=str(away))
