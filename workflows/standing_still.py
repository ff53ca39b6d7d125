"""Chains of a worker take turns, as far as waiting a moment can bring that about: one stands still, or some copy ahead.

The chains of a worker share its interpreter, and their nodes may share cores. Two that stand still at once take twice
as long each, and one takes a third longer while others copy ahead. So a chain copies ahead, beside others that do, when
none stands still; and closes its gates when those are done and the one before it is about to commit. It never waits
long, for it keeps a thread meanwhile: what the others do then is their own affair.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext

PATIENCE_S = 0.25  # on a slow machine two convoys stand still under load for so long, one after the other
LINE = 3  # chains that may wait; the worker's other threads are for those that go on


class StandingStill:
    """Which moves of this process stand still, or are copied ahead. Only a matter of speed: nobody has to take part."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._still, self._copying = _Moves(clock), _Moves(clock)
        self._ended = asyncio.Event()
        self._line, self._waiting = asyncio.Lock(), 0

    def would_wait(self, move_ids: Sequence[str]) -> bool:
        """Whether `begin` would: others stand still, are about to or copy ahead, and not too many wait."""
        return self._waiting < LINE and (self._line.locked() or self._others_at_it(move_ids))

    @asynccontextmanager
    async def copying_ahead(self, move_ids: Sequence[str]) -> AsyncIterator[None]:
        """The moves of a chain are copied ahead; wait first for others that stand still or are about to."""
        if self._waiting < LINE:
            await self._wait_while(lambda: self._line.locked() or self._still.others(move_ids), nullcontext())
        self._copying.begin(move_ids)
        try:
            yield
        finally:
            self._copying.end(move_ids)
            self._ended.set()

    async def begin(self, move_ids: Sequence[str]) -> None:
        """The moves of a chain stand still from now on; wait first for others that do, or copy ahead."""
        if self.would_wait(move_ids):
            await self._wait_while(lambda: self._others_at_it(move_ids), self._line)
        self._still.begin(move_ids)

    def end(self, move_id: str) -> None:
        """Its actors are served again, here or there, or are about to be. Idempotent."""
        self._still.end([move_id])
        self._ended.set()

    def _others_at_it(self, move_ids: Sequence[str]) -> bool:
        return self._still.others(move_ids) or self._copying.others(move_ids)

    async def _wait_while(self, busy: Callable[[], bool], line: AbstractAsyncContextManager[None]) -> None:
        """At most PATIENCE_S. `line` lets in by the order of the calls."""
        self._waiting += 1
        try:
            async with asyncio.timeout(PATIENCE_S), line:
                while busy():
                    self._ended.clear()
                    await self._ended.wait()
        except TimeoutError:
            pass
        finally:
            self._waiting -= 1


class _Moves:
    """Moves that are at something, each until it ends, or until nobody waits for it any more."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until_s: dict[str, float] = {}

    def begin(self, move_ids: Sequence[str]) -> None:
        self._until_s |= dict.fromkeys(move_ids, self._clock() + PATIENCE_S)

    def end(self, move_ids: Sequence[str]) -> None:
        for move_id in move_ids:
            self._until_s.pop(move_id, None)

    def others(self, move_ids: Sequence[str]) -> bool:
        """Whether there are other moves than these."""
        now_s = self._clock()
        self._until_s = {move_id: until_s for move_id, until_s in self._until_s.items() if until_s > now_s}
        return bool(self._until_s.keys() - set(move_ids))
