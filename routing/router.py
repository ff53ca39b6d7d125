"""Gets a command to its actor wherever that lives, and the answer back, within the caller's deadline."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from numbers import Real
from typing import Any

from msgspec.structs import replace

from routing.address import ActorId, NodeId
from routing.directory import Directory, MapEntry
from routing.envelope import Answer, Command, decode_answer, encode_answer, encode_command, new_command
from routing.errors import (
    Busy,
    FerryError,
    HandlerFailed,
    InDoubt,
    InvalidInput,
    Moved,
    OutOfOrder,
    PermanentError,
    Rejected,
    Timeout,
    Unavailable,
)
from routing.jsonlike import shown
from routing.link import Link
from routing.local import LATER, LocalNode
from routing.logs import get_logger
from routing.subjects import Subjects, unit_in_words

log = get_logger("ferry.router")

ATTEMPT_S = 2.0  # then the same message id is sent again: its node may have died with it
RETRY_FIRST_S, RETRY_MOST_S = 0.005, 0.25
DEFAULT_TIMEOUT_S = 10.0
LONGEST_S = 1e9  # thirty years: nobody waits longer, and the time after some more would not fit a message
_NOTHING: dict[str, Any] = {}  # the arguments of a query that has none; nobody changes them
_NUMBERS = (float, int)  # nearly all are
TURN = 1_024  # questions to actors here, a millisecond or two, before others get their turn


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
        self._query_here = None if local is None else local.query_at_once
        self._max_command_bytes = max_command_bytes
        self._clock: Callable[[], float] | None = None  # the loop's; to ask for the loop each time is a system call
        self._asked_here = 0  # in this turn of the event loop: what is answered at once lets nobody else run
        self._learned: dict[str, tuple[int, NodeId]] = {}  # unit -> (epoch, owner) from answers, until the map is there
        directory.on_change(self._forget)

    async def send_message(
        self, actor: ActorId, name: str, arguments: dict[str, Any] | None = None, *, message_id: str | None = None,
        linearizable: bool = False, timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Any:  # fmt: skip
        """Send one command or query and return its reply.

        A `linearizable` query has its node read the end of the actor's log first: it sees everything acknowledged
        before it was sent. Without, it is answered from the owner's memory under its lease.

        Raises Rejected, HandlerFailed and InvalidInput as the actor's node answered; Unavailable when nobody could be
        reached at all; Timeout when it was refused until the deadline and surely not applied; InDoubt when it may
        have been applied: send the same `message_id` again to learn the outcome. InvalidInput, PayloadTooLarge as well
        for what no node could receive, wherever the actor lives today.
        """
        bare = message_id is None and type(name) is str and (arguments is None or arguments == {})
        command = (
            None if bare else self.prepare(actor, name, arguments, message_id=message_id, linearizable=linearizable)
        )
        if self._query_here is not None and not linearizable:
            if type(timeout_s) is not float or not 0 < timeout_s < LONGEST_S:  # not even a call where all is well
                check_timeout(timeout_s)
            self._asked_here = asked = self._asked_here + 1
            if not 1 < asked <= TURN:
                await self._turn()
            try:
                reply = self._query_here(actor, name, _NOTHING if command is None else command.arguments)
            except FerryError as error:
                return _value(_received(Answer(error=error)))
            if reply is not LATER:
                return reply
        if command is None:
            command = self.prepare(actor, name, linearizable=linearizable)
        return await self.deliver(command, timeout_s=timeout_s)

    def prepare(
        self, actor: ActorId, name: str, arguments: dict[str, Any] | None = None, *, message_id: str | None = None,
        linearizable: bool = False,
    ) -> Command:  # fmt: skip
        """What `deliver` would send. Raises InvalidInput, PayloadTooLarge for what no node could receive."""
        return new_command(
            actor, name, {} if arguments is None else arguments, linearizable=linearizable,
            message_id=new_message_id() if message_id is None else message_id, max_bytes=self._max_command_bytes,
        )  # fmt: skip

    async def deliver(self, command: Command, *, timeout_s: float, before: asyncio.Event | None = None) -> Any:
        """Send a prepared command; errors as for `send_message`. `before` is set when the one before it is over."""
        check_timeout(timeout_s)
        if self._clock is None:
            self._clock = asyncio.get_running_loop().time
        clock = self._clock
        deadline_s, expires_ms = clock() + timeout_s, int((self._wall_clock() + timeout_s) * 1000)
        attempts = _Attempts(command, before)
        while (left_s := deadline_s - clock()) > 0:
            answer = await self._attempt(command, expires_ms, attempts, min(left_s, ATTEMPT_S))
            if answer is not None:
                return _value(answer)
            await attempts.pause(max(deadline_s - clock(), 0))
        raise attempts.gave_up(timeout_s)

    async def _attempt(self, command: Command, expires_ms: int, attempts: _Attempts, timeout_s: float) -> Answer | None:
        """One try; None means try again."""
        unit = self._directory.unit_of(command.actor)
        try:
            answer = await self._ask(unit, command, expires_ms, timeout_s, alone=attempts.maybe_applied)
        except Timeout as error:
            attempts.unknown(error)
            await self._refresh(unit, attempts)
            return None
        except Unavailable as error:
            attempts.refused(error)
            await self._refresh(unit, attempts)
            return None
        match answer.error:
            case None:
                return answer
            case Busy() | OutOfOrder() as later:
                attempts.refused(later)
            case Rejected() | HandlerFailed():
                return answer
            case PermanentError() if attempts.maybe_applied:  # this try was not applied; an earlier one may have been
                raise attempts.in_doubt(str(answer.error))
            case Moved() | Unavailable() as elsewhere:
                attempts.refused(elsewhere)
                await self._refresh(unit, attempts)
            case Timeout() | InDoubt() as unknown:
                attempts.unknown(unknown)
            case _:
                return answer
        return None

    async def _ask(self, unit: str, command: Command, expires_ms: int, timeout_s: float, *, alone: bool) -> Answer:
        """`alone`: whatever became of the last try, this one depends on nobody else's message."""
        if self._local is not None and self._local.serves(unit):
            epoch, answer = 0, await self._ask_here(self._local, replace(command, expires_ms=expires_ms), timeout_s)
        else:
            owner, epoch = self._route(unit)
            if owner is None:
                mend = "start a coordinator and a node" if self._directory.counts(unit) else "try again in a moment"
                raise Unavailable(f"{unit_in_words(unit)} has no owner yet: {mend}")
            payload = encode_command(command, epoch=epoch, expires_ms=expires_ms)
            subject = self._subjects.command(owner, self._sender)
            answered = await self._link.request(subject, payload, timeout_s=timeout_s, alone=alone)
            try:
                answer = decode_answer(answered)
            except InvalidInput as error:
                log.warning("answer ignored", node=owner, message_id=command.message_id, error=str(error))
                raise Timeout(f"{owner} answered what cannot be read: {error}") from error  # it may have been applied
        if answer.owner is not None and answer.epoch > epoch:  # nearly always it is what this went by
            self._learn(self._directory.unit_of(command.actor), answer.owner, answer.epoch)
        return answer

    async def _ask_here(self, local: LocalNode, command: Command, timeout_s: float) -> Answer:
        self._asked_here += 1
        if not 1 < self._asked_here <= TURN:
            await self._turn()
        try:
            async with asyncio.timeout(timeout_s):
                return _received(await local.ask(command))
        except TimeoutError as error:
            raise Timeout(f"no answer from this node within {timeout_s:g} s") from error

    async def _turn(self) -> None:
        """Begin to count what one turn of the event loop asks; let others run when that is much."""
        if self._asked_here == 1:
            asyncio.get_running_loop().call_soon(self._new_turn)
        else:
            await asyncio.sleep(0)

    def _new_turn(self) -> None:
        self._asked_here = 0

    def _route(self, unit: str) -> tuple[NodeId | None, int]:
        owner, epoch = self._directory.owner_of(unit)
        learned = self._learned.get(unit)
        if learned is not None and learned[0] > epoch:
            epoch, owner = learned
        return owner, epoch

    def _learn(self, unit: str, owner: NodeId, epoch: int) -> None:
        if epoch > self._route(unit)[1]:
            self._learned[unit] = (epoch, owner)

    def _forget(self, unit: str, entry: MapEntry) -> None:
        """The map knows better. It does so whatever the epoch when actors of a shard live elsewhere: what one of them
        answered may have been taken for its shard's word.
        """
        if unit in self._learned and (self._learned[unit][0] <= entry.ownership.epoch or entry.ownership.apart):
            del self._learned[unit]

    async def _refresh(self, unit: str, attempts: _Attempts) -> None:
        try:
            await self._directory.refresh(unit)
        except (Timeout, Unavailable) as error:
            attempts.refused(error)


