"""Commands that keep coming while a shard moves, and the proof that each was applied once."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import TracebackType
from typing import Any, Self

from routing.address import ActorId, shard_of
from routing.client import Cluster
from routing.errors import InDoubt, TransientError

ANSWER_S = 45.0  # for one command, however often it has to be sent: above everything a move may take
PACE_S = 0.004  # between two commands of one sender: some hundreds a second in all, which leaves the cores to the move
RESEND_EVERY = 4
MILES = 100


class Traffic:
    """Senders that each fly an aircraft of one shard, one flight after another, until the context ends.

    `fly` answers how many flights the aircraft has: a sender that sees anything but its own count has found a command
    lost, or one applied twice. Every so many commands are sent again under the same id, and must get the same answer.
    """

    def __init__(self, client: Cluster, *, shard: int, shards_total: int, senders: int = 6) -> None:
        self.aircraft = _aircraft_of(shard, shards_total, senders)
        self.flown = Counter[ActorId]()
        self._client, self._stopping = client, asyncio.Event()
        self._senders: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._senders = [asyncio.create_task(self._fly(actor)) for actor in self.aircraft]
        await self.goes_on()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        if kind is not None:  # the test has failed already: do not hide why
            for sender in self._senders:
                sender.cancel()
            await asyncio.gather(*self._senders, return_exceptions=True)
            return
        await asyncio.gather(*self._senders)

    async def goes_on(self) -> None:
        """Return when every sender has had an answer to a command that it sent after this call."""
        wanted = {actor: self.flown[actor] + 2 for actor in self.aircraft}
        async with asyncio.timeout(ANSWER_S):
            while any(self.flown[actor] < count for actor, count in wanted.items()):
                for sender in self._senders:
                    if sender.done():
                        sender.result()
                await asyncio.sleep(PACE_S)

    async def check_totals(self) -> None:
        """What the actors say of themselves, after the traffic: what was acknowledged, once."""
        for actor in self.aircraft:
            totals = await self._answer(actor, "totals", {}, None)
            expected = {"flights": self.flown[actor], "miles": MILES * self.flown[actor]}
            assert {name: totals[name] for name in expected} == expected

    async def _fly(self, actor: ActorId) -> None:
        while not self._stopping.is_set():
            number = self.flown[actor] + 1
            for _ in range(2 if number % RESEND_EVERY == 0 else 1):
                answer = await self._answer(actor, "fly", {"distance": MILES}, f"{actor.key}-{number}")
                assert answer == number, f"flight {number} of {actor} was counted as its {answer}."
            self.flown[actor] = number
            await asyncio.sleep(PACE_S)

    async def _answer(self, actor: ActorId, command: str, arguments: dict[str, Any], message_id: str | None) -> Any:
        """Send one command until it is answered, always under the same id, as an application would."""
        async with asyncio.timeout(ANSWER_S):
            while True:
                try:
                    return await self._client.send_message(actor, command, arguments, message_id=message_id)
                except (TransientError, InDoubt):
                    await asyncio.sleep(PACE_S)  # a closed client refuses at once; never spin on it


def _aircraft_of(shard: int, shards_total: int, count: int) -> list[ActorId]:
    """Tail numbers that fall into one shard."""
    found: list[ActorId] = []
    number = 0
    while len(found) < count:
        actor = ActorId("aircraft", f"N{number}")
        if shard_of(actor, shards_total) == shard:
            found.append(actor)
        number += 1
    return found
