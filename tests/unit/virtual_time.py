"""Tests on virtual time: waiting costs nothing (runtime/testing/virtual_time.py)."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any

from runtime.testing.virtual_time import WALL_OFFSET_S, VirtualTimeLoop, clock, wall_clock

__all__ = ["WALL_OFFSET_S", "clock", "run_virtually", "until", "virtually", "wall_clock"]

UNTIL_S = 60.0


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
