"""Whether NATS still holds the cluster that this process has joined: its storage may be new, or the URL lead elsewhere.

    reconnect  -> in doubt: nothing is stored and no lease is trusted, so nothing is served (routing/link.py)
    same birth -> certain again
    another    -> Incompatible: the process ends, and its supervisor starts it anew

Why it must end: its copy of the map names revisions, and its actors versions, of another storage. That an append names
the sequence it follows does not keep them apart: an actor without a log follows 0 in both, and a cluster that begins as
the one before it did gives out the same numbers again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from routing.birth import RETRY_S, Birth, decode_birth, found_or_join, last_birth
from routing.errors import Incompatible, StreamMissing, Timeout, Unavailable
from routing.link import Link
from routing.logs import get_logger
from routing.settings import Settings
from routing.subjects import Subjects

log = get_logger("ferry.identity")

ANSWER_S = 1.0  # nothing is served meanwhile: rather ask again
GONE_S = 3.0  # a NATS server that has just begun to lead others may not have read yet which streams there are


class Identity:
    """Compares the cluster's birth document with the one read at the start, after each reconnect of a link.

    Invariant: from the reconnect on, before anything can be sent, until a comparison that began after it has found
    them equal, `link.in_doubt` is set.
    """

    def __init__(self, link: Link, subjects: Subjects, born: Birth) -> None:
        self._link, self._subjects, self._born = link, subjects, born
        self._doubted = asyncio.Event()
        self._reconnects = 0
        link.on_reconnect(self._doubt)

    @classmethod
    async def join(cls, link: Link, settings: Settings) -> Identity:
        """Found the cluster, or join it: again after a reconnect meanwhile. Raises what `found_or_join` does."""
        reconnected = asyncio.Event()
        link.on_reconnect(reconnected.set)
        while True:
            reconnected.clear()
            born = await found_or_join(link, settings)
            if not reconnected.is_set():
                return cls(link, settings.subjects, born)

    async def while_same(self, serving: Coroutine[Any, Any, None]) -> None:
        """Run `serving` to its end, and cancel it when NATS comes back with another cluster.

        Raises what `serving` does; Incompatible when it was cancelled.
        """
        tasks = [asyncio.create_task(self.keep()), asyncio.create_task(serving)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                task.result()

    async def keep(self) -> None:
        """Compare after each reconnect, for ever. Raises Incompatible when this is another cluster."""
        while True:
            await self._doubted.wait()
            try:
                await self.confirm()
            except (Unavailable, Timeout) as error:
                log.warning("not known yet whether this is the same cluster", error=str(error))
                await asyncio.sleep(RETRY_S)

    async def confirm(self) -> None:
        """Return when this is certainly the cluster that was joined, at once without a reconnect since.

        Raises Incompatible when it is another, or none after GONE_S; Unavailable, Timeout when that cannot be told now.
        """
        while self._doubted.is_set():
            reconnects = self._reconnects
            born = await self._read()
            if born != self._born:
                raise Incompatible(
                    "this is another cluster than the one that was joined: its NATS storage is new, or the URL leads"
                    " elsewhere; start again"
                )
            if reconnects == self._reconnects:
                self._doubted.clear()
                self._link.in_doubt = False

    async def _read(self) -> Birth | None:
        """What is stored now; None when nothing is, each time it is asked for GONE_S. Raises as `confirm`."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + GONE_S
        while True:
            try:
                stored = await last_birth(self._link, self._subjects, timeout_s=ANSWER_S)
            except StreamMissing:
                stored = None
            if stored is not None:
                return decode_birth(stored.payload, self._subjects.cluster)
            if loop.time() >= deadline_s:
                return None
            await asyncio.sleep(RETRY_S)

    def _doubt(self) -> None:
        self._link.in_doubt = True
        self._reconnects += 1
        self._doubted.set()
