"""What an application imports to talk to actors: `Cluster`, and `SyncCluster` for blocking code.

async with Cluster.connect("nats://127.0.0.1:4222", cluster="default") as cluster:
    plane = cluster.actor("aircraft", "N14228")
    flights = await plane.fly(distance=1400)

    session = cluster.session()  # several commands on their way, applied in the order of the calls
    first, second = await asyncio.gather(
        session.send_message("aircraft/N14228", "fly", {"distance": 720}),
        session.send_message("aircraft/N14228", "fly", {"distance": 1065}),
    )
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self

from routing.address import ActorId, NodeId
from routing.birth import read_birth
from routing.directory import Directory
from routing.errors import InvalidInput, Unavailable
from routing.handle import ActorHandle
from routing.link import Link
from routing.nats_url import check_servers
from routing.router import DEFAULT_TIMEOUT_S, Router
from routing.session import Session
from routing.session_id import new_session_id
from routing.settings import DEFAULT_NATS_URL
from routing.subjects import Subjects


class Cluster:
    """A connection to one cluster. Use as an async context manager; safe for many tasks at once."""

    def __init__(self, open_link: Callable[[], Coroutine[Any, Any, Link]], *, cluster: str) -> None:
        self._open_link, self._name = open_link, cluster
        self._link: Link | None = None
        self._directory: Directory | None = None
        self._router: Router | None = None
        self._floor = 0  # unix milliseconds; see routing/session_id.py

    @classmethod
    def connect(cls, nats_url: str = DEFAULT_NATS_URL, *, cluster: str = "default") -> Cluster:
        """Connects on entering the context. Raises Unavailable then when no server or no such cluster answers.

        Raises InvalidInput at once for what is no URL, or no name of a cluster.
        """
        check_servers(nats_url, "the URL of NATS")
        Subjects(cluster)

        async def open_link() -> Link:
            from routing.nats_link import NatsLink  # the in-memory stand-in needs no nats-py

            return await NatsLink.connect(nats_url, name=f"ferry-client-{_sender()}")

        return cls(open_link, cluster=cluster)

    async def __aenter__(self) -> Self:
        self._link = await self._open_link()
        try:
            subjects = Subjects(self._name)
            born = await read_birth(self._link, subjects)
            subjects = Subjects(self._name, born.logs)
            self._directory = Directory(self._link, subjects, shards_total=born.shards)
            await self._directory.start()
            self._router = Router(self._link, self._directory, subjects, sender=_sender())
        except BaseException:
            await self._link.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._directory is not None
        assert self._link is not None
        self._router = None
        await self._directory.stop()
        await self._link.close()

    def actor(self, actor_type: str, key: str) -> ActorHandle[Coroutine[Any, Any, Any]]:
        """A handle whose methods are the actor's commands and queries. Raises InvalidInput for a malformed id."""
        return ActorHandle(self, ActorId(actor_type, key))

    def session(self) -> Session:
        """A new sender session: its commands to one actor are applied in the order of the calls (routing/session.py).

        Without one, only a caller that awaits each reply before it sends the next has its order kept.
        """
        opened_ms = max(int(time.time() * 1000), self._floor + 1)
        return Session(new_session_id(opened_ms), self._open, on_expired=self._raise_floor)

    def _raise_floor(self, floor: int) -> None:
        """Some sender's clock was ahead of ours: open later sessions after its."""
        self._floor = max(self._floor, floor)

    async def send_message(
        self, actor: str | ActorId, command: str, arguments: dict[str, Any] | None = None, *,
        message_id: str | None = None, linearizable: bool = False, timeout: float = DEFAULT_TIMEOUT_S,
    ) -> Any:  # fmt: skip
        """Send one command or query; returns the reply. `timeout` in seconds. Errors: see Router.send_message.

        A `linearizable` query sees everything that was acknowledged before it was sent, at the price of a read of the
        log; without, an owner that was just replaced may answer from what it knew up to its lease's margin.
        """
        target = ActorId.of(actor)
        return await self._open().send_message(
            target, command, arguments, message_id=message_id, linearizable=linearizable, timeout_s=timeout
        )

    async def get_actor_node(self, actor: str | ActorId) -> NodeId | None:
        """The node that owns the actor now (read from the map's leader), or None while nobody does."""
        self._open()
        assert self._directory is not None
        target = ActorId.of(actor)
        await self._directory.locate(target)
        return self._directory.get_actor_node(target)

    def _open(self) -> Router:
        if self._router is None:
            raise Unavailable("the cluster connection is not open: use `async with Cluster.connect(...)`")
        return self._router


