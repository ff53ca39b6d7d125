"""Actors for measurements: a blob of a given size that counts its commands."""

from __future__ import annotations

from runtime.actor import Actor, command, event, query


class Blob(Actor):
    """State of a chosen size; incompressible, so that bytes on the wire are bytes of state."""

    actor_type = "blob"

    def __init__(self) -> None:
        self.commands = 0
        self.text = ""

    @command
    def fill(self, *, text: str) -> int:
        self.emit("filled", text=text)
        return len(self.text)

    @command
    def touch(self) -> int:
        self.emit("touched")
        return self.commands

    @query
    def count(self) -> int:
        return self.commands

    @event
    def filled(self, text: str) -> None:
        self.text = text

    @event
    def touched(self) -> None:
        self.commands += 1
