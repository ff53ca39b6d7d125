"""A long-running command: its event loop, its signals, and its patience with a NATS server that is not there yet."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from routing.errors import Unavailable
from routing.nats_link import NatsLink

log = structlog.get_logger("ferry.process")

PATIENCE_S = 30.0  # everything is started at once after a reboot; longer would hide a wrong FERRY_NATS_URL
RETRY_S = 0.5

# Objects made before the youngest generation is looked at, and so many looks before the next one is. Python's own are
# 700, 10, 10; larger ones hold memory in circles for longer, of which a node makes next to none.
GC_YOUNG, GC_MIDDLE, GC_OLD = 20_000, 20, 50

_STOPS = (signal.SIGTERM, signal.SIGINT)


def run_until_stopped(serve: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Run `serve(stopping)` to its end. The first SIGTERM or SIGINT sets `stopping`; a second one kills at once.

    Being killed is safe at any point, it only costs the failover time. What `serve` raises rises.
    """
    collect_less_often()
    with asyncio.Runner(loop_factory=_new_event_loop) as runner:
        runner.run(_serve_with_signals(serve))


def collect_less_often() -> None:
    """Leave what is loaded by now out of garbage collections, and let them come more rarely.

    Live actors are many long-lived objects: by default each full look at a hundred thousand of them stops the process
    for tens of milliseconds, and the small ones took 8 % of the time of a command when measured. A full look at what
    Celery alone has loaded is 35 ms, for which every actor on its way would stand still.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_YOUNG, GC_MIDDLE, GC_OLD)


async def _serve_with_signals(serve: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    stopping, loop = asyncio.Event(), asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        if stopping.is_set():
            log.warning("stopping at once: asked a second time", signal=number.name)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        log.info("stopping", signal=number.name)
        stopping.set()

    for number in _STOPS:
        loop.add_signal_handler(number, stop, number)
    try:
        await serve(stopping)
    finally:
        for number in _STOPS:
            loop.remove_signal_handler(number)


async def connect_patiently(
    url: str, *, name: str, stopping: asyncio.Event, patience_s: float = PATIENCE_S
) -> NatsLink | None:
    """Connect, trying for `patience_s` while no server answers. None when asked to stop meanwhile.

    Raises Unavailable after that, and Incompatible at once.
    """
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + patience_s
    warned = False
    while not stopping.is_set():
        try:
            return await NatsLink.connect(url, name=name)
        except Unavailable as error:
            if loop.time() >= deadline_s:
                raise
            if not warned:
                log.warning("waiting for NATS", at_most_s=patience_s, error=str(error))
                warned = True
        try:
            async with asyncio.timeout(RETRY_S):
                await stopping.wait()
        except TimeoutError:
            continue
    return None


def _new_event_loop() -> asyncio.AbstractEventLoop:
    import uvloop  # imported here, because most commands live too briefly to gain from it

    return uvloop.new_event_loop()
