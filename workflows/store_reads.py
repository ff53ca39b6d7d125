"""Reading single records: those that are asked for at the same time are read in one round trip.

The moves of a convoy take their steps at the same time, and each looks at its own record and at that of their plan.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, Protocol, TypeVar


class Named(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=Named)


class Reads(Generic[T]):
    """Records of one kind by their ids. For the record store, which gives each call its deadline."""

    def __init__(self, read: Callable[[Sequence[str]], Awaitable[Sequence[T]]], *, timeout_s: float) -> None:
        """`read` reads many at once, and leaves out those that are not there or cannot be read."""
        self._read, self._timeout_s = read, timeout_s
        self._wanted: dict[str, None] = {}
        self._reading: asyncio.Task[dict[str, T]] | None = None

    async def one(self, name: str) -> T | None:
        """The record as it is now, never as it was before this call; None when there is none to be read."""
        self._wanted[name] = None
        if self._reading is None or self._reading.done():  # one that was cancelled before it began
            self._reading = asyncio.create_task(self._read_wanted())
            self._reading.add_done_callback(lambda done: done.cancelled() or done.exception())  # asked for, or not
        return (await asyncio.shield(self._reading)).get(name)

    async def _read_wanted(self) -> dict[str, T]:
        """Read what was asked for until this begins, in the next turn of the event loop."""
        wanted, self._wanted, self._reading = list(self._wanted), {}, None
        async with asyncio.timeout(self._timeout_s):  # those who asked may have gone
            return {record.id: record for record in await self._read(wanted)}
