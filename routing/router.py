"""Gets a command to its actor wherever that lives, and the answer back, within the caller's deadline."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Protocol

from routing.address import ActorId, NodeId
from routing.directory import Directory
from routing.envelope import Answer, Command, decode_answer, decode_command, encode_answer, encode_command
from routing.errors import Busy, FerryError, InDoubt, InvalidInput, Moved, Timeout, Unavailable
from routing.link import Link
from routing.subjects import Subjects

ATTEMPT_S = 2.0  # then the same message id is sent again: its node may have died with it
RETRY_FIRST_S, RETRY_MOST_S = 0.005, 0.25
DEFAULT_TIMEOUT_S = 10.0


class LocalNode(Protocol):
    """The actor host of this very process, when there is one."""

    def serves(self, unit: str) -> bool: ...

    def ask(self, command: Command) -> Awaitable[Answer]: ...


class Router:
    """Sends commands by the directory's map.

    Each attempt goes straight to the mailbox when this process hosts the actor, otherwise as one NATS request to the
    node the map names. An answer "moved" or a higher epoch in any answer corrects the route; routes only ever go to
    higher epochs. Everything is retried under the same message id, so a command is applied once.
    """

    def __init__(
        self, link: Link, directory: Directory, subjects: Subjects, *, sender: str, local: LocalNode | None = None,
        wall_clock: Callable[[], float] = time.time, max_command_bytes: int = 512 * 1024,
    ) -> None:  # fmt: skip
        self._link, self._directory, self._subjects = link, directory, subjects
        self._sender, self._local, self._wall_clock = sender, local, wall_clock
        self._max_command_bytes = max_command_bytes
        self._learned: dict[str, tuple[int, NodeId]] = {}  # unit -> (epoch, owner) from answers, until the map is there
        directory.on_change(lambda unit, entry: self._forget(unit, entry.ownership.epoch))

    async def send_message(
        self, actor: ActorId, name: str, arguments: dict[str, Any] | None = None, *, message_id: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Any:  # fmt: skip
        """Send one command or query and return its reply.

        Raises Rejected, HandlerFailed and InvalidInput as the actor's node answered; Unavailable when nobody could be
        reached at all; Timeout when it was refused until the deadline and surely not applied; InDoubt when it may
        have been applied: send the same `message_id` again to learn the outcome. InvalidInput, PayloadTooLarge as well
        for what no node could receive, wherever the actor lives today.
        """
        if not 0 < timeout_s < math.inf:
            raise InvalidInput(f"timeout of {timeout_s} s: must be finite and greater than 0")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        command = Command(
            actor=actor, name=name, arguments=arguments or {},
            message_id=new_message_id() if message_id is None else message_id,
            expires_ms=int((self._wall_clock() + timeout_s) * 1000),
        )  # fmt: skip
        # A local actor gets what a remote one would: checked alike, and nothing that the caller can still change.
        command = decode_command(encode_command(command), max_bytes=self._max_command_bytes)
        attempt = _Attempts(command)
        while (left_s := deadline - loop.time()) > 0:
            answer = await self._attempt(command, attempt, min(left_s, ATTEMPT_S))
            if answer is not None:
                if answer.error is None:
                    return answer.value
                raise answer.error
            await asyncio.sleep(min(attempt.pause_s, max(deadline - loop.time(), 0)))
        raise attempt.gave_up(timeout_s)

    async def _attempt(self, command: Command, attempts: _Attempts, timeout_s: float) -> Answer | None:
        """One try; None means try again."""
        unit = self._directory.unit_of(command.actor)
        try:
            answer = await self._ask(unit, command, timeout_s)
        except Timeout as error:
            attempts.unknown(error)
            await self._refresh(unit, attempts)
            return None
        except Unavailable as error:
            attempts.refused(error)
            await self._refresh(unit, attempts)
            return None
        if answer.owner is not None:
            self._learn(unit, answer.owner, answer.epoch)
        match answer.error:
            case Busy() as busy:
                attempts.refused(busy)
            case Moved() | Unavailable() as elsewhere:
                attempts.refused(elsewhere)
                await self._refresh(unit, attempts)
            case Timeout() | InDoubt() as unknown:
                attempts.unknown(unknown)
            case _:
                return answer
        return None

    async def _ask(self, unit: str, command: Command, timeout_s: float) -> Answer:
        if self._local is not None and self._local.serves(unit):
            try:
                async with asyncio.timeout(timeout_s):
                    return _received(await self._local.ask(command))
            except TimeoutError as error:
                raise Timeout(f"no answer from this node within {timeout_s:g} s") from error
        owner, epoch = self._route(unit)
        if owner is None:
            raise Unavailable(f"{unit} has no owner yet: start a coordinator and a node")
        payload = encode_command(replace(command, epoch=epoch))
        subject = self._subjects.command(owner, self._sender)
        return decode_answer(await self._link.request(subject, payload, timeout_s=timeout_s))

    def _route(self, unit: str) -> tuple[NodeId | None, int]:
        entry = self._directory.get(unit)
        known = (entry.ownership.epoch, entry.ownership.owner) if entry else (0, None)
        epoch, owner = max(known, self._learned.get(unit, (0, "")), key=lambda route: route[0])
        return owner, epoch

    def _learn(self, unit: str, owner: NodeId, epoch: int) -> None:
        if epoch > self._route(unit)[1]:
            self._learned[unit] = (epoch, owner)

    def _forget(self, unit: str, epoch: int) -> None:
        if unit in self._learned and self._learned[unit][0] <= epoch:
            del self._learned[unit]

    async def _refresh(self, unit: str, attempts: _Attempts) -> None:
        try:
            await self._directory.refresh(unit)
        except (Timeout, Unavailable) as error:
            attempts.refused(error)


class _Attempts:
    """What is known about a command so far: was it ever possibly applied, and how long to pause before the next try."""

    def __init__(self, command: Command) -> None:
        self._command = command
        self._maybe_applied = False
        self._last: FerryError | None = None
        self._pause_s = RETRY_FIRST_S

    @property
    def pause_s(self) -> float:
        pause_s, self._pause_s = self._pause_s, min(self._pause_s * 2, RETRY_MOST_S)
        return max(pause_s, self._last.retry_after_s) if isinstance(self._last, Busy) else pause_s

    def unknown(self, error: FerryError) -> None:
        self._maybe_applied, self._last = True, error

    def refused(self, error: FerryError) -> None:
        self._last = error

    def gave_up(self, timeout_s: float) -> FerryError:
        what = f"{self._command.name!r} to {self._command.actor}"
        if self._maybe_applied:
            return InDoubt(
                f"no answer to {what} within {timeout_s:g} s: it may have been applied;"
                f" send message id {self._command.message_id} again to learn the outcome",
                message_id=self._command.message_id,
            )
        if isinstance(self._last, Unavailable):
            return Unavailable(f"{what} was not applied: {self._last}")
        return Timeout(f"{what} was not applied within {timeout_s:g} s: {self._last or 'no attempt could be made'}")


def _received(answer: Answer) -> Answer:
    """A local answer as it would have come by the network: the actor remembers its own, the caller may change this."""
    if answer.error is None and isinstance(answer.value, (str, int, float, type(None))):
        return answer
    return decode_answer(encode_answer(answer))


def new_message_id() -> str:
    """96 random bits: enough that two commands of one actor never share an id by chance."""
    return os.urandom(12).hex()
