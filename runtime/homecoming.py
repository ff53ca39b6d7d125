"""The way back of an actor that had a key of its own (decision 8): RETIRE its key, then TAKE BACK into its shard's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from routing import shard_map
from routing.address import ActorId
from routing.directory import Directory
from routing.errors import Busy, InDoubt, NotApplicable, TransientError
from routing.subjects import actor_key
from runtime.unit import Unit, UnitState

log = structlog.get_logger("ferry.host")

RETRY_S = 0.05
RETIRE_AGAIN_S = 30.0  # after a handler outlived its time: until then it serves on


class Homecoming:
    """Gives actors that are no longer pinned back to their shards, where one node owns both."""

    def __init__(
        self, *, units: dict[str, Unit], directory: Directory, incarnation: str, reopen: Callable[[Unit], None],
        spawn: Callable[[Coroutine[Any, Any, None]], Any], may_serve: Callable[[], bool], clock: Callable[[], float],
        drain_handlers_s: float,
    ) -> None:  # fmt: skip
        self._units, self._directory, self._incarnation, self._reopen = units, directory, incarnation, reopen
        self._spawn, self._may_serve, self._clock = spawn, may_serve, clock
        self._drain_handlers_s = drain_handlers_s

    async def bring_back(self, unit: Unit, actor: ActorId) -> None:
        """Have an actor that is apart back in its shard, `unit`, if it is unpinned and this node owns both."""
        name = actor_key(actor)
        own, shard, held = self._directory.get(name), self._directory.get(unit.name), self._units.get(name)
        if own is None or shard is None or unit.state is not UnitState.OPEN or not self._directory.counts(name):
            return
        if own.ownership.retired:
            await self._take_back(unit, actor)
        elif held is None or held.state is not UnitState.OPEN or self._clock() < held.retire_from_s:
            return
        elif shard_map.may_retire(own.ownership, shard.ownership):
            held.state = UnitState.RETIRING
            self._spawn(self._retire(unit, held, actor))

    async def _retire(self, unit: Unit, held: Unit, actor: ActorId) -> None:
        """Close an actor's own unit, write RETIRE, and take the actor back.

        It is written once no handler runs, and it stays closed as long as nobody knows whether that has landed: its
        shard may go elsewhere and take the actor along, so nothing must be answered from here. It opens again only over
        a write that the late one cannot follow.
        """
        try:
            await held.quiet(self._drain_handlers_s)
        except Busy as error:
            log.warning("actor not back in its shard yet", actor=str(actor), error=str(error))
            held.retire_from_s = self._clock() + RETIRE_AGAIN_S
            if held.state is UnitState.RETIRING:
                self._reopen(held)  # nothing was written yet
            return
        while held.state is UnitState.RETIRING:
            try:
                own = await self._directory.refresh(held.name)
                shard = self._directory.get(unit.name)
                if held.state is not UnitState.RETIRING or own is None or shard is None or not self._may_serve():
                    continue
                back = shard_map.may_retire(own.ownership, shard.ownership)
                after = shard_map.retire(own.ownership, incarnation=self._incarnation) if back else own.ownership
                await self._directory.transition(held.name, own, after)
            except (TransientError, InDoubt, NotApplicable) as error:
                log.warning("actor not back in its shard yet", actor=str(actor), error=str(error))
            finally:
                if held.state is UnitState.RETIRING:
                    await asyncio.sleep(RETRY_S)
        await self._take_back(unit, actor)

    async def _take_back(self, unit: Unit, actor: ActorId) -> None:
        """TAKE BACK for an actor whose own key is retired; tried again at the next tick when it does not go through."""
        own, shard = self._directory.get(actor_key(actor)), self._directory.get(unit.name)
        if own is None or shard is None or not own.ownership.retired or unit.state is not UnitState.OPEN:
            return
        try:
            back = shard_map.take_back(shard.ownership, str(actor), own.ownership, incarnation=self._incarnation)
            await self._directory.transition(unit.name, shard, back)
        except (TransientError, InDoubt, NotApplicable) as error:
            log.info("actor not back in its shard yet", actor=str(actor), error=str(error))
