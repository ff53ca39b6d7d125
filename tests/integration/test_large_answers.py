"""Many large answers at once, over a real server: whoever answers waits for it, and drops nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

from bench.solo import give_all_to
from routing.birth import read_birth
from routing.client import Cluster
from routing.nats_link import NatsLink
from routing.settings import Settings
from runtime.actor import Actor, ActorClasses, command, event, query
from runtime.node import Node
from workflows.local import EmbeddedServers

PAGES, PAGE_BYTES = 64, 200_000  # 12.8 MB of answers


class Book(Actor):
    actor_type = "book"

    def __init__(self) -> None:
        self.read = 0

    @command
    def open(self) -> None:
        self.emit("opened")

    @event
    def opened(self) -> None:
        self.read += 1

    @query
    def page(self, *, number: int) -> str:
        return str(number % 10) * PAGE_BYTES


async def test_more_answers_than_a_connection_holds_all_arrive_at_the_first_try(tmp_path: Path) -> None:
    """Property: a node that answers faster than the server takes it lets its answers wait, not fall."""
    with EmbeddedServers(tmp_path) as servers:
        settings = Settings(node_id="a", shards=1, nats_url=servers.nats_url)
        links = [await NatsLink.connect(servers.nats_url, name=name) for name in ("a", "a-transfer")]
        node = Node(settings, link=links[0], transfer_link=links[1], classes=ActorClasses([Book]))
        await node.start()
        await give_all_to(links[0], settings.subjects, await read_birth(links[0], settings.subjects), "a")
        async with Cluster.connect(servers.nats_url) as cluster:
            await cluster.send_message("book/one", "open")

            pages = await asyncio.gather(
                *(cluster.send_message("book/one", "page", {"number": n}, timeout=30.0) for n in range(PAGES))
            )

        assert pages == [str(number % 10) * PAGE_BYTES for number in range(PAGES)]
        assert node.host.counters["unsent"] == 0
        await node.stop()
