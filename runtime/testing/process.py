"""A simulated process: everything that was begun in it can be stopped, continued or killed without warning.

What belongs to a process is told by a context variable, which tasks, callbacks and timers inherit from whoever made
them. The loop (runtime/testing/virtual_time.py) asks it before each callback:

    kill    its callbacks are dropped: no `finally` runs, no answer is sent, as after kill -9
    stop    its callbacks are kept, as after SIGSTOP; what is due meanwhile happens late, in the order it was due

What a process has put on the wire stays there, for the network is outside of every process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar
from enum import StrEnum
from typing import Any


class ProcessState(StrEnum):
    UP = "up"
    STOPPED = "stopped"
    DEAD = "dead"


class Callback:
    """Something the loop is to run, now or later, and the process that it belongs to. What asyncio calls a handle."""

    __slots__ = ("_args", "_call", "_cancelled", "_context", "_when", "process")

    def __init__(
        self, when: float, call: Callable[..., object], args: tuple[Any, ...], context: Context,
        process: Process | None,
    ) -> None:  # fmt: skip
        self._when, self._call, self._args, self._context = when, call, args, context
        self._cancelled = False
        self.process = process

    def __repr__(self) -> str:
        return f"<callback {self._call!r} of {self.process}>"

    def run(self) -> None:
        self._context.run(self._call, *self._args)

    def cancel(self) -> None:
        self._cancelled = True
        self._args = ()

    def cancelled(self) -> bool:
        return self._cancelled

    def when(self) -> float:
        return self._when


class Process:
    """One process of a simulated machine. Made running; `kill` is for ever."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = ProcessState.UP
        self.parked: list[Callback] = []
        self._kept: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        return f"<process {self.name} {self.state}>"

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine as part of this process."""
        context = self.context()
        loop = asyncio.get_running_loop()
        return context.run(lambda: loop.create_task(coroutine, context=context))

    def context(self) -> Context:
        """A new context whose callbacks belong to this process."""
        context = Context()
        context.run(CURRENT.set, self)
        return context

    def stop(self) -> None:
        if self.state is ProcessState.UP:
            self.state = ProcessState.STOPPED

    def resume(self) -> list[Callback]:
        """SIGCONT; returns what was due meanwhile, for the loop to run now."""
        if self.state is ProcessState.STOPPED:
            self.state = ProcessState.UP
        parked, self.parked = self.parked, []
        return parked

    def kill(self) -> None:
        """Never runs again. Its tasks are kept from the garbage collector, which would run their `finally` blocks."""
        if self.state is not ProcessState.DEAD:
            self.state = ProcessState.DEAD
            self.parked.clear()
            self._kept |= asyncio.all_tasks()


CURRENT: ContextVar[Process | None] = ContextVar("process", default=None)
