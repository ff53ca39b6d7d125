"""The log of an actor whose state does not fit into one message: it is rolled up, and a kill -9 loses nothing of it."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

from routing.address import ActorId
from routing.birth import read_birth
from routing.client import Cluster
from routing.errors import FerryError
from routing.nats_link import NatsLink
from routing.settings import Settings
from runtime.journal import Journal, Kind
from workflows.local import EmbeddedServers, LocalCluster

ACTOR = ActorId("large", "one")
STATE_BYTES, PIECE_BYTES = 300_000, 64 * 1024
LOG = math.isqrt(STATE_BYTES // 4)  # how long it is at least before a snapshot in pieces is worth it
WAIT_S = 40.0
QUICK = {
    "FERRY_SHARDS": "2", "FERRY_NODE_LEASE_S": "2", "FERRY_SNAPSHOT_PIECE_BYTES": str(PIECE_BYTES),
}  # fmt: skip


async def test_a_large_state_comes_back_from_its_snapshot(tmp_path: Path) -> None:
    """The next owner reads a handful of messages, not every command since the actor's birth."""
    with LocalCluster(EmbeddedServers(tmp_path), env=QUICK) as processes:
        first = processes.add_node("a", actors="bench.actors")
        processes.add_coordinator()
        async with asyncio.timeout(WAIT_S), await _client(processes) as cluster:
            await cluster.send_message(ACTOR, "grow", {"size_bytes": STATE_BYTES, "seed": 7}, timeout=WAIT_S)
            for touched in range(1, LOG + 20):
                assert await cluster.send_message(ACTOR, "touch", timeout=WAIT_S) == touched
            before = await cluster.send_message(ACTOR, "check", timeout=WAIT_S)

            first.kill9()
            processes.add_node("b", actors="bench.actors")

            assert await cluster.send_message(ACTOR, "check", timeout=WAIT_S) == before
            assert await cluster.send_message(ACTOR, "touch", timeout=WAIT_S) == LOG + 20
        kinds = await _kinds(processes.servers.nats_url)

    assert kinds[0] is Kind.SNAPSHOT
    assert len(kinds) < 30


async def _client(processes: LocalCluster) -> Cluster:
    """Once the first node has founded the cluster."""
    while True:
        cluster = Cluster.connect(processes.servers.nats_url)
        try:
            async with cluster:
                return Cluster.connect(processes.servers.nats_url)
        except FerryError:
            processes.check_alive()
            await asyncio.sleep(0.1)


async def _kinds(nats_url: str) -> list[Kind]:
    """Of the entries that the actor's state is made from."""
    link = await NatsLink.connect(nats_url, name="reader")
    try:
        subjects = Settings().subjects
        birth = await read_birth(link, subjects)
        journal = Journal(link, subjects, shards_total=birth.shards, append_timeout_s=WAIT_S)
        return [record.kind for _, record in (await journal.load(ACTOR)).records]
    finally:
        await link.close()
