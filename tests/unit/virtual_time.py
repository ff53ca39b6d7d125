"""An event loop on which waiting costs nothing: when nothing is ready, the clock jumps to the next timer.

Leases of seconds expire in microseconds, in the same order every time. Threads would make that order chance, so
`run_in_executor` runs in place.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any

START_S = 1000.0
WALL_OFFSET_S = 1_700_000_000.0
UNTIL_S = 60.0


class _JumpingSelector(selectors.DefaultSelector):
    """Never blocks: what would be waited for is added to the loop's clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = START_S

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise AssertionError("stuck: no timer is set and nothing is ready, so nothing can ever happen")
            self.now_s += max(timeout, 0)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """`problems` holds what reached the loop's exception handler: errors that nobody looked at."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)
        self.problems: list[dict[str, Any]] = []
        self.set_exception_handler(lambda _loop, context: self.problems.append(context))

    def time(self) -> float:
        return self._jumping.now_s

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        future: asyncio.Future[Any] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future


def clock() -> float:
    return asyncio.get_running_loop().time()


def wall_clock() -> float:
    return WALL_OFFSET_S + clock()


def run_virtually(main: Coroutine[Any, Any, Any]) -> Any:
    """Run `main` on a loop of its own; an error that nobody looked at fails it too."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, VirtualTimeLoop)
        result = runner.run(main)
        assert loop.problems == []
        return result


def virtually(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Make an async test a plain one that runs on virtual time."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        run_virtually(test(*args, **kwargs))

    return run


async def until(condition: Callable[[], Any], within_s: float = UNTIL_S) -> Any:
    """Poll until `condition` holds; returns what it gave. Fails at the deadline, which is virtual time as well."""
    deadline_s = clock() + within_s
    while not (result := condition()):
        assert clock() < deadline_s, f"did not come true within {within_s} s of virtual time"
        await asyncio.sleep(0.01)
    return result
