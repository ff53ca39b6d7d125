"""Silence that is nobody's death: NATS stands still, or a leader's watch of the leases does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from routing.birth import found_or_join
from routing.link import Entry
from runtime.testing import MemoryLink
from tests.unit.cluster import SmallCluster, cluster
from tests.unit.office import coordinator
from tests.unit.virtual_time import clock, until, virtually


@pytest.mark.parametrize("offset_s", [0.0, 0.2, 0.4, 0.6, 0.8])
def test_a_nats_server_that_stood_still_does_not_cost_living_nodes_their_shards(offset_s: float) -> None:
    """While NATS stood still nobody could renew: every node gets its chance before it counts as dead.

    A stopped server (SIGSTOP, a frozen VM) keeps its connections, so nothing reconnects.
    """

    @virtually
    async def scene() -> None:
        stalled_until = [0.0]
        small = SmallCluster(shards=8, latency=lambda: max(0.0005, stalled_until[0] - clock()))
        await found_or_join(small.link, small.settings)
        await small.directory.start()
        await small.add("a")
        await asyncio.sleep(offset_s)
        await small.add("b")
        _, serving, stopping = await coordinator(small)
        try:
            await until(lambda: len(small.directory.entries()) == 8)
            await asyncio.sleep(10)
            before = {unit: entry.ownership.epoch for unit, entry in small.directory.entries().items()}
            stalled_until[0] = clock() + 12.0
            await asyncio.sleep(30)
            after = {unit: entry.ownership.epoch for unit, entry in small.directory.entries().items()}
            assert after == before
        finally:
            stopping.set()
            await serving
            for running in small.everyone:
                running.task.cancel()
            await asyncio.gather(*(running.task for running in small.everyone), return_exceptions=True)
            for running in small.everyone:
                await running.node.stop()
            await small.directory.stop()

    scene()


class DeafLink:
    """A link whose watch of the leases can go silent alone: all else goes through."""

    def __init__(self, link: MemoryLink) -> None:
        self._link = link
        self.deaf = False
        self._missed: dict[str, tuple[Callable[[Entry], None], Entry]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    async def watch(self, stream: str, subject: str, handler: Callable[[Entry], None], *, timeout_s: float) -> Any:
        def hear(entry: Entry) -> None:
            if self.deaf:
                self._missed[entry.subject] = handler, entry
            else:
                handler(entry)

        follows_leases = stream.endswith("-leases")
        return await self._link.watch(stream, subject, hear if follows_leases else handler, timeout_s=timeout_s)

    async def hear_again(self) -> None:
        """As a watch that begins anew: the last entry of each key, and not all of them at once."""
        self.deaf = False
        for handler, entry in self._missed.values():
            handler(entry)
            await asyncio.sleep(0.15)


@pytest.mark.parametrize("leader_lease_s", [2.0, 5.0, 30.0])
def test_a_leader_that_hears_of_nobody_takes_nobody_for_dead(leader_lease_s: float) -> None:
    """Its watch of the leases was silent, and nobody's lease: all keep their shards. Who is dead then is found dead."""

    @virtually
    async def scene() -> None:
        # given three nodes with two shards each, and a leader that hears them
        async with cluster(shards=6, leader_lease_s=leader_lease_s) as small:
            for number, name in enumerate("abc"):
                await small.add(name)
                await asyncio.sleep(0.3)
                for unit in (f"shard.{2 * number}", f"shard.{2 * number + 1}"):
                    await small.assign(name, unit)
                    await small.served_by(name, unit)
            link = DeafLink(small.nats.link("coordinator"))
            leader, serving, stopping = await coordinator(small, link)
            leader.suspended = True
            await asyncio.sleep(10)
            before = {unit: entry.ownership.epoch for unit, entry in small.directory.entries().items()}

            # when its watch of the leases says nothing for longer than a lease and the margin, and then goes on
            link.deaf = True
            await asyncio.sleep(9)
            assert leader.leading
            await link.hear_again()
            await asyncio.sleep(10)

            # then nobody has lost anything
            after = {unit: entry.ownership.epoch for unit, entry in small.directory.entries().items()}
            assert after == before

            # and a node that dies is still noticed
            small.nodes["c"].cut()
            await until(lambda: "c" not in {entry.ownership.owner for entry in small.directory.entries().values()})
            stopping.set()
            await serving

    scene()
