"""Long work in small turns, so that what else the event loop has to do is not held up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

TURN_S = 0.0005  # others wait at most so long for each piece of work; to yield after every actor costs a third more


class Turn:
    """One piece of work's turn on the event loop. Await `over()` wherever it may be interrupted."""

    __slots__ = ("_clock", "_ends_s")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ends_s = clock() + TURN_S

    async def over(self) -> bool:
        """Let others run when this turn has lasted long enough. True when they did: look again before going on."""
        if self._clock() < self._ends_s:
            return False
        await asyncio.sleep(0)
        self._ends_s = self._clock() + TURN_S
        return True
