"""Ordered commands of one sender, several on their way at a time.

    async with Cluster.connect() as cluster:
        session = cluster.session()
        plane = session.actor("aircraft", "N14228")
        async with asyncio.TaskGroup() as group:
            for distance in (1400, 720, 1065):
                group.create_task(plane.fly(distance=distance))  # applied in this order, across any number of moves

Each command to an actor carries the session and the next number; the actor decides exactly the next one, answers one
it has decided with the same reply, and sends the sender back to a missing one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from msgspec.structs import replace

from routing.address import ActorId
from routing.envelope import Command
from routing.errors import (
    HandlerFailed,
    InvalidInput,
    NotApplicable,
    PayloadTooLarge,
    Rejected,
    SessionExpired,
    Timeout,
    UnknownActorType,
)
from routing.handle import ActorHandle
from routing.router import DEFAULT_TIMEOUT_S, Router, check_timeout
from routing.session_id import IN_FLIGHT

SHORTEST_S = 0.001  # left of a deadline that ended together with the wait for a turn


class Session:
    """Commands of one session to one actor are applied in the order in which the calls began.

    A command that ends without its actor's word on it (InDoubt, Timeout, Unavailable, cancelled) ends the order: later
    commands to that actor raise NotApplicable, until they are sent in a new session. A Rejected one does not.
    """

    def __init__(
        self, session_id: str, router: Callable[[], Router], *, on_expired: Callable[[int], None] = lambda floor: None
    ) -> None:
        """`on_expired` is told the floor when an actor has forgotten this session: later ones must be opened above."""
        self.id = session_id
        self._router, self._on_expired = router, on_expired
        self._lanes: dict[ActorId, _Lane] = {}

    def actor(self, actor_type: str, key: str) -> ActorHandle[Coroutine[Any, Any, Any]]:
        """A handle whose methods are the actor's commands. Raises InvalidInput for a malformed id."""
        return ActorHandle(self, ActorId(actor_type, key))

    async def send_message(
        self, actor: str | ActorId, command: str, arguments: dict[str, Any] | None = None, *,
        timeout: float = DEFAULT_TIMEOUT_S,
    ) -> Any:  # fmt: skip
        """Send one command in order; returns the reply. `timeout` in seconds, waiting for its turn included.

        Errors: see Router.send_message; SessionExpired when the actor has forgotten this session; NotApplicable when
        an earlier command to this actor ended without an outcome.
        """
        target = ActorId.of(actor)
        router = self._router()
        lane = self._lanes.setdefault(target, _Lane(self.id))
        try:
            return await lane.send(router, router.prepare(target, command, arguments), timeout)
        except SessionExpired as error:
            self._on_expired(error.floor)
            raise

    async def query(
        self, actor: str | ActorId, name: str, arguments: dict[str, Any] | None = None, *,
        linearizable: bool = False, timeout: float = DEFAULT_TIMEOUT_S,
    ) -> Any:  # fmt: skip
        """Ask a query that sees every command of this session to that actor that began before it."""
        target = ActorId.of(actor)
        router = self._router()
        asked = router.prepare(target, name, arguments, linearizable=linearizable)
        lane = self._lanes.get(target)
        return await (router.deliver(asked, timeout_s=timeout) if lane is None else lane.ask(router, asked, timeout))


class _Lane:
    """The numbers of one session to one actor."""

    def __init__(self, session_id: str) -> None:
        self._session_id = session_id
        self._issued = 0
        self._ended: dict[int, asyncio.Event] = {}  # of the calls that are not over
        self._broken: str | None = None

    async def ask(self, router: Router, asked: Command, timeout_s: float) -> Any:
        """Ask a query behind every command issued so far."""
        self._check_order()
        last = self._issued
        asked = replace(asked, session=self._session_id, after=last)
        return await router.deliver(asked, timeout_s=timeout_s, before=self._end_of(last))

    async def send(self, router: Router, command: Command, timeout_s: float) -> Any:
        """Give a command the next number and send it."""
        self._check_order()
        check_timeout(timeout_s)
        self._issued += 1
        number, before = self._issued, self._end_of(self._issued - 1)
        ended = self._ended[number] = asyncio.Event()
        command = replace(command, session=self._session_id, number=number, message_id=f"{self._session_id}.{number}")
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        decided = False
        try:
            left_s = await self._await_window(number, deadline_s)
            self._check_order()  # one before it may have ended without an outcome meanwhile
            reply = await router.deliver(command, timeout_s=left_s, before=before)
            decided = True
            return reply
        except (Rejected, HandlerFailed, InvalidInput) as error:
            decided = error.logged if isinstance(error, PayloadTooLarge) else not isinstance(error, UnknownActorType)
            raise  # what is not in the actor's log has not taken its number
        finally:
            if not decided and self._broken is None:
                self._broken = f"{command.name!r}, its command {number} to {command.actor}, ended without an outcome"
            ended.set()
            del self._ended[number]

    def _check_order(self) -> None:
        if self._broken is not None:
            raise NotApplicable(f"the order of session {self._session_id} is broken: {self._broken}; open a new one")

    async def _await_window(self, number: int, deadline_s: float) -> float:
        """Wait until fewer than IN_FLIGHT commands are unanswered; returns the seconds left. Raises Timeout."""
        try:
            async with asyncio.timeout_at(deadline_s):
                for earlier in [n for n in self._ended if n <= number - IN_FLIGHT]:
                    await self._end_of(earlier).wait()
        except TimeoutError as error:
            raise Timeout(f"command {number} had no turn: {IN_FLIGHT} before it have no answer yet") from error
        return max(deadline_s - asyncio.get_running_loop().time(), SHORTEST_S)

    def _end_of(self, number: int) -> asyncio.Event:
        """The end of an earlier call; one that is not known any more is over."""
        known = self._ended.get(number)
        if known is None:
            known = asyncio.Event()
            known.set()
        return known
