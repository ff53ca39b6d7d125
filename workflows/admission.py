"""Moves on their way: planned ones wait, a few at a time are launched, until the map says how each ended.

A chain of six tasks costs its worker about the same however much it carries, so shards of few actors that go the same
way share one: a convoy, bounded by its moves, actors and bytes; a shard of more than that goes alone. What stands still
at once is bounded by chains per node and by actors per node. The latter follow how long moves stand still: fewer after
one that took longer than the blackout budget, more again after those that did not. Convoys do not become smaller by
that: on a slow machine smaller ones, which are more chains, stood still for as long.
"""

from __future__ import annotations

import asyncio
import math
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import replace

import structlog

from routing.directory import Directory, MapEntry
from routing.errors import WrongSequence
from routing.subjects import unit_in_words
from workflows.context import StepContext
from workflows.records import STEPS, TERMINAL, Move, in_a_new_chain
from workflows.store import RecordStore

log = structlog.get_logger("ferry.admission")

CHAIN_ACTORS = 256  # of a convoy: about 30 ms of work for each node, all of it while its actors stand still
CHAIN_BYTES = 2**20  # of their state: 20 ms on the wire at 50 MB/s

ROOM_MOST, ROOM_LEAST, ROOM_STEP = 2 * CHAIN_ACTORS, 32, 16  # one chain runs whatever its shard holds