def check_timeout(timeout_s: float) -> None:
    """Raises InvalidInput for what is no time, and for one that nobody can wait."""
    is_number = type(timeout_s) in _NUMBERS or isinstance(timeout_s, Real)
    if not is_number or not 0 < timeout_s < LONGEST_S:
        raise InvalidInput(f"timeout of {shown(timeout_s)} s: must be a number greater than 0 and below {LONGEST_S:g}")


class _Attempts:
    """What is known about a command so far: was it ever possibly applied, and how long to pause before the next try."""

    __slots__ = ("_before", "_command", "_last", "_pause_s", "maybe_applied")

    def __init__(self, command: Command, before: asyncio.Event | None) -> None:
        self.maybe_applied = False
        self._command, self._before = command, before
        self._last: FerryError | None = None
        self._pause_s = RETRY_FIRST_S

    async def pause(self, at_most_s: float) -> None:
        """Wait before the next try: for the command before it where that is missing, else longer each time."""
        pause_s, self._pause_s = self._pause_s, min(self._pause_s * 2, RETRY_MOST_S)
        if isinstance(self._last, OutOfOrder) and self._before is not None and not self._before.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(at_most_s):
                    await self._before.wait()
            return
        if isinstance(self._last, Busy):
            pause_s = max(pause_s, self._last.retry_after_s)
        await asyncio.sleep(min(pause_s, at_most_s))

    def unknown(self, error: FerryError) -> None:
        self.maybe_applied, self._last = True, error

    def refused(self, error: FerryError) -> None:
        self._last = error

    def gave_up(self, timeout_s: float) -> FerryError:
        what = f"{self._command.name!r} to {self._command.actor}"
        if self.maybe_applied:
            return self.in_doubt(f"no answer within {timeout_s:g} s")
        if isinstance(self._last, Unavailable):
            return Unavailable(f"{what} was not applied: {self._last}")
        return Timeout(f"{what} was not applied within {timeout_s:g} s: {self._last or 'no attempt could be made'}")

    def in_doubt(self, why: str) -> InDoubt:
        command = self._command
        how = "read the actor" if command.number else f"send message id {command.message_id} again"
        return InDoubt(
            f"{command.name!r} to {command.actor} may have been applied ({why}): {how} to learn the outcome",
            message_id=command.message_id,
        )


def _value(answer: Answer) -> Any:
    if answer.error is not None:
        raise answer.error
    return answer.value


def _received(answer: Answer) -> Answer:
    """A local answer as it would have come by the network: the actor remembers its own, the caller may change this."""
    if answer.error is None and isinstance(answer.value, (str, int, float, type(None))):
        return answer
    return decode_answer(encode_answer(answer))


def new_message_id() -> str:
    """96 random bits: enough that two commands of one actor never share an id by chance."""
    return f"{_chance.getrandbits(96):024x}"


# A generator of our own, because an application may seed `random`'s, and two of its processes would share their ids. A
# call into the kernel for each id would cost as much as all else that a client does for a query.
_chance = random.Random()
os.register_at_fork(after_in_child=_chance.seed)
