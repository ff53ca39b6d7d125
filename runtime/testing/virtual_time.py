"""An event loop on which waiting costs nothing: when nothing is ready, the clock jumps to the next timer.

Leases of seconds expire in microseconds, in the same order every time: callbacks run in the order they were asked
for, timers in the order of their times, equal ones as they were set. Threads would make that order chance, so
`run_in_executor` runs in place.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from typing import Any

from runtime.testing.process import CURRENT, Callback, Process, ProcessState

START_S = 1000.0
WALL_OFFSET_S = 1_700_000_000.0
AWAITS_AT_END = 50  # more than the `finally` blocks of one task await


class Stuck(AssertionError):
    """Nothing is ready and no timer is set, so nothing can ever happen."""


class Buried(BaseException):
    """Raised in tasks that are ended after the end. No cancellation: a TaskGroup would wait for its tasks for ever."""


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """`problems` holds what reached the loop's exception handler: errors that nobody looked at.

    Runs the callbacks of simulated processes (runtime/testing/process.py) as those are up, stopped or dead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[dict[str, Any]] = []
        self.callbacks = 0  # run so far
        self._now_s = START_S
        self._timers: list[tuple[float, int, Callback]] = []
        self._timers_set = 0
        self._due: list[Callback] = []
        self._over = False
        self.set_exception_handler(lambda _loop, context: self.problems.append(context))

    def time(self) -> float:
        return self._now_s

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        future: asyncio.Future[Any] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def resume(self, process: Process) -> None:
        """SIGCONT: what was due while the process was stopped happens now."""
        self._due += process.resume()

    def bury(self) -> None:
        """End every task that is left without running it any further, and take no more callbacks.

        What dead processes left behind has `finally` blocks which expect a running loop; whatever they raise here is of
        no interest, and nobody is told of tasks that never ended.
        """
        self._over = True
        for task in asyncio.all_tasks(self):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            coroutine = task.get_coro()
            for _ in range(AWAITS_AT_END):
                try:
                    if isinstance(coroutine, Coroutine):
                        coroutine.throw(Buried())  # when it awaits in a `finally` block, once more
                except BaseException:
                    break

    # -- what asyncio calls ------------------------------------------------------------------------------------------
    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Any:  # type: ignore[override]
        if context is None:
            context = copy_context()
        soon = Callback(self._now_s, callback, args, context, context.get(CURRENT))
        if not self._over:
            self._due.append(soon)
        return soon

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Any:  # type: ignore[override]
        if context is None:
            context = copy_context()
        later = Callback(when, callback, args, context, context.get(CURRENT))
        self._timers_set += 1
        if not self._over:
            heapq.heappush(self._timers, (when, self._timers_set, later))
        return later

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Any:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Any:
        return self.call_soon(callback, *args, context=context)

    def _run_once(self) -> None:
        timers, due = self._timers, self._due
        if not due and not self._stopping:  # type: ignore[attr-defined]
            while timers and timers[0][2]._cancelled:
                heapq.heappop(timers)
            if not timers:
                raise Stuck("stuck: no timer is set and nothing is ready, so nothing can ever happen")
            self._now_s = max(self._now_s, timers[0][0])
        now_s = self._now_s
        while timers and timers[0][0] <= now_s:
            due.append(heapq.heappop(timers)[2])
        self._due = []
        for callback in due:
            if callback._cancelled:
                continue
            process = callback.process
            if process is not None and process.state is not ProcessState.UP:
                if process.state is ProcessState.STOPPED:
                    process.parked.append(callback)
                continue
            self.callbacks += 1
            try:
                callback._context.run(callback._call, *callback._args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                self.call_exception_handler({"message": f"error in {callback!r}", "exception": error})


def clock() -> float:
    return asyncio.get_running_loop().time()


def wall_clock() -> float:
    return WALL_OFFSET_S + clock()
