"""The actor that a checked run writes to: it keeps every entry it was given, in order."""

from __future__ import annotations

import asyncio

from runtime.actor import Actor, Rejected, command, event, query


class Ledger(Actor):
    """Nothing lost, doubled, invented or overtaken goes unnoticed in it. Every command replies its entry's position."""

    actor_type = "ledger"

    def __init__(self) -> None:
        self.entries: list[str] = []

    @command
    def write(self, *, entry: str) -> int:
        return self._write(entry)

    @command
    def write_after(self, *, entry: str, needs: str) -> int:
        """Raises Rejected unless the entry `needs` is there: a "no" that is right only on the newest state."""
        if needs not in self.entries:
            raise Rejected(f"{entry} comes after {needs}, which is not there")
        return self._write(entry)

    @command
    async def write_slowly(self, *, entry: str, delay_s: float) -> int:
        """Leaves the time for a move, a fault or another message to arrive while this runs."""
        await asyncio.sleep(delay_s)
        return self._write(entry)

    @query
    def read(self) -> list[str]:
        return self.entries

    @event
    def written(self, entry: str) -> None:
        self.entries.append(entry)

    def _write(self, entry: str) -> int:
        self.emit("written", entry=entry)
        return len(self.entries)
