"""Bringing an actor in memory to the end of its log: load, verify, replay, claim. The log is the truth."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import assert_never

from routing.errors import NotApplicable, Quarantined
from routing.settings import Settings
from runtime import rules
from runtime.actor import ActorClasses
from runtime.journal import History, Journal, Kind, Record
from runtime.live_actor import LiveActor, replay
from runtime.memory import Limits
from runtime.rules import Standing
from runtime.turn import Turn
from runtime.unit import Unit


class Fenced(NotApplicable):
    """The log holds a higher epoch than this node serves at: whoever wrote it owns the actor now."""


class CatchUp:
    """Who has an actor to itself asks this for its present state."""

    def __init__(
        self, *, journal: Journal, classes: ActorClasses, settings: Settings, incarnation: str, counters: Counter[str]
    ) -> None:
        self._journal, self._classes, self._settings = journal, classes, settings
        self._incarnation, self._counters = incarnation, counters

    async def look_again(self, unit: Unit, live: LiveActor) -> None:
        """Make sure that the instance is the end of the log as the leader has it now, and ours."""
        live.unverified = True
        await self.make_current(unit, live)

    async def make_current(self, unit: Unit, live: LiveActor, still_alone: Callable[[], None] = lambda: None) -> None:
        """Load, verify and claim as needed; afterwards the instance is the end of the log and ours to append to.

        Only who has the actor to itself may call: its running mailbox, or a capture while the unit is paused. The
        latter passes `still_alone`, which raises once the pause is over; it is asked after every wait, before anything
        of the actor is changed.

        Raises Fenced, Quarantined, StateNotPortable, UnknownActorType, and what reading and appending raise.
        """
        if live.unverified:
            await self._verify(unit, live, still_alone)
        if live.dirty:
            history = await self._journal.load(live.actor_id)
            still_alone()
            self._check(unit, live, history.version, history.epoch)
            await self._restore(live, history, still_alone)
            self._counters["activations"] += 1
        if rules.must_claim(tail_epoch=live.epoch, fence=unit.fence):
            claim = Record(kind=Kind.CLAIM, epoch=unit.epoch, incarnation=self._incarnation, trail=live.trail)
            live.dirty = True
            version = await self._journal.append(live.actor_id, claim, after=live.version)
            still_alone()
            live.dirty = False
            live.stored(claim, version)

    async def _verify(self, unit: Unit, live: LiveActor, still_alone: Callable[[], None]) -> None:
        """Compare an actor that came by a move with the end of its log: the log is the truth, the state a cache."""
        tail = await self._journal.tail(live.actor_id)
        still_alone()
        version, record = tail if tail is not None else (0, None)
        standing = self._check(unit, live, version, record.epoch if record is not None else 0)
        live.dirty = live.unverified = False
        if standing is Standing.BEHIND and tail is not None:
            await self._replay_to(live, tail, still_alone)

    async def replay_on(self, live: LiveActor) -> None:
        """Bring an actor that only the caller knows to the end of its log. It is of no use when this raises."""
        tail = await self._journal.tail(live.actor_id)
        if tail is not None and tail[0] > live.version:
            await self._replay_to(live, tail, lambda: None)
            if live.dirty:
                await self._restore(live, await self._journal.load(live.actor_id))

    async def _restore(self, live: LiveActor, history: History, still_alone: Callable[[], None] = lambda: None) -> None:
        await live.restore(
            self._classes.get(live.actor_id.actor_type), history, limits=Limits.of(self._settings),
            max_state_bytes=self._settings.max_state_bytes, still_alone=still_alone,
        )  # fmt: skip

    async def _replay_to(self, live: LiveActor, tail: tuple[int, Record], still_alone: Callable[[], None]) -> None:
        """Replay what the log has after the held version, if it still has it; else leave the actor dirty."""
        assert live.memory is not None
        live.dirty = True
        history = await self._journal.after(live.actor_id, live.version, tail)
        still_alone()
        if history is None or live.instance is None:
            return
        turn = Turn(asyncio.get_running_loop().time)
        for _, record in history.records:
            replay(live.instance, live.memory, record)
            if turn.over():
                await turn.next()
                still_alone()
        live.stand_at(
            live.instance, live.memory, version=history.version, epoch=history.epoch,
            trail=(*tail[1].trail, history.version),
        )  # fmt: skip
        self._counters["replayed"] += len(history.records)

    def _check(self, unit: Unit, live: LiveActor, version: int, epoch: int) -> Standing:
        standing = rules.compare(
            held_version=live.version, held_epoch=unit.epoch, tail_version=version, tail_epoch=epoch
        )
        match standing:
            case Standing.FENCED:
                raise Fenced(f"log of {live.actor_id} is at epoch {epoch}, {unit.name} here at {unit.epoch}: not ours")
            case Standing.SHORTER:
                self._counters["quarantined"] += 1
                raise Quarantined(
                    f"log of {live.actor_id} ends at {version}, but {live.version} was acknowledged: NATS lost data;"
                    " restore its storage, then restart this node"
                )
            case Standing.CURRENT | Standing.BEHIND:
                return standing
            case _:
                assert_never(standing)
