"""A nemesis' own eyes: the map, the members, the nodes' words, the records, the actors' logs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from routing.address import ActorId, shard_of
from routing.client import Cluster
from routing.directory import MapEntry
from routing.errors import FerryError
from routing.link import Entry, Subscription
from routing.settings import Settings
from routing.subjects import actor_key, shard_key
from runtime.journal import decode_record
from tests.checker.history import RecordEnd
from workflows.records import TERMINAL, Move
from workflows.session import Session, open_session

T = TypeVar("T")

LOOK_EVERY_S = 0.05
BORN_S = 60.0  # until the first node has made the streams
CLIENTS = 2  # of the senders
RECORDS = 500  # more than one case can make


class View:
    """Connections of our own to a running fleet, and what they have seen go by; an async context manager."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.outcomes: dict[str, Literal["committed", "aborted"]] = {}  # by move, as the map wrote them
        self._closing: list[Callable[[], Awaitable[Any]]] = []
        self.session: Session
        self.clients: list[Cluster]

    async def __aenter__(self) -> Self:
        """Raises Unavailable, Timeout when no node has founded the cluster within BORN_S."""
        deadline_s = time.monotonic() + BORN_S
        while True:
            try:
                await self._open()
                return self
            except FerryError:
                await self.__aexit__(None, None, None)
                if time.monotonic() > deadline_s:
                    raise
                await asyncio.sleep(LOOK_EVERY_S)
            except BaseException:
                await self.__aexit__(None, None, None)
                raise

    async def _open(self) -> None:
        opening = open_session(self._settings)
        self.session = await opening.__aenter__()
        self._closing.append(lambda: opening.__aexit__(None, None, None))
        self.session.directory.on_change(self._on_map)
        await self.session.follow()
        self.clients = []
        for _ in range(CLIENTS):
            client = Cluster.connect(self._settings.nats_url)
            self.clients.append(await client.__aenter__())
            self._closing.append(partial(client.__aexit__, None, None, None))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._closing:
            await self._closing.pop()()

    def _on_map(self, unit: str, entry: MapEntry) -> None:
        last = entry.ownership.last
        if last is not None:
            self.outcomes[last.move] = "committed" if last.outcome == "committed" else "aborted"

    def shards_of(self, node: str) -> list[int]:
        entries = self.session.directory.entries()
        return [n for n in range(self.session.shards_total) if entries[shard_key(n)].ownership.owner == node]

    async def leader(self) -> int | None:
        """Process id of the leading coordinator; its name ends in it."""
        try:
            return int(str((await self.session.ask_leader("status"))["leader"]).rpartition("-")[2])
        except FerryError:
            return None

    async def moves_since(self, began: float) -> list[Move]:
        return [move for move in await self.session.store.moves(limit=RECORDS) if move.created_at >= began]

    def record_end(self, move: Move) -> RecordEnd:
        return RecordEnd(id=move.id, unit=move.unit, status=move.status, outcome=self.outcomes.get(move.id))

    # -- at rest -----------------------------------------------------------------------------------------------------
    async def leftovers(self, nodes: Sequence[str]) -> list[str]:
        """What is still going on, or was left behind, in words. Empty: everything has come to rest."""
        try:
            return [
                *await self._left_in_the_map(nodes), *await self._left_at_nodes(nodes), *await self._left_in_records(),
            ]  # fmt: skip
        except FerryError as error:
            return [f"cannot be told: {type(error).__name__}: {error}"]

    async def _left_in_the_map(self, nodes: Sequence[str]) -> list[str]:
        session = self.session
        members = session.membership.alive()
        found = [f"node {node} is not there" for node in nodes if node not in members]
        shards = [shard_key(shard) for shard in range(session.shards_total)]
        for unit in (*shards, *map(actor_key, session.directory.actors_apart())):
            entry = await session.directory.refresh(unit)
            if entry is None:
                found.append(f"{unit} has no owner")
                continue
            view = entry.ownership
            owner = members.get(view.owner)
            if view.move is not None:
                found.append(f"{unit} is locked by move {view.move}")
            if unit not in shards and not view.pinned:
                found.append(f"{unit} is not back in its shard")
            elif owner is None or owner.incarnation != view.incarnation:
                found.append(f"{unit} belongs to {view.owner} in a life ({view.incarnation}) that is over")
        return found

    async def _left_at_nodes(self, nodes: Sequence[str]) -> list[str]:
        found = []
        for node in nodes:
            said = await self.session.ask_node(node, "status")
            found += [f"{unit} is paused at {node}" for unit in said["paused"]]
            found += [f"{said['staged']} moves are staged at {node}"] if said["staged"] else []
            found += [f"node {node} does not serve"] if not said["serving"] else []
            quarantined = said["counters"].get("quarantined", 0)
            found += [f"node {node} has quarantined {quarantined} actors"] if quarantined else []
        return found

    async def _left_in_records(self) -> list[str]:
        store = self.session.store
        found = [f"move {m.id} of {m.unit} is {m.status}, waits for {m.step}" for m in await store.unfinished_moves()]
        found += [f"plan {plan.id} ({plan.reason}) has not ended" for plan in await store.running_plans()]
        said = await self.session.ask_leader("status")
        found += [f"the leader counts {said[key]} {key} moves" for key in ("waiting", "running") if said[key]]
        return found

    async def until(self, ask: Callable[[], Awaitable[T | None]], what: str, *, within_s: float) -> T:
        """The first true answer; errors of the tree mean "not yet". Raises TimeoutError naming `what`."""
        try:
            async with asyncio.timeout(within_s):
                while True:
                    try:
                        answer = await ask()
                    except FerryError:
                        answer = None
                    if answer:
                        return answer
                    await asyncio.sleep(LOOK_EVERY_S)
        except TimeoutError as error:
            raise TimeoutError(f"waited {within_s:g} s for {what}") from error

    async def ended(self, move_id: str) -> Move | None:
        move = await self.session.store.move(move_id)
        return move if move is not None and move.status in TERMINAL else None


class LogWatch:
    """The epochs of some actors' logs, message by message as they were appended.

    A watch that lags or begins anew may leave out what a snapshot has replaced; it never changes their order.
    """

    def __init__(self, view: View, actors: Sequence[ActorId]) -> None:
        self._session = view.session
        self._of_subject = {
            self._session.subjects.events(shard_of(actor, self._session.shards_total), actor): str(actor)
            for actor in actors
        }
        self._shards = {shard_of(actor, self._session.shards_total) for actor in actors}
        self._seen: dict[str, dict[int, int]] = {actor: {} for actor in self._of_subject.values()}
        self._watches: list[Subscription] = []

    async def __aenter__(self) -> Self:
        subjects = self._session.subjects
        for shard in self._shards:
            of_the_shard = subjects.events(shard, ActorId("any", "any")).rpartition(".")[0] + ".>"
            self._watches.append(
                await self._session.link.watch(subjects.log_of(shard), of_the_shard, self._on_entry, timeout_s=5.0)
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        for watch in self._watches:
            await watch.stop()

    def _on_entry(self, entry: Entry) -> None:
        actor = self._of_subject.get(entry.subject)
        if actor is not None:
            self._seen[actor][entry.sequence] = decode_record(entry.payload).epoch

    def epochs(self) -> dict[str, list[int]]:
        return {actor: [epoch for _, epoch in sorted(seen.items())] for actor, seen in self._seen.items()}
