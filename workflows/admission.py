"""Moves on their way: planned ones wait, a few at a time are launched, until the map says how each ended."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import replace

import structlog

from routing.directory import Directory, MapEntry
from routing.errors import WrongSequence
from workflows.context import StepContext
from workflows.records import STEPS, TERMINAL, Move
from workflows.store import RecordStore

log = structlog.get_logger("ferry.admission")


class Admission:
    """Launches chains while source and destination of the next move have room: that bounds what is ever paused.

    `waiting` and `running` are a leader's view; both are rebuilt from the store by the next one.
    """

    def __init__(
        self, *, store: RecordStore, directory: Directory, context: StepContext,
        launch: Callable[[Move], Awaitable[None]], moves_at_once: int, wall_clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self.waiting: dict[str, Move] = {}  # in the order of their plans
        self.running: dict[str, Move] = {}
        self._store, self._directory, self._context = store, directory, context
        self._launch, self._moves_at_once, self._wall_clock = launch, moves_at_once, wall_clock

    def take_over(self, unfinished: Iterable[Move]) -> None:
        """Go on where an earlier leader stopped."""
        moves = list(unfinished)
        self.waiting = {move.id: move for move in moves if move.started_at is None}
        self.running = {move.id: move for move in moves if move.started_at is not None}

    def forget_all(self) -> None:
        self.waiting, self.running = {}, {}

    def add(self, moves: Iterable[Move]) -> None:
        self.waiting.update({move.id: move for move in moves})

    def on_map(self, unit: str, entry: MapEntry) -> bool:
        """A move that the map has ended makes room before its record is written. True when there is room now."""
        last = entry.ownership.last
        if last is None or self.running.pop(last.move, None) is None:
            return False
        log.info("move ended", move=last.move, unit=unit, outcome=last.outcome)
        return True

    async def drop_waiting(self, why: str) -> None:
        """End what was planned and not launched: the next plan decides anew. Raises Unavailable, Timeout."""
        for move_id in list(self.waiting):
            await self._context.settle(move_id, error=why)
            self.waiting.pop(move_id, None)

    async def admit(self, alive: Collection[str]) -> None:
        """Launch what there is room for. Raises Unavailable when Redis cannot take it; it then still waits."""
        busy = Counter(node for move in self.running.values() for node in (move.source, move.destination))
        for move in list(self.waiting.values()):
            if max(busy[move.source], busy[move.destination]) >= self._moves_at_once:
                continue
            if await self._begin(move, alive):
                busy.update((move.source, move.destination))

    async def _begin(self, move: Move, alive: Collection[str]) -> bool:
        entry = self._directory.get(move.unit)
        if entry is None or entry.ownership.owner != move.source or move.destination not in alive:
            await self._context.settle(move.id, error=f"{move.unit} or its destination changed before the launch")
            self.waiting.pop(move.id, None)
            return False
        if entry.ownership.incarnation is None or entry.ownership.move is not None:
            return False  # just being taken over, or another move is about to end: in a moment
        now = self._wall_clock()
        task_ids = {step: str(uuid.uuid4()) for step in STEPS}
        begun = replace(move, lock_revision=entry.revision, started_at=now, step_at=now, task_ids=task_ids)
        try:
            stored = await self._store.save(begun)
        except WrongSequence:
            await self._sort_anew(move)
            return False
        if self.waiting.pop(move.id, None) is None:
            return False  # no longer leading: who leads now finds it begun, and drives it on
        self.running[move.id] = stored
        await self._launch(stored)
        return True

    async def _sort_anew(self, move: Move) -> None:
        """Its record is another than we thought: our own save had landed, or another leader was at it."""
        latest = await self._store.move(move.id)
        if self.waiting.pop(move.id, None) is None or latest is None or latest.status in TERMINAL:
            return
        (self.waiting if latest.started_at is None else self.running)[move.id] = latest

    async def launch_again(self, move: Move) -> None:
        """Send the chain from the step it waits for once more, under new task ids."""
        left = STEPS[STEPS.index(move.step or STEPS[0]) :]
        task_ids = move.task_ids | {step: str(uuid.uuid4()) for step in left}
        stored = await self._store.save(replace(move, step_at=self._wall_clock(), task_ids=task_ids))
        self.running[move.id] = stored
        await self._launch(stored)
