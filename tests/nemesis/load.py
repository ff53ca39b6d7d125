"""Senders that go on through every fault, and write down what they were told: the history that the checker judges.

plain      awaits each reply; one left in doubt is asked again under its id, until its fate is known
ordered    a sender session with several commands on their way; in doubt, it goes on in a new session
both       ask now and then what the actor has, as their node knows it or linearizably
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from routing.address import ActorId, shard_of
from routing.client import Cluster
from routing.errors import FerryError, InDoubt
from routing.session import Session
from tests.checker.history import Operation, Outcome, outcome_of

PLAIN_SENDERS, ORDERED_SENDERS = 4, 2
ABREAST = 3  # commands of an ordered sender on their way at once
PAUSE_S = 0.03  # between two commands of one sender: some load, and time for the cluster on a small machine
ASK_S = 5.0  # a command's own time
ASKED_AGAIN = 12
ORDERED_S = 20.0  # nobody can ask again for a command of a session, so it gets the time that healing takes
SLOWEST_S = 0.6  # of a handler, so that faults find some running; below FERRY_DRAIN_HANDLERS_S, or moves are refused


class Load:
    """Senders on a few actors, from entering the context until `finish`. Every command writes an entry of its own."""

    def __init__(self, clients: Sequence[Cluster], actors: Sequence[ActorId], *, run: str) -> None:
        self.operations: list[Operation] = []
        self._clients, self._actors, self._run = clients, actors, run
        self._stopping = asyncio.Event()
        self._senders: list[asyncio.Task[None]] = []
        self._warm = {str(actor): asyncio.Event() for actor in actors}

    async def __aenter__(self) -> Self:
        for number in range(PLAIN_SENDERS + ORDERED_SENDERS):
            send = self._send_plain if number < PLAIN_SENDERS else self._send_ordered
            client = self._clients[number % len(self._clients)]
            self._senders.append(asyncio.create_task(send(f"s{number}", client)))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sender in self._senders:
            sender.cancel()
        await asyncio.gather(*self._senders, return_exceptions=True)

    async def warm(self, *, within_s: float) -> None:
        """Wait until every actor has answered once, so that each is live where it is. Raises TimeoutError."""
        async with asyncio.timeout(within_s):
            for answered in self._warm.values():
                await answered.wait()

    async def finish(self, *, within_s: float) -> None:
        """Let every sender end the command it is at. Raises TimeoutError, and what a sender has failed with."""
        self._stopping.set()
        async with asyncio.timeout(within_s):
            await asyncio.gather(*self._senders)

    # -- plain -------------------------------------------------------------------------------------------------------
    async def _send_plain(self, sender: str, client: Cluster) -> None:
        chance = random.Random(f"{self._run}/{sender}")
        number, before = 0, "nothing"
        while not self._stopping.is_set():
            number += 1
            actor, entry = chance.choice(self._actors), f"{self._run}.{sender}.{number}"
            match chance.randrange(10):
                case 0 | 1:
                    await self._query(client, sender, actor, linearizable=chance.random() < 0.5)
                case 2 | 3:
                    delay_s = chance.random() * SLOWEST_S
                    await self._command(client, sender, actor, "write_slowly", entry, delay_s=delay_s)
                case 4:  # which is there or not, by chance: the actor's own state decides whether it is rejected
                    await self._command(client, sender, actor, "write_after", entry, needs=before)
                case _:
                    await self._command(client, sender, actor, "write", entry)
            before = entry
            await asyncio.sleep(PAUSE_S)

    async def _command(self, client: Cluster, sender: str, actor: ActorId, name: str, entry: str, **more: Any) -> None:
        invoked_s, reply, error = time.monotonic(), None, None
        arguments = {"entry": entry, **more}
        for attempt in range(1, ASKED_AGAIN + 1):
            error = None
            try:
                reply = await client.send_message(actor, name, arguments, message_id=entry, timeout=ASK_S)
            except FerryError as raised:
                error = raised
            in_doubt = isinstance(error, InDoubt) or (attempt > 1 and outcome_of(error) is Outcome.NOT_APPLIED)
            if not in_doubt or self._stopping.is_set():
                break
        self._note(
            message_id=entry, actor=str(actor), sender=sender, kind="command", entry=entry,
            needs=str(more.get("needs", "")), invoked_s=invoked_s, returned_s=time.monotonic(),
            outcome=outcome_of(error, in_doubt_before=attempt > 1), reply=reply,
        )  # fmt: skip

    async def _query(self, client: Cluster, sender: str, actor: ActorId, *, linearizable: bool) -> None:
        invoked_s, reply, error = time.monotonic(), None, None
        try:
            reply = await client.send_message(actor, "read", linearizable=linearizable, timeout=ASK_S)
        except FerryError as raised:
            error = raised
        self._note(
            message_id=f"q{len(self.operations)}", actor=str(actor), sender=sender, kind="query", invoked_s=invoked_s,
            returned_s=time.monotonic(), outcome=outcome_of(error), reply=reply, linearizable=linearizable,
        )  # fmt: skip

    # -- ordered -----------------------------------------------------------------------------------------------------
    async def _send_ordered(self, sender: str, client: Cluster) -> None:
        chance = random.Random(f"{self._run}/{sender}")
        written = 0
        while not self._stopping.is_set():
            session, numbers, whole = client.session(), Counter[ActorId](), True
            while whole and not self._stopping.is_set():
                actor = chance.choice(self._actors)
                calls = []
                for _ in range(ABREAST):
                    written, numbers[actor] = written + 1, numbers[actor] + 1
                    entry = f"{self._run}.{sender}.{written}"
                    calls.append(self._ordered(session, sender, actor, entry, numbers[actor]))
                if chance.randrange(4) == 0:
                    calls.append(self._session_query(session, sender, actor, after=numbers[actor]))
                whole = all(await asyncio.gather(*calls))
                await asyncio.sleep(PAUSE_S)

    async def _ordered(self, session: Session, sender: str, actor: ActorId, entry: str, number: int) -> bool:
        """Send one command in its turn; False when the session has come to its end."""
        invoked_s, reply, error = time.monotonic(), None, None
        try:
            reply = await session.send_message(actor, "write", {"entry": entry}, timeout=ORDERED_S)
        except FerryError as raised:
            error = raised
        self._note(
            message_id=f"{session.id}.{actor}.{number}", actor=str(actor), sender=sender, kind="command", entry=entry,
            invoked_s=invoked_s, returned_s=time.monotonic(), outcome=outcome_of(error), reply=reply,
            session=session.id, number=number,
        )  # fmt: skip
        return error is None

    async def _session_query(self, session: Session, sender: str, actor: ActorId, *, after: int) -> bool:
        """Ask what the actor has, behind the session's commands so far."""
        invoked_s, reply, error = time.monotonic(), None, None
        try:
            reply = await session.query(actor, "read", timeout=ORDERED_S)
        except FerryError as raised:
            error = raised
        self._note(
            message_id=f"q{len(self.operations)}", actor=str(actor), sender=sender, kind="query", invoked_s=invoked_s,
            returned_s=time.monotonic(), outcome=outcome_of(error), reply=reply, session=session.id, after=after,
        )  # fmt: skip
        return True

    def _note(self, **observed: Any) -> None:
        operation = Operation(**observed)
        if operation.kind == "command" and operation.outcome is Outcome.ACKNOWLEDGED:
            self._warm[operation.actor].set()
        self.operations.append(operation)


def actors_of(shard: int, *, shards: int, run: str, count: int) -> list[ActorId]:
    """`count` ledgers that nobody has used yet, all in one shard."""
    found: list[ActorId] = []
    number = 0
    while len(found) < count:
        actor = ActorId("ledger", f"{run}-{number}")
        if shard_of(actor, shards) == shard:
            found.append(actor)
        number += 1
    return found
