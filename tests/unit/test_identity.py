"""NATS with another cluster behind the same URL: processes of the old one serve nothing, store nothing and end."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, replace
from random import Random
from typing import Any

import orjson
import pytest

from routing.birth import Birth, found_or_join
from routing.directory import Directory
from routing.errors import Incompatible, Unavailable
from routing.identity import ANSWER_S, GONE_S, Identity
from routing.link import StreamSpec
from routing.settings import Settings
from routing.shard_map import assign
from routing.subjects import CLUSTER_KEY, kv_stream, kv_subject
from runtime.actor import ActorClasses
from runtime.node import Node
from runtime.testing import Fault, Kind, MemoryLink, MemoryNats
from tests.simulation.shelf import Shelf
from tests.unit.cluster import Ledger, SmallCluster, answered, cluster
from tests.unit.office import coordinator
from tests.unit.virtual_time import clock, until, virtually, wall_clock
from workflows import cli
from workflows import context as contexts
from workflows.context import StepContext, Worker

SETTINGS = Settings(shards=3, logs=2)
SUBJECT = kv_subject(SETTINGS.subjects.map_bucket, CLUSTER_KEY)


class Server:
    """A NATS whose reads of birth documents can be lost."""

    def __init__(self) -> None:
        self.lost = 0
        self.nats = MemoryNats(on_message=self._on_message)

    def _on_message(self, kind: Kind, subject: str) -> Fault:
        if kind == "read" and subject == SUBJECT and self.lost:
            self.lost -= 1
            return "drop_request"
        return "deliver"

    async def join(self, name: str) -> tuple[MemoryLink, Birth]:
        link = self.nats.link(name)
        return link, await found_or_join(link, SETTINGS)

    async def comes_back_with_another(self, link: MemoryLink) -> None:
        """Its storage is new, and somebody has founded a cluster there before the link is back."""
        link.disconnect()
        self.nats.lose_everything()
        await self.join("founder")
        link.reconnect()


async def keeping(link: MemoryLink, born: Birth) -> asyncio.Task[None]:
    keep = asyncio.create_task(Identity(link, SETTINGS.subjects, born).keep())
    await asyncio.sleep(0)
    return keep


async def ended(serving: asyncio.Task[None]) -> None:
    await serving


async def replace_storage(small: SmallCluster) -> None:
    """The server gets an empty disk, and another cluster is founded there before the old one's nodes are back."""
    for running in small.everyone:
        running.cut()
    small.link.disconnect()
    small.nats.lose_everything()
    await found_or_join(small.nats.link("founder"), small.settings)


@virtually
async def test_clusters_are_told_apart_by_their_birth_and_all_who_join_one_agree() -> None:
    """Equal settings make no equal clusters."""
    one, other = Server(), Server()

    (_, first), (_, second), (_, elsewhere) = await one.join("a"), await one.join("b"), await other.join("a")

    assert first == second
    assert first.id
    assert first != elsewhere
    assert replace(first, id="") == replace(elsewhere, id="")


@virtually
async def test_the_same_cluster_goes_on_after_a_reconnect() -> None:
    """In doubt from the very moment of the reconnect until its birth is read again, however often that is lost."""
    server = Server()
    link, born = await server.join("a")
    keep = await keeping(link, born)
    link.disconnect()
    server.lost = 2
    began_s, doubted = clock(), []
    link.on_reconnect(lambda: doubted.append(link.in_doubt))

    link.reconnect()
    await until(lambda: doubted and not link.in_doubt)

    assert doubted == [True]
    assert server.lost == 0
    assert clock() - began_s > 2 * ANSWER_S
    assert not keep.done()
    keep.cancel()


@virtually
async def test_a_reconnect_during_the_comparison_has_it_made_again() -> None:
    """What was read before says nothing about whom the link leads to now."""
    server = Server()
    link, born = await server.join("a")
    keep = await keeping(link, born)
    link.disconnect()
    server.lost = 1
    link.reconnect()
    await asyncio.sleep(ANSWER_S / 2)

    await server.comes_back_with_another(link)

    with pytest.raises(Incompatible):
        await keep


@virtually
async def test_a_cluster_founded_anew_is_another() -> None:
    """The process is told so, and stores nothing meanwhile."""
    server = Server()
    link, born = await server.join("a")
    keep = await keeping(link, born)

    await server.comes_back_with_another(link)

    with pytest.raises(Incompatible, match="another cluster than the one that was joined"):
        await keep
    with pytest.raises(Unavailable):
        await link.append(kv_subject(SETTINGS.subjects.map_bucket, "shard.0"), b"", expected=0, timeout_s=1.0)


