"""Celery as far as the migration steps see it: chains, retries with back-off, errbacks, and everything it may do wrong.

A task that a worker took comes back after the visibility timeout unless it was acknowledged, which happens when it has
ended (acks late). A worker killed between the two round trips of taking a task loses it for good.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from contextvars import Context
from dataclasses import dataclass, field, replace
from random import Random

from routing.errors import InDoubt, PermanentError, Timeout, TransientError
from workflows import migration
from workflows.context import StepContext
from workflows.driver import STEP_RETRIES
from workflows.records import STEPS, Move

ROLLBACK = "rollback"
CONCURRENCY = 3  # tasks at a time in one worker

_STEP = {step.name: step for step in migration.CHAIN}


@dataclass(frozen=True, slots=True)
class Task:
    """One step of one move, or of a convoy."""

    move_ids: tuple[str, ...]
    step: str
    attempt: int = 0
    ids: Mapping[str, str] = field(default_factory=dict)  # of its chain's tasks, by step


class Broker:
    """The queue. `lost`, `doubled` and `late` are the chances of a task to be so."""

    def __init__(self, chance: Random, *, visibility_timeout_s: float) -> None:
        self.lost = self.doubled = self.late = 0.0
        self.sent = self.faults = 0
        self.under_way = 0  # tasks that are on their way to the queue
        self.unacknowledged: dict[int, Task] = {}
        self.queue: deque[Task] = deque()
        self._chance, self._visibility_timeout_s = chance, visibility_timeout_s
        self._outside = Context()
        self._taken = 0
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def idle(self) -> bool:
        return not (self.queue or self.unacknowledged or self.under_way)

    # -- sending -----------------------------------------------------------------------------------------------------
    async def launch(self, *moves: Move) -> None:
        """What `workflows.migration.launch` does: one chain from the step that the moves wait for."""
        first = moves[0]
        self.send(Task(tuple(move.id for move in moves), first.step or STEPS[0], ids=first.task_ids))

    def send(self, task: Task, after_s: float = 0.0) -> None:
        self.sent += 1
        delay_s = after_s + self._chance.uniform(0.0005, 0.003)
        fate = self._chance.random() if self.lost or self.doubled or self.late else 1.0
        if fate < self.late:
            self.faults += 1
            delay_s += self._chance.uniform(0.5, 6.0)
        elif fate < self.late + self.doubled:
            self.faults += 1
            self._arrive_later(task, delay_s + self._chance.uniform(0.0, 4.0))
        self._arrive_later(task, delay_s)

    def _arrive_later(self, task: Task, delay_s: float) -> None:
        self.under_way += 1
        asyncio.get_running_loop().call_later(delay_s, self._arrive, task, context=self._outside)

    def _arrive(self, task: Task) -> None:
        self.under_way -= 1
        self.queue.append(task)
        waiting, self._waiting = self._waiting, []
        for one in waiting:  # all of them: some may be dead or stopped by now
            if not one.done():
                one.set_result(None)

    # -- taking ------------------------------------------------------------------------------------------------------
    async def take(self) -> tuple[int, Task]:
        while not self.queue:
            arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(arrived)
            await arrived
        task = self.queue.popleft()
        self._taken += 1
        number = self._taken
        if self.lost and self._chance.random() < self.lost:
            self.faults += 1
            return 0, replace(task, step="")  # nobody has it now
        self.unacknowledged[number] = task
        asyncio.get_running_loop().call_later(
            self._visibility_timeout_s, self._restore, number, context=self._outside
        )  # fmt: skip
        return number, task

    def acknowledge(self, number: int) -> None:
        self.unacknowledged.pop(number, None)

    def _restore(self, number: int) -> None:
        task = self.unacknowledged.pop(number, None)
        if task is not None:
            self.under_way += 1
            self._arrive(task)

    # -- a worker ----------------------------------------------------------------------------------------------------
    async def work(self, context: StepContext) -> None:
        """One of a worker's threads."""
        while True:
            number, task = await self.take()
            if task.step:
                await self._run(task, context)
            self.acknowledge(number)

    async def _run(self, task: Task, context: StepContext) -> None:
        try:
            try:
                async with asyncio.timeout(context.settings.task_time_limit_s):
                    if task.step == ROLLBACK:
                        await migration.roll_back_together(context, task.move_ids)
                    else:
                        parted = await migration.driver.drive(
                            _STEP[task.step], context, task.move_ids, task.attempt, task.ids[task.step]
                        )
                        for move_id in parted.lost:
                            self.send(Task((move_id,), ROLLBACK))
                        for move in parted.behind:
                            first = Task((move.id,), move.step or STEPS[0], task.attempt + 1, move.task_ids)
                            self.send(first, self._countdown_s(task.attempt))
            except TimeoutError as error:
                raise Timeout("step did not end in time") from error
        except (TransientError, InDoubt):
            if task.attempt < STEP_RETRIES:
                self.send(replace(task, attempt=task.attempt + 1), self._countdown_s(task.attempt))
            elif task.step != ROLLBACK:
                self.send(Task(task.move_ids, ROLLBACK))
        except PermanentError:
            if task.step != ROLLBACK:
                self.send(Task(task.move_ids, ROLLBACK))
        else:
            following = STEPS.index(task.step) + 1 if task.step != ROLLBACK else len(STEPS)
            if following < len(STEPS):
                self.send(Task(task.move_ids, STEPS[following], ids=task.ids))

    def _countdown_s(self, attempt: int) -> float:
        return migration.RETRY_FIRST_S * 2**attempt * self._chance.uniform(1, 2)
