"""One node on real servers, without a coordinator: what benchmarks of the hot path measure.

The map is written by hand, so nothing moves while they run.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.cluster import until
from routing.birth import Birth, read_birth
from routing.client import Cluster
from routing.directory import Directory
from routing.nats_link import NatsLink
from routing.settings import Settings
from routing.shard_map import assign
from routing.subjects import Subjects, shard_key
from runtime.actor import ActorClasses
from runtime.node import Node
from workflows.local import EmbeddedServers, LocalCluster

SHARDS = 64


@dataclass(slots=True)
class Solo:
    """The cluster `name`: its link and names for the benchmark itself, and a client as applications have one."""

    link: NatsLink
    subjects: Subjects
    birth: Birth
    client: Cluster


@contextmanager
def servers(*, sync_always: bool) -> Iterator[EmbeddedServers]:
    with (
        tempfile.TemporaryDirectory(prefix="ferry-bench-") as folder,
        EmbeddedServers(Path(folder), sync_always=sync_always) as running,
    ):
        yield running


@contextmanager
def node_process(running: EmbeddedServers, cluster: str, *, env: Mapping[str, str] | None = None) -> Iterator[None]:
    """A node `a` in a process of its own; the servers outlive it."""
    local = LocalCluster(running, cluster=cluster, env={"FERRY_SHARDS": str(SHARDS), **(env or {})})
    process = local.add_node("a", actors="bench.actors")
    try:
        yield
    finally:
        process.terminate(10)


@asynccontextmanager
async def solo(running: EmbeddedServers, cluster: str) -> AsyncIterator[Solo]:
    """A node process that serves every shard of `cluster`, and a connected client."""
    async with AsyncExitStack() as stack:
        stack.enter_context(node_process(running, cluster))
        link = await NatsLink.connect(running.nats_url, name="bench")
        stack.push_async_callback(link.close)
        birth = await until(lambda: _born(link, cluster), "the cluster to be founded")
        subjects = Subjects(cluster, birth.logs)
        await give_all_to(link, subjects, birth, "a")
        client = await stack.enter_async_context(Cluster.connect(running.nats_url, cluster=cluster))
        yield Solo(link, subjects, birth, client)


async def _born(link: NatsLink, cluster: str) -> Birth:
    return await read_birth(link, Subjects(cluster))


async def give_all_to(link: NatsLink, subjects: Subjects, birth: Birth, node: str) -> None:
    """Assign every shard to a node and wait until it has taken them over."""
    directory = Directory(link, subjects, shards_total=birth.shards)
    await directory.start()
    units = [shard_key(shard) for shard in range(birth.shards)]
    await asyncio.gather(*(directory.transition(unit, None, assign(node)) for unit in units))

    async def bound() -> bool | None:
        entries = directory.entries().values()
        taken = [entry for entry in entries if entry.ownership.incarnation is not None]
        return True if len(taken) == birth.shards else None

    await until(bound, "the node to take its shards over")
    await directory.stop()


@asynccontextmanager
async def node_here(running: EmbeddedServers, cluster: str) -> AsyncIterator[Node]:
    """A node in this very process that serves every shard of `cluster`."""
    settings = Settings(cluster=cluster, node_id="here", shards=SHARDS, nats_url=running.nats_url)
    link = await NatsLink.connect(running.nats_url, name="here")
    transfer_link = await NatsLink.connect(running.nats_url, name="here-transfer")
    node = Node(settings, link=link, transfer_link=transfer_link, classes=ActorClasses.load(["bench.actors"]))
    await node.start()
    try:
        birth = await read_birth(link, settings.subjects)
        await give_all_to(link, settings.subjects, birth, "here")
        yield node
    finally:
        await node.stop()


async def per_second(call: Callable[[int], Awaitable[object]], *, window: int, seconds: float) -> float:
    """Calls a second with `window` of them under way at any time; each caller passes its own number."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    over = False

    def end() -> None:
        nonlocal over
        over = True

    async def caller(number: int) -> int:
        done = 0
        while not over:
            await call(number)
            done += 1
        return done

    loop.call_later(seconds, end)
    done = await asyncio.gather(*(caller(number) for number in range(window)))
    return sum(done) / (loop.time() - began_s)
