"""Work that outlives the request which began it: who asks again hears how it stands, and in the end how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from routing.errors import FerryError


class Errand:
    """One piece of work in the background. `spawn` runs it; an error of the tree is kept for whoever asks.

    `told` is set once somebody has heard how it ended: asking again after that means doing it again.
    """

    def __init__(self, spawn: Callable[[Coroutine[Any, Any, None]], Any], work: Coroutine[Any, Any, None]) -> None:
        self.told = False
        self._ended = asyncio.Event()
        self._error: FerryError | None = None
        self._task: asyncio.Task[None] = spawn(self._run(work))

    async def _run(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except FerryError as error:
            self._error = error
        finally:
            self._ended.set()

    async def ends_within(self, timeout_s: float) -> bool:
        """Wait for the end, at most so long; False when it goes on. Raises what the work raised."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()
        except TimeoutError:
            return False
        self.told = True
        if self._error is not None:
            raise self._error
        return True

    def cancel(self) -> None:
        self._task.cancel()
