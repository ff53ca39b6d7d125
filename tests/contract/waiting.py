"""Waiting for messages and for the server, with a deadline."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from nats.aio.client import Client

T = TypeVar("T")

WAIT_S = 15.0  # a hang guard, never reached when things work


async def take(queue: asyncio.Queue[T], count: int) -> list[T]:
    """The next `count` items."""
    async with asyncio.timeout(WAIT_S):
        return [await queue.get() for _ in range(count)]


async def handled(admin: Client) -> None:
    """Return when the server has handled all that was sent by `admin`, whose `flush` sends its ping ahead of that."""
    await admin.request("$JS.API.INFO", b"", timeout=WAIT_S)
