"""A cluster's birth on several NATS servers: a stream that was just made has no leader for a moment."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from routing.birth import ELECTION_S, found_or_join
from routing.errors import Unavailable
from routing.settings import Settings
from routing.subjects import kv_subject, node_key
from runtime.testing import MemoryLink, MemoryNats
from tests.unit.cluster import SmallCluster
from tests.unit.virtual_time import clock, run_virtually, virtually

SETTINGS = Settings(shards=3, logs=2)


class _Electing:
    """Appends to a link find nobody there until `until_s`, as on a stream whose replicas have not elected a leader."""

    def __init__(self, link: MemoryLink, *, until_s: float) -> None:
        self._append, self._until_s = link.append, until_s

    async def append(self, subject: str, payload: bytes, **more: Any) -> int:
        if clock() < self._until_s:
            raise Unavailable(f"nobody listens on {subject}")
        return await self._append(subject, payload, **more)


def _electing(monkeypatch: pytest.MonkeyPatch, *, for_s: float) -> MemoryLink:
    link = MemoryNats().link("node")
    monkeypatch.setattr(link, "append", _Electing(link, until_s=clock() + for_s).append)
    return link


def test_who_joins_waits_for_the_election_of_streams_another_has_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that start together all come up; none ends because it was a moment too early."""

    async def join() -> None:
        link = _electing(monkeypatch, for_s=ELECTION_S / 2)

        born = await found_or_join(link, SETTINGS)

        assert (born.shards, born.logs) == (3, 2)

    run_virtually(join())


def test_an_election_that_does_not_end_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting is bounded: whoever started the process learns what is missing."""

    async def join() -> None:
        link = _electing(monkeypatch, for_s=10 * ELECTION_S)
        began_s = clock()

        with pytest.raises(Unavailable):
            await found_or_join(link, SETTINGS)

        assert ELECTION_S <= clock() - began_s < 2 * ELECTION_S

    run_virtually(join())


@virtually
async def test_a_node_waits_for_the_stream_of_leases_to_answer() -> None:
    """It may be the youngest stream: a node that asks too early asks again, for as long as a lease lasts."""
    # given a stream of leases that leaves the first questions without an answer
    cluster = SmallCluster()
    cluster.disturb("drop_request", "read", "node.a", times=3)

    # when a node starts
    async with asyncio.timeout(30):
        await cluster.add("a")

    # then it has its lease
    assert cluster.disturbed()
    assert cluster.leases()


@virtually
async def test_a_lease_that_runs_out_between_two_looks_is_taken_not_mistaken_for_a_living_nodes() -> None:
    """The server's mark of its end is a newer message of the key, but nobody's renewal."""
    # given the lease of a node that was killed
    cluster = SmallCluster()
    await cluster.add("a")
    cluster.nodes["a"].cut()
    subject = kv_subject(cluster.subjects.lease_bucket, node_key("a"))
    remover, looks = cluster.nats.link("server"), 0

    class Watched:
        """Its next life's link: the lease ends just before the fourth look, the second in that round."""

        def __init__(self, link: MemoryLink) -> None:
            self._link = link

        def __getattr__(self, name: str) -> Any:
            return getattr(self._link, name)

        async def last(self, stream: str, asked: str, *, timeout_s: float) -> Any:
            nonlocal looks
            looks += asked == subject
            if looks == 4:
                await remover.append(subject, b"", expected=None, discard=True, timeout_s=1.0)
            return await self._link.last(stream, asked, timeout_s=timeout_s)

    # when its next life looks
    async with asyncio.timeout(30):
        await cluster.add("a", wrap=lambda link: Watched(link))  # type: ignore[arg-type, return-value]

    # then it has come up
    assert looks >= 4
