"""Races of nodes that once broke a promise of the protocol, each as a scene that states the promise."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from routing.address import ActorId
from routing.errors import FerryError, HandlerFailed, NotApplicable, Timeout, Unavailable
from routing.link import Entry, EntryHandler, Subscription
from runtime.testing import MemoryLink
from tests.unit.cluster import UNIT, Ledger, SmallCluster, cluster
from tests.unit.virtual_time import clock, until, virtually


class HeldLink:
    """A link whose reads of one actor's log wait until they are let go: a slow leader, for one subject."""

    def __init__(self, link: MemoryLink) -> None:
        self._link = link
        self.held = ""  # end of the subjects whose reads wait
        self.waiting = asyncio.Event()
        self.let_go = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    async def last(self, stream: str, subject: str, *, timeout_s: float) -> Entry | None:
        if self.held and subject.endswith(self.held):
            self.waiting.set()
            await self.let_go.wait()
        return await self._link.last(stream, subject, timeout_s=timeout_s)


class LateNewsLink:
    """A link whose watches bring nothing while they are late, and after that all of it, in order."""

    def __init__(self, link: MemoryLink) -> None:
        self._link = link
        self._late: list[Callable[[], None]] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    async def watch(self, stream: str, subject: str, handler: EntryHandler, *, timeout_s: float) -> Subscription:
        def arrived(entry: Entry) -> None:
            if self._late is None:
                handler(entry)
            else:
                self._late.append(partial(handler, entry))

        return await self._link.watch(stream, subject, arrived, timeout_s=timeout_s)

    def be_late(self) -> None:
        self._late = []

    def catch_up(self) -> None:
        late, self._late = self._late or [], None
        for deliver in late:
            deliver()


async def command_during_a_late_capture(small: SmallCluster) -> Any:
    """An aborted move's capture is still reading while an actor of its shard runs a command; the command's answer."""
    links: list[HeldLink] = []

    def wrap(link: MemoryLink) -> Any:
        links.append(HeldLink(link))
        return links[-1]

    await small.add("a", wrap=wrap)
    await small.add("b")
    await small.assign("a")
    await small.served_by("a")
    # given an actor that capture has to load again (its handler failed), and one behind it in the shard
    await small.send("first", "touch")
    await small.send("second", "write", entry=1)
    with pytest.raises(HandlerFailed):
        await small.send("first", "write_and_fail", entry=0)
    request = await small.lock("m1", "b")
    await small.step("pause", request)
    links[0].held = "=first"
    capture = asyncio.create_task(small.step("capture", request))
    await links[0].waiting.wait()

    # when the move is aborted meanwhile, and the second actor is just running a command when capture gets to it
    Ledger.open_gate = asyncio.Event()
    await small.abort("m1")
    await until(lambda: small.nodes["a"].node.host.units[UNIT].pause is None)
    writing = asyncio.create_task(small.send("second", "write_slowly", entry=2))
    await until(lambda: Ledger.entered == 1)
    links[0].held = ""
    links[0].let_go.set()
    with pytest.raises(FerryError):
        await capture
    Ledger.open_gate.set()
    return await writing


@virtually
async def test_a_pause_that_comes_before_the_news_of_its_abort_ends_with_it() -> None:
    """The source closes its gate by its own copy of the map, and opens it by that as well: nobody waits for a lease."""
    async with cluster() as small:
        links: list[LateNewsLink] = []

        def wrap(link: MemoryLink) -> Any:
            links.append(LateNewsLink(link))
            return links[-1]

        await small.add("a", wrap=wrap)
        await small.add("b")
        await small.assign("a")
        await small.served_by("a")
        await small.send("k", "write", entry=1)
        host = small.nodes["a"].node.host
        request = await small.lock("m", "b")
        await until(lambda: host.units[UNIT].ownership.move == "m")

        # given an ABORT that has not arrived when a pause comes that was sent before it
        links[0].be_late()
        await small.abort("m")
        await small.step("pause", request)
        assert host.units[UNIT].pause is not None
        began_s, waiting = clock(), asyncio.create_task(small.send("k", "write", entry=2))
        await asyncio.sleep(0.1)
        assert not waiting.done()

        # then its news opens the gate, and no step of the move applies any more
        links[0].catch_up()
        assert await waiting == 2
        assert clock() - began_s < small.settings.pause_lease_s / 2
        with pytest.raises(NotApplicable):
            await small.step("capture", request)
        assert await small.send("k", "read") == [1, 2]


@virtually
async def test_a_capture_that_outlives_its_pause_does_not_touch_actors_in_use() -> None:
    """A command that was acknowledged is seen by every later query and command, whatever a late capture does."""
    async with cluster() as small:
        acknowledged = await command_during_a_late_capture(small)

        # then what was acknowledged is there
        assert acknowledged == 2
        assert await small.send("second", "read") == [1, 2]


@virtually
async def test_what_a_late_capture_lost_is_not_written_into_a_snapshot() -> None:
    """No acknowledged command is lost: not even when the actor rolls its log up and is activated elsewhere."""
    async with cluster(snapshot_every=4) as small:
        await command_during_a_late_capture(small)

        for entry in (3, 4, 5, 6):
            await small.send("second", "write", entry=entry)
        await small.fail_over("b")
        await small.served_by("b")

        assert await small.send("second", "read") == [1, 2, 3, 4, 5, 6]


@virtually
async def test_s1_a_lock_seen_together_with_the_abort_before_it_is_aborted_too() -> None:
    """A source that missed the abort and saw only the next lock still aborts a lock that nobody follows up."""
    async with cluster("a", "b") as small:
        request = await small.lock("m1", "b")
        await small.step("pause", request)
        node = small.nodes["a"]
        node.cut()
        await small.abort("m1")
        await small.lock("m2", "b")
        node.heal()

        await until(lambda: small.nodes["a"].node.host.units[UNIT].pause is None)
        await asyncio.sleep(small.settings.pause_lease_s * 3)

        assert (await small.map()).move is None


@virtually
async def test_a_command_in_doubt_at_the_old_owner_is_not_reported_as_surely_not_applied() -> None:
    """Unavailable and Timeout say "was not applied"; what may have landed is InDoubt."""
    async with cluster("a", "b", append_timeout_s=1.0) as small:
        await small.send("k", "write", entry=1)
        router = small.nodes["a"].node.router
        small.disturb("drop_reply", "append", "=k")
        sending = asyncio.create_task(router.send_message(ActorId("ledger", "k"), "write", {"entry": 2}, timeout_s=6.0))
        await until(small.disturbed)
        await small.fail_over("b")
        small.nodes["b"].cut()
        with pytest.raises(FerryError) as caught:
            await sending
        assert len(small.log("k")) == 2
        assert not isinstance(caught.value, Timeout | Unavailable), caught.value


@virtually
async def test_an_earlier_life_that_wakes_up_does_not_take_its_shards_back() -> None:
    """A zombie whose id was taken over by a new incarnation learns that and goes; the map stays with the new one."""
    async with cluster("a", "b", shards=8, latency=lambda: 0.0005) as small:
        old = small.nodes["a"]
        new = await small.restart("a")
        for shard in range(8):
            await small.served_by("a", f"shard.{shard}")
        before = [(await small.map(f"shard.{shard}")).epoch for shard in range(8)]

        old.heal()
        await until(old.task.done)
        await asyncio.sleep(5)

        assert [(await small.map(f"shard.{shard}")).epoch for shard in range(8)] == before
        assert not new.task.done()
