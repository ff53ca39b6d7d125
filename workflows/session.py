"""What one command sees of a cluster and asks of it: the map, the nodes, the leader, the records."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from routing import control
from routing.birth import read_birth
from routing.control import COORDINATOR
from routing.directory import Directory, MapEntry
from routing.errors import InvalidInput, Unavailable
from routing.link import Link
from routing.membership import Member, Membership
from routing.nats_link import NatsLink
from routing.settings import Settings
from routing.subjects import SUSPENDED_KEY, Subjects, kv_stream, kv_subject
from workflows.store import RecordStore

ASK_LEADER_S = 10.0  # it asks every node for its inventory first, each for up to 2 s, and writes records to Redis
ASK_NODE_S = 2.0
STORE_S = 3.0


class Session:
    """A connection to a cluster that exists. Make it with `open_session`."""

    def __init__(self, link: Link, settings: Settings, subjects: Subjects, shards_total: int) -> None:
        self.link, self.settings, self.subjects, self.shards_total = link, settings, subjects, shards_total
        self.directory = Directory(link, subjects, shards_total=shards_total, timeout_s=settings.append_timeout_s)
        self.membership = Membership(link, subjects, node_lease_s=settings.node_lease_s)
        self.store = RecordStore.connect(settings.redis_url, settings.cluster, timeout_s=STORE_S)
        self._following = False

    async def follow(self) -> None:
        """Follow map and leases from here on; idempotent. Returns once both are known. Raises Timeout, Unavailable."""
        if not self._following:
            await self.directory.start()
            await self.membership.start()
            self._following = True

    async def close(self) -> None:
        await self.store.close()
        await self.link.close()  # which ends the watches

    # -- asking ------------------------------------------------------------------------------------------------------
    async def ask_leader(self, verb: str, message: dict[str, Any] | None = None) -> dict[str, Any]:
        """Raises what the leader answered; Unavailable when nobody leads; Timeout."""
        subject = self.subjects.control(COORDINATOR, verb)
        try:
            payload = await self.link.request(subject, control.encode(message or {}), timeout_s=ASK_LEADER_S)
        except Unavailable as error:
            if not self.link.connected:
                raise
            raise Unavailable("no coordinator leads: start one with `ferry coordinator`") from error
        return control.result_of(payload)

    async def ask_node(self, node: str, verb: str, *, timeout_s: float = ASK_NODE_S) -> dict[str, Any]:
        """Raises what the node answered; Unavailable, Timeout."""
        return await control.ask(self.link, self.subjects, node, verb, timeout_s=timeout_s)

    # -- looking; all but `suspended` need `follow` ------------------------------------------------------------------
    def node(self, node_id: str) -> Member:
        """Raises InvalidInput, naming the nodes there are."""
        alive = self.membership.alive()
        if node_id not in alive:
            raise InvalidInput(f"node {node_id!r} is unknown: nodes are {', '.join(alive) or 'none'}")
        return alive[node_id]

    def owned_by(self, node_id: str) -> list[str]:
        """The units that a node has: shards, and actors that were moved there by hand."""
        return [unit for unit, entry in self.directory.entries().items() if entry.ownership.owner == node_id]

    def locked(self) -> dict[str, MapEntry]:
        """The units that a move holds locked now."""
        return {unit: entry for unit, entry in self.directory.entries().items() if entry.ownership.move is not None}

    async def suspended(self) -> bool:
        """Whether an operator has switched automatic rebalancing off. Raises Timeout, Unavailable."""
        bucket = self.subjects.map_bucket
        stored = await self.link.last(
            kv_stream(bucket), kv_subject(bucket, SUSPENDED_KEY), timeout_s=self.settings.append_timeout_s
        )
        return stored is not None and not stored.removed


@asynccontextmanager
async def open_session(settings: Settings) -> AsyncIterator[Session]:
    """Connect to NATS and read what the cluster was born with; Redis is first used when somebody asks for records.

    Raises Unavailable when there is no server or no such cluster, Incompatible, InvalidInput.
    """
    link = await NatsLink.connect(settings.nats_url, name="ferry-cli")
    try:
        born = await read_birth(link, settings.subjects)
        session = Session(link, settings, Subjects(settings.cluster, born.logs), born.shards)
    except BaseException:
        await link.close()
        raise
    try:
        yield session
    finally:
        await session.close()