class Admission:
    """Launches chains while source and destination of the next move have room: that bounds what is ever paused.

    `waiting` and `running` are a leader's view; both are rebuilt from the store by the next one.
    """

    def __init__(
        self, *, store: RecordStore, directory: Directory, context: StepContext,
        launch: Callable[..., Awaitable[None]], moves_at_once: int, wall_clock: Callable[[], float],
        moves_per_chain: int = 1, blackout_budget_s: float = math.inf,
    ) -> None:  # fmt: skip
        """`launch(*moves)` sends one chain for all of them."""
        self.waiting: dict[str, Move] = {}  # in the order of their plans
        self.running: dict[str, Move] = {}
        self._store, self._directory, self._context = store, directory, context
        self._launch, self._moves_at_once, self._wall_clock = launch, moves_at_once, wall_clock
        self._moves_per_chain, self._budget_s = moves_per_chain, blackout_budget_s
        self._room = ROOM_MOST  # actors of a node that may stand still at once, as the budget has allowed lately
        self._ended: dict[str, None] = {}  # lately; how long they stood still is not known yet

    @property
    def busy(self) -> bool:
        """Whether anything is planned or under way."""
        return bool(self.waiting or self.running)

    def take_over(self, unfinished: Iterable[Move]) -> None:
        """Go on where an earlier leader stopped."""
        moves = list(unfinished)
        self.waiting = {move.id: move for move in moves if move.started_at is None}
        self.running = {move.id: move for move in moves if move.started_at is not None}

    def forget_all(self) -> None:
        self.waiting, self.running = {}, {}
        self._ended.clear()

    def add(self, moves: Iterable[Move]) -> None:
        self.waiting.update({move.id: move for move in moves})

    def on_map(self, unit: str, entry: MapEntry) -> bool:
        """A move that the map has ended makes room before its record is written. True when there is room now."""
        last = entry.ownership.last
        if last is None or self.running.pop(last.move, None) is None:
            return False
        self._ended[last.move] = None
        log.info("move ended", move=last.move, unit=unit, outcome=last.outcome)
        return True

    async def _learn(self) -> None:
        """Read how long the moves that ended stood still, as far as their records tell already."""
        ended = list(self._ended)
        found = {move.id: move for move in await self._store.moves_named(ended)} if ended else {}
        for move_id in ended:
            move = found.get(move_id)
            if move is not None and move.status not in TERMINAL:
                continue
            known = self._ended.pop(move_id, 0) is None  # or the lead was lost meanwhile
            if known and move is not None and (stood_s := _stood_still_s(move)) is not None:
                self._adapt(stood_s)

    def _adapt(self, stood_s: float) -> None:
        """Less may stand still at once after a move that took longer than the budget, a little more after another."""
        if stood_s > self._budget_s:
            self._room = max(self._room * 7 // 8, ROOM_LEAST)
        else:
            self._room = min(self._room + ROOM_STEP, ROOM_MOST)

    async def drop_waiting(self, why: str) -> None:
        """End what was planned and not launched: the next plan decides anew, beside what was asked for by hand.

        Raises Unavailable, Timeout.
        """
        by_hand: dict[str, bool] = {}  # by plan
        for move in list(self.waiting.values()):
            if move.plan_id not in by_hand:
                plan = await self._store.plan(move.plan_id)
                by_hand[move.plan_id] = plan is not None and plan.by_hand
            if not by_hand[move.plan_id]:
                await self._context.settle(move.id, error=why)
                self.waiting.pop(move.id, None)

    async def admit(self, takers: Collection[str], awaited: Collection[str] = ()) -> None:
        """Launch what there is room for, to nodes that may receive shards now; what has become impossible ends.

        What is to go to an `awaited` node waits: nobody has heard of that one, and it may live. Raises Unavailable when
        Redis cannot take it; it then still waits.
        """
        chains = {(move.source, move.destination, _chain_of(move)) for move in self.running.values()}
        busy = Counter(node for source, destination, _ in chains for node in (source, destination))
        still = Counter[str]()  # actors of each node that stand still, or soon will
        for move in self.running.values():
            still.update({move.source: move.actors_total, move.destination: move.actors_total})
        for move in list(self.waiting.values()):
            if move.id not in self.waiting or max(busy[move.source], busy[move.destination]) >= self._moves_at_once:
                continue
            if max(still[move.source], still[move.destination]) >= self._room:
                continue
            convoy = self._convoy(move)
            if await self._begin(convoy, takers, awaited):
                busy.update((move.source, move.destination))
                for node in (move.source, move.destination):
                    still[node] += sum(one.actors_total for one in convoy)
        await self._learn()

    def _convoy(self, first: Move) -> list[Move]:
        """`first` and those behind it that go the same way, as many as one chain may carry."""
        convoy, actors, state_bytes = [first], first.actors_total, first.state_bytes
        for move in self.waiting.values():
            if len(convoy) >= self._moves_per_chain or actors >= CHAIN_ACTORS or state_bytes >= CHAIN_BYTES:
                break
            if move is first or (move.source, move.destination) != (first.source, first.destination):
                continue
            if actors + move.actors_total <= CHAIN_ACTORS and state_bytes + move.state_bytes <= CHAIN_BYTES:
                convoy.append(move)
                actors, state_bytes = actors + move.actors_total, state_bytes + move.state_bytes
        return convoy

    async def _begin(self, convoy: Sequence[Move], takers: Collection[str], awaited: Collection[str]) -> bool:
        """Launch those of the moves that can begin now, with one chain. False when none can."""
        task_ids, began = {step: str(uuid.uuid4()) for step in STEPS}, self._wall_clock()
        outcomes = await asyncio.gather(
            *(self._begin_one(move, takers, awaited, task_ids, began) for move in convoy), return_exceptions=True
        )
        begun = [outcome for outcome in outcomes if isinstance(outcome, Move)]
        if begun:
            await self._launch(*begun)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome  # after the launch of the others: nobody else would drive them on soon
        return bool(begun)

    async def _begin_one(
        self, move: Move, takers: Collection[str], awaited: Collection[str], task_ids: dict[str, str], now: float
    ) -> Move | None:
        """Write down that a move begins; returns it as stored, None when it does not (yet)."""
        entry = self._directory.get(move.unit)
        why = ""
        if entry is None or entry.ownership.owner != move.source:
            why = f"{unit_in_words(move.unit)} went from {move.source} to another node before the launch"
        elif move.destination not in takers:
            if move.destination in awaited:
                return None
            why = f"node {move.destination} takes nothing now: `ferry status` says why"
        if entry is None or why:
            await self._context.settle(move.id, error=why)
            self.waiting.pop(move.id, None)
            return None
        if entry.ownership.incarnation is None or entry.ownership.move is not None:
            return None  # just being taken over, or another move is about to end: in a moment
        begun = replace(move, lock_revision=entry.revision, started_at=now, step_at=now, task_ids=task_ids)
        try:
            stored = await self._store.save(begun)
        except WrongSequence:
            await self._sort_anew(move)
            return None
        if self.waiting.pop(move.id, None) is None:
            return None  # no longer leading: who leads now finds it begun, and drives it on
        self.running[move.id] = stored
        return stored

    async def _sort_anew(self, move: Move) -> None:
        """Its record is another than we thought: our own save had landed, or another leader was at it."""
        latest = await self._store.move(move.id)
        if self.waiting.pop(move.id, None) is None or latest is None or latest.status in TERMINAL:
            return
        (self.waiting if latest.started_at is None else self.running)[move.id] = latest

    async def launch_again(self, move: Move) -> None:
        """Send the chain from the step it waits for once more, under new task ids."""
        stored = await self._store.save(in_a_new_chain(move, now=self._wall_clock()))
        self.running[move.id] = stored
        await self._launch(stored)


def _stood_still_s(move: Move) -> float | None:
    """How long the actors of an ended move stood still, as far as its record tells; None when they never did."""
    if move.blackout_ms is not None:
        return move.blackout_ms / 1000
    if move.paused_at is None or move.finished_at is None:
        return None
    return move.finished_at - move.paused_at


def _chain_of(move: Move) -> str:
    """What tells the chains of two moves apart: the id of their last task, which a move sent again shares with none."""
    return move.task_ids.get(STEPS[-1], move.id)
