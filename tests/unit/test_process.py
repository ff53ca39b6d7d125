"""Simulated processes: what a kill leaves undone, and what a stop puts off."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from runtime.testing import MemoryNats
from runtime.testing.process import Process
from runtime.testing.virtual_time import Stuck, VirtualTimeLoop
from tests.unit.virtual_time import clock, run_virtually


def with_processes(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test on a loop that is buried in the end: what a killed process left cannot be cancelled."""

    @functools.wraps(test)
    def run() -> None:
        loop = VirtualTimeLoop()
        try:
            loop.run_until_complete(test())
        finally:
            loop.bury()
            loop.close()

    return run


def resume(process: Process) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    loop.resume(process)


@with_processes
async def test_a_killed_process_runs_no_finally_block() -> None:
    """Property: after a kill nothing of the process happens any more, as after kill -9."""
    done: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(1)
            done.append("slept")
        finally:
            done.append("cleared up")

    process = Process("p")
    process.spawn(work())
    await asyncio.sleep(0.5)
    process.kill()
    await asyncio.sleep(5)

    assert done == []


@with_processes
async def test_a_stopped_process_does_late_what_was_due_and_in_that_order() -> None:
    """Property: timers and messages that came while it was stopped are seen when it goes on."""
    seen: list[tuple[str, float]] = []

    async def wait(name: str, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        seen.append((name, clock()))

    process = Process("p")
    began_s = clock()
    process.spawn(wait("second", 2))
    process.spawn(wait("first", 1))
    process.spawn(wait("third", 9))
    await asyncio.sleep(0.5)
    process.stop()
    await asyncio.sleep(4.5)
    assert seen == []
    resume(process)
    await asyncio.sleep(5)

    assert [name for name, _ in seen] == ["first", "second", "third"]
    assert [round(at_s - began_s, 6) for _, at_s in seen] == [5, 5, 9]


@with_processes
async def test_what_a_process_begins_belongs_to_it() -> None:
    """Property: tasks of tasks and handlers of its links stop with it."""
    nats, process, heard = MemoryNats(), Process("p"), list[bytes]()
    link, other = nats.link("p", process), nats.link("other")

    async def child() -> None:
        while True:
            await asyncio.sleep(1)
            heard.append(b"tick")

    async def main() -> None:
        await link.subscribe("news", lambda message: heard.append(message.payload))
        await asyncio.create_task(child())

    process.spawn(main())
    await asyncio.sleep(1.5)
    await other.publish("news", b"before")
    await asyncio.sleep(0.1)
    process.kill()
    await other.publish("news", b"after")
    await asyncio.sleep(5)

    assert heard == [b"tick", b"before"]


@with_processes
async def test_what_a_killed_process_had_sent_still_arrives() -> None:
    """Property: the network is outside of every process."""
    nats, process, heard = MemoryNats(latency=lambda: 0.5), Process("p"), list[bytes]()
    link, other = nats.link("p", process), nats.link("other")
    await other.subscribe("news", lambda message: heard.append(message.payload))
    process.spawn(link.publish("news", b"last words"))
    await asyncio.sleep(0.1)

    process.kill()
    link.die()
    await asyncio.sleep(5)

    assert heard == [b"last words"]


def test_a_run_that_can_never_go_on_says_so() -> None:
    """Property: waiting for ever is an error at once, not a test that hangs."""

    async def wait_for_ever() -> None:
        await asyncio.get_running_loop().create_future()

    loop = VirtualTimeLoop()
    waiting = wait_for_ever()
    with pytest.raises(Stuck):
        loop.run_until_complete(waiting)
    loop.bury()
    loop.close()


def test_timers_of_equal_time_run_in_the_order_they_were_set() -> None:
    """Property: nothing about a run is left to chance."""
    ran: list[int] = []

    async def main() -> None:
        for number in range(20):
            asyncio.get_running_loop().call_at(clock() + 1, ran.append, number)
        await asyncio.sleep(2)

    run_virtually(main())

    assert ran == list(range(20))
