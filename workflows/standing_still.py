"""One chain of a worker at a time stands still, as far as waiting a moment can bring that about.

The chains of a worker share its interpreter. Two that go through it at once take twice as long each, and their actors
stand still for all of it. So a chain copies ahead while the one before it stands still, and closes its gates when that
one has committed. It never waits long, for it keeps a thread meanwhile: what the other does then is its own affair.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

PATIENCE_S = 0.12  # longer than all but one convoy in a hundred stand still under load, on a slow machine
LINE = 2  # chains that may wait; the worker's other threads are for those that stand still


class StandingStill:
    """Which moves of this process stand still. Only a matter of speed: nobody has to come or to leave."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until_s: dict[str, float] = {}  # move -> when it is not waited for any more
        self._over = asyncio.Event()
        self._line, self._waiting = asyncio.Lock(), 0

    def would_wait(self, move_ids: Sequence[str]) -> bool:
        """Whether `begin` would: others stand still, and the line is not too long."""
        return self._waiting < LINE and bool(self._others(move_ids))

    async def begin(self, move_ids: Sequence[str]) -> None:
        """The moves of a chain stand still from now on; wait first for others that do, at most PATIENCE_S."""
        if self.would_wait(move_ids):
            self._waiting += 1
            try:
                async with asyncio.timeout(PATIENCE_S), self._line:  # which lets in by the order of the calls
                    while self._others(move_ids):
                        self._over.clear()
                        await self._over.wait()
            except TimeoutError:
                pass
            finally:
                self._waiting -= 1
        self._until_s |= dict.fromkeys(move_ids, self._clock() + PATIENCE_S)

    def end(self, move_id: str) -> None:
        """Its actors are served again, here or there. Idempotent."""
        self._until_s.pop(move_id, None)
        if not self._others(()):
            self._over.set()

    def _others(self, move_ids: Sequence[str]) -> set[str]:
        now_s = self._clock()
        self._until_s = {move_id: until_s for move_id, until_s in self._until_s.items() if until_s > now_s}
        return self._until_s.keys() - set(move_ids)
