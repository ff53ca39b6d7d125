"""Actors for measurements: a blob of a given size that counts its commands, and a large one."""

from __future__ import annotations

import random
import zlib

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


class Large(Actor):
    """State of tens of megabytes, opaque to Ferry and incompressible, made from a seed so that its log stays small."""

    actor_type = "large"

    def __init__(self) -> None:
        self.touches = 0
        self.body = b""

    def capture(self) -> bytes:
        return self.touches.to_bytes(8, "big") + self.body

    def restore(self, state: bytes) -> None:
        self.touches, self.body = int.from_bytes(state[:8], "big"), state[8:]

    @command
    def grow(self, *, size_bytes: int, seed: int) -> int:
        self.emit("grown", size_bytes=size_bytes, seed=seed)
        return len(self.body)

    @command
    def touch(self) -> int:
        self.emit("touched")
        return self.touches

    @query
    def check(self) -> list[int]:
        return [self.touches, len(self.body), zlib.crc32(self.body)]

    @event
    def grown(self, size_bytes: int, seed: int) -> None:
        self.body = random.Random(seed).randbytes(size_bytes)

    @event
    def touched(self) -> None:
        self.touches += 1
