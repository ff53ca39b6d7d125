"""A command that has reached this node, and the way back to whoever waits for its answer."""

from __future__ import annotations

import asyncio

from msgspec import Struct

from routing.envelope import Answer, Command


class Delivery(Struct):  # one for each message: see Command
    """One command, how it came here, and where its answer goes: a reply subject or a local future.

    A forwarded delivery keeps its reply subject, so the answer goes straight to the caller however often it moved.
    """

    command: Command
    size_bytes: int = 0
    subject: str = ""  # it came by
    reply: str = ""
    future: asyncio.Future[Answer] | None = None

    @property
    def sender(self) -> str:
        """The process it came from last: a client, or a node that forwarded it."""
        return self.subject.rpartition(".")[2]

    def answer_here(self, answer: Answer) -> None:
        """Tell whoever waits in this very process."""
        if self.future is not None and not self.future.done():
            self.future.set_result(answer)
