"""Long work in small turns, so that what else the event loop has to do is not held up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

TURN_S = 0.0005  # others wait at most so long for each piece of work; to yield after every actor costs a third more


class Turn:
    """One piece of work's turn on the event loop: ask whether it is `over` wherever the work may be interrupted."""

    __slots__ = ("_clock", "_ends_s")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ends_s = clock() + TURN_S

    def over(self) -> bool:
        """Whether the work has lasted long enough for now."""
        return self._clock() >= self._ends_s

    async def next(self) -> None:
        """Let others run and begin the next turn: what they can change is to be looked at again."""
        await asyncio.sleep(0)
        self._ends_s = self._clock() + TURN_S
