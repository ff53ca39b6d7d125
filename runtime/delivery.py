"""A command that has reached this node, and the way back to whoever waits for its answer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from routing.envelope import Answer, Command, encode_answer
from routing.errors import HandlerFailed
from routing.link import Link


@dataclass(slots=True, kw_only=True)
class Delivery:
    """One command, how it came here, and where its answer goes: a reply subject or a local future.

    A forwarded delivery keeps its reply subject, so the answer goes straight to the caller however often it moved.
    """

    command: Command
    size_bytes: int = 0
    sender: str = ""  # the process it came from last: a client, or a node that forwarded it
    reply: str = ""
    future: asyncio.Future[Answer] | None = field(default=None, repr=False)

    async def answer(self, link: Link, answer: Answer) -> None:
        """Raises Unavailable when the link is down; the caller will ask again under the same message id."""
        if self.future is not None:
            if not self.future.done():
                self.future.set_result(answer)
        elif self.reply:
            try:
                payload = encode_answer(answer)
            except TypeError:
                problem = f"{self.command.name!r} of {self.command.actor} answered with a value that is not JSON-like"
                payload = encode_answer(Answer(error=HandlerFailed(problem), owner=answer.owner, epoch=answer.epoch))
            await link.publish(self.reply, payload)
