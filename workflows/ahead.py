"""Steps of a move that this process takes before their tasks come: while Celery hands a chain on, nodes would be idle.

A task whose step is taken, or just being taken, has nothing left to do: the chain goes on. Only the last of the steps
is waited for, so that the task after it finds all of them done. What was refused, or takes long, is left to the tasks:
the next one takes it, and tells what is wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from routing.errors import FerryError


class Ahead:
    """How far one move has got ahead of its tasks. Only `relieves` may be called by any thread."""

    def __init__(self, steps: Sequence[str]) -> None:
        self._steps, self._taken = tuple(steps), set[str]()
        self._over = asyncio.Event()
        self._refusal: FerryError | None = None

    def taken(self, step: str) -> None:
        """The step is taken, and its record is being saved."""
        self._taken.add(step)

    def refused(self, error: FerryError) -> None:
        """The last step was tried as its task would have, and failed: the task fails with it, and is tried again."""
        self._refusal = error

    def end(self) -> None:
        """What was not taken until now is left to the tasks."""
        self._over.set()

    def relieves(self, step: str) -> bool:
        """Whether the task of a step has nothing left to do: it is taken, or is about to be and not the last one."""
        if step in self._taken:
            return True
        return step in self._steps[:-1] and not self._over.is_set()

    async def take(self, step: str) -> bool:
        """Wait until that is certain of a step, whichever way. Raises, once, why the last one was refused."""
        if step in self._steps and not self.relieves(step):
            await self._over.wait()
            refusal, self._refusal = self._refusal, None
            if refusal is not None:
                raise refusal
        return self.relieves(step)
