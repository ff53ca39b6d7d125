"""An actor on its way to another node: everything the destination needs to go on as if it had been there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from msgspec import Raw

from routing.address import ActorId
from routing.typed import Count, reader
from runtime.actor import ActorClasses
from runtime.codec import Frame, FrameHeader, frame_header, frame_of, join, restore_state, split, unpack
from runtime.live_actor import LiveActor
from runtime.memory import Limits, Memory, read_memory


class _Header(FrameHeader, kw_only=True):
    actor: str
    version: Count
    epoch: Count
    trail: tuple[Count, ...]
    memory: Raw


_read_header = reader(_Header, "header of a state")


@dataclass(frozen=True, slots=True, kw_only=True)
class Portable:
    """State at a version of the log, with what the actor remembers of answered commands."""

    actor_id: ActorId
    version: int
    epoch: int
    trail: tuple[int, ...]
    memory: dict[str, Any]
    frame: Frame

    def encode(self) -> bytes:
        header = {
            "actor": str(self.actor_id), "version": self.version, "epoch": self.epoch, "trail": self.trail,
            "memory": self.memory, **frame_header(self.frame),
        }  # fmt: skip
        return join(header, self.frame.body)

    @classmethod
    def decode(cls, payload: bytes | bytearray) -> Portable:
        """Raises InvalidInput for anything that `encode` did not write."""
        line, body = split(payload)
        header = _read_header(line)
        return cls(
            actor_id=ActorId.parse(header.actor), version=header.version, epoch=header.epoch, trail=header.trail,
            memory=read_memory(bytes(header.memory)), frame=frame_of(header, body),
        )  # fmt: skip

    def state(self, max_state_bytes: int) -> bytes:
        """What `capture` gave, checked against its digest. Raises StateNotPortable, PayloadTooLarge."""
        return unpack(self.frame, max_bytes=max_state_bytes)

    def activate(
        self, classes: ActorClasses, *, limits: Limits, max_state_bytes: int, state: bytes | None = None
    ) -> LiveActor:
        """An inactive actor to be verified against the log before its first use. `state` saves unpacking it again.

        Raises StateNotPortable, UnknownActorType, PayloadTooLarge: the destination's code cannot take it over.
        """
        actor_class = classes.get(self.actor_id.actor_type)
        unpacked = self.state(max_state_bytes) if state is None else state
        instance = restore_state(actor_class, unpacked, self.frame.schema)
        live = LiveActor(self.actor_id)
        memory = Memory.from_document(self.memory, limits)
        live.stand_at(instance, memory, version=self.version, epoch=self.epoch, trail=self.trail)
        live.unverified, live.state_bytes = True, self.frame.state_bytes
        return live
