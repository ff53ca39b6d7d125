"""One chain of a worker at a time stands still, as far as waiting a moment can bring that about.

The chains of a worker share its interpreter. Two that go through it at once take twice as long each, and their actors
stand still for all of it. So a chain copies ahead while the one before it stands still, and closes its gates when that
one has committed. It never waits long, for meanwhile it keeps a thread: what the other does then is its own affair.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

PATIENCE_S = 0.04  # about as long as a convoy stands still under load
LINE = 2  # chains that may wait; the worker's other threads are for those that stand still


class StandingStill:
    """Which moves of this process stand still. Only a matter of speed: nobody has to come or to leave."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until_s: dict[str, float] = {}  # move -> when it is not waited for any more
        self._over = asyncio.Event()
        self._line, self._waiting = asyncio.Lock(), 0

    @property
    def busy(self) -> bool:
        """Whether whoever comes now would have to wait."""
        return self._waiting < LINE and (self._waiting > 0 or self._left_s() > 0)

    async def begin(self, move_ids: Sequence[str]) -> None:
        """The moves of a chain stand still from now on; wait first for those that do already, in the order of calls."""
        if self._waiting < LINE:
            self._waiting += 1
            try:
                async with self._line:
                    await self._wait()
            finally:
                self._waiting -= 1
        until_s = self._clock() + PATIENCE_S
        self._until_s |= dict.fromkeys(move_ids, until_s)

    def end(self, move_id: str) -> None:
        """Its actors are served again, here or there. Idempotent."""
        if self._until_s.pop(move_id, None) is not None and not self._until_s:
            self._over.set()

    async def _wait(self) -> None:
        while (left_s := self._left_s()) > 0:
            self._over.clear()
            try:
                async with asyncio.timeout(left_s):
                    await self._over.wait()
            except TimeoutError:
                continue

    def _left_s(self) -> float:
        now_s = self._clock()
        self._until_s = {move_id: until_s for move_id, until_s in self._until_s.items() if until_s > now_s}
        return max(self._until_s.values(), default=now_s) - now_s