class SyncCluster:
    """The blocking twin of Cluster for code without an event loop: a context manager with the same methods.

    One background thread runs the connection; any thread may call. It can be entered once.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ferry-client", daemon=True)

    @classmethod
    def connect(cls, nats_url: str = DEFAULT_NATS_URL, *, cluster: str = "default") -> SyncCluster:
        return cls(Cluster.connect(nats_url, cluster=cluster))

    def __enter__(self) -> Self:
        if self._thread.ident is not None:
            raise InvalidInput("this SyncCluster was entered before: make another one with SyncCluster.connect(...)")
        self._thread.start()
        try:
            self._run(self._cluster.__aenter__())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._run(self._cluster.__aexit__(kind, error, trace))
        finally:
            self._end()

    def actor(self, actor_type: str, key: str) -> ActorHandle[Any]:
        return ActorHandle(self, ActorId(actor_type, key))

    def session(self) -> SyncSession:
        """As Cluster.session. Its calls come in order from one thread; of several threads, each as it begins."""
        return SyncSession(self._cluster.session(), self._run)

    def send_message(
        self, actor: str | ActorId, command: str, arguments: dict[str, Any] | None = None, *,
        message_id: str | None = None, linearizable: bool = False, timeout: float = DEFAULT_TIMEOUT_S,
    ) -> Any:  # fmt: skip
        """As Cluster.send_message, blocking the calling thread for at most `timeout` seconds."""
        return self._run(
            self._cluster.send_message(
                actor, command, arguments, message_id=message_id, linearizable=linearizable, timeout=timeout
            )
        )

    def get_actor_node(self, actor: str | ActorId) -> NodeId | None:
        node: NodeId | None = self._run(self._cluster.get_actor_node(actor))
        return node

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        if not self._thread.is_alive():
            coroutine.close()
            raise Unavailable("the cluster connection is not open: use `with SyncCluster.connect(...)`")
        # Everything the client awaits has its own deadline, so this wait is bounded too.
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        self._loop.close()


class SyncSession:
    """The blocking twin of Session. Each call blocks its thread; several threads may have calls on their way."""

    def __init__(self, session: Session, run: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self._session, self._run = session, run

    @property
    def id(self) -> str:
        return self._session.id

    def actor(self, actor_type: str, key: str) -> ActorHandle[Any]:
        return ActorHandle(self, ActorId(actor_type, key))

    def send_message(
        self, actor: str | ActorId, command: str, arguments: dict[str, Any] | None = None, *,
        timeout: float = DEFAULT_TIMEOUT_S,
    ) -> Any:  # fmt: skip
        """As Session.send_message, blocking the calling thread for at most `timeout` seconds."""
        return self._run(self._session.send_message(actor, command, arguments, timeout=timeout))

    def query(
        self, actor: str | ActorId, name: str, arguments: dict[str, Any] | None = None, *,
        linearizable: bool = False, timeout: float = DEFAULT_TIMEOUT_S,
    ) -> Any:  # fmt: skip
        """As Session.query, blocking the calling thread for at most `timeout` seconds."""
        return self._run(self._session.query(actor, name, arguments, linearizable=linearizable, timeout=timeout))


def _sender() -> str:
    """This process as one subject token: host, process and a random part."""
    host = "".join(c if c.isalnum() else "-" for c in socket.gethostname())[:24] or "host"
    return f"{host}-{os.getpid()}-{os.urandom(3).hex()}"