@virtually
async def test_who_joins_while_nats_comes_back_with_another_cluster_joins_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it has read of the one before would be compared with nothing."""
    server = Server()
    link, make = server.nats.link("a"), MemoryLink.ensure_stream

    async def make_late(self: MemoryLink, spec: StreamSpec, *, timeout_s: float) -> None:
        await make(self, spec, timeout_s=timeout_s)
        if self is link and spec.ttl and not others:  # the last of them: the birth document has been read
            link.disconnect()
            server.nats.lose_everything()
            others.append((await server.join("b"))[1])
            link.reconnect()
            await asyncio.sleep(0.1)

    others: list[Birth] = []
    monkeypatch.setattr(MemoryLink, "ensure_stream", make_late)
    identity = await Identity.join(link, SETTINGS)

    assert [identity._born] == others


@virtually
async def test_a_cluster_that_is_gone_is_another() -> None:
    """Where nobody founds one anew, all would wait for each other. A server that starts gets a moment to find it."""
    server = Server()
    link, born = await server.join("a")
    keep = await keeping(link, born)
    link.disconnect()
    server.nats.lose_everything()
    began_s = clock()

    link.reconnect()

    with pytest.raises(Incompatible):
        await keep
    assert GONE_S <= clock() - began_s < 2 * GONE_S


@virtually
async def test_a_cluster_of_an_earlier_version_is_taken_as_it_is() -> None:
    """Its birth document has no id: it still is the same after a reconnect, and one with an id is another."""
    server = Server()
    link, born = await server.join("a")
    document = {name: value for name, value in asdict(born).items() if name != "id"}
    await link.append(SUBJECT, orjson.dumps(document), expected=None, timeout_s=1.0)
    early = await found_or_join(link, SETTINGS)
    keep = await keeping(link, early)
    assert early.id == ""

    link.disconnect()
    link.reconnect()
    await until(lambda: not link.in_doubt)
    assert not keep.done()

    await server.comes_back_with_another(link)
    with pytest.raises(Incompatible):
        await keep


@virtually
async def test_a_node_of_another_cluster_ends_without_a_trace() -> None:
    """Even where the sequences agree, as for an actor that nobody has written to: it follows 0 in both clusters."""
    # given a node with an actor that has a log, and one that has none
    async with cluster("a") as small:
        await small.send("k", "write", entry=1)
        assert await small.send("empty", "read") == []
        running = small.nodes["a"]
        identity = await Identity.join(running.link, small.settings)
        serving = asyncio.create_task(identity.while_same(ended(running.task)))
        await replace_storage(small)
        other = small.nats.link("other")
        directory = Directory(other, small.subjects, shards_total=1)
        await directory.transition("shard.0", None, assign("a"))
        before = {stream: small.nats.entries(stream) for stream in small.nats._streams}

        # when it comes to the other cluster, where it is said to own the same shard, and is asked before it knows
        small.disturb("drop_request", "read", CLUSTER_KEY)
        small.link.reconnect()
        running.heal()
        futures = [
            await small.post("a", small.command("empty", "write", "m-1", entry=2)),
            await small.post("a", small.command("k", "write", "m-2", entry=2)),
            await small.post("a", small.command("k", "read", "m-3")),
        ]

        # then it ends, has stored nothing, and has said nothing that it knew
        with pytest.raises(Incompatible, match="start again"):
            await serving
        assert running.task.done()
        assert {stream: small.nats.entries(stream) for stream in small.nats._streams} == before
        assert [type((await answered(future)).error) for future in futures] == [Unavailable] * 3


@virtually
async def test_a_node_that_loses_its_connection_while_it_starts_goes_on() -> None:
    """It is in doubt then, and cannot even take its lease until somebody has compared."""
    nats, settings = MemoryNats(), replace(SETTINGS, node_id="a")
    link, back = nats.link("a"), asyncio.Event()

    class Starting(Node):
        async def start(self) -> None:
            link.disconnect()
            link.on_reconnect(back.set)
            link.reconnect()
            await back.wait()
            assert link.in_doubt
            await super().start()

    node = Starting(
        settings, link=link, transfer_link=nats.link("a-transfer"), classes=ActorClasses([Ledger]), clock=clock,
        wall_clock=wall_clock,
    )  # fmt: skip
    stopping = asyncio.Event()
    serving = asyncio.create_task(cli._serve(node, link, settings, stopping))
    await back.wait()
    await until(lambda: not link.in_doubt)
    await until(lambda: serving.done() or nats.entries(kv_stream(settings.subjects.lease_bucket)) != [])

    assert not serving.done()
    stopping.set()
    await serving


@virtually
async def test_a_coordinator_of_another_cluster_ends_with_its_reason() -> None:
    """It does not lead a cluster whose map it does not know: not even a lease of it is in the new storage."""
    # given a leader
    small = SmallCluster(shards=4)
    process, serving, _ = await coordinator(small)
    await until(lambda: process.leading)
    link = process._link
    assert isinstance(link, MemoryLink)
    identity = await Identity.join(link, small.settings)
    serving = asyncio.create_task(identity.while_same(ended(serving)))

    # when its NATS comes back with another cluster
    link.disconnect()
    small.nats.lose_everything()
    await found_or_join(small.nats.link("founder"), small.settings)
    link.reconnect()

    # then it ends
    with pytest.raises(Incompatible, match="start again"):
        await serving
    assert small.leases() == []


def test_a_worker_begins_anew_with_another_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps nothing that would be worth ending for; its old copy of the map would refuse every move for ever."""
    server = Server()

    async def open_context(settings: Settings) -> StepContext:
        link, born = await server.join("worker")
        store: Any = Shelf(Random(0))
        directory = Directory(link, settings.subjects, shards_total=born.shards)
        identity = Identity(link, settings.subjects, born)
        return StepContext(
            link=link, subjects=settings.subjects, directory=directory, store=store, settings=settings,
            identity=identity,
        )  # fmt: skip

    @virtually
    async def scene() -> None:
        worker = Worker.__new__(Worker)  # without its thread
        worker._settings, worker._context, worker._connecting = SETTINGS, None, None

        async def same(context: StepContext) -> StepContext:
            return context

        first = await worker._run(same)
        link = first.link
        assert isinstance(link, MemoryLink)
        link.disconnect()
        link.reconnect()
        await asyncio.sleep(0.1)
        assert await worker._run(same) is first

        link.disconnect()
        server.nats.lose_everything()
        link.reconnect()
        await asyncio.sleep(0.1)
        second = await worker._run(same)
        assert second is not first
        assert not second.link.in_doubt
        assert not link.connected

    monkeypatch.setattr(contexts, "open_context", open_context)
    scene()
