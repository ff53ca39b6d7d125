"""What a source has prepared of one move: states as they were captured, and their bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from routing.address import ActorId
from routing.control import ROWS_PER_PAGE, ManifestRow, MigrationRequest, StepRequest
from runtime.codec import aside, capture_state, digest_of, pack
from runtime.errand import Errand
from runtime.live_actor import LiveActor
from runtime.portable import Portable


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """One actor as it stood between two commands. Nothing here follows the live actor afterwards."""

    actor_id: ActorId
    schema: int
    version: int
    epoch: int
    trail: tuple[int, ...]
    memory: dict[str, Any]
    state: bytes

    @classmethod
    def of(cls, live: LiveActor) -> Captured:
        """Raises StateNotPortable when the state cannot be encoded."""
        assert live.instance is not None
        assert live.memory is not None
        state = capture_state(live.instance)
        live.state_bytes = len(state)
        return cls(
            actor_id=live.actor_id, schema=live.instance.schema_version, version=live.version, epoch=live.epoch,
            trail=live.trail, memory=live.memory.to_document(), state=state,
        )  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Leaving:
    """One actor of the move. `captured` is let go when its bytes are ready: a state is not kept twice.

    `version` is that of the log when the gate was closed; `captured_version` is less when the state was copied before
    and the actor has changed since: the destination replays what is in between.
    """

    actor_id: ActorId
    version: int
    captured_version: int
    captured: Captured | None
    digest: str = ""
    state_bytes: int = 0
    payload: bytes | None = None

    @classmethod
    def of(cls, live: LiveActor) -> Leaving:
        captured = Captured.of(live)
        return cls(
            actor_id=live.actor_id, version=live.version, captured_version=live.version, captured=captured,
            state_bytes=len(captured.state),
        )  # fmt: skip

    @property
    def held_bytes(self) -> int:
        return self.state_bytes if self.payload is None else len(self.payload)

    async def take_digest(self) -> None:
        if not self.digest:
            assert self.captured is not None
            self.digest = await aside(self.state_bytes, partial(digest_of, self.captured.state))

    async def encode(self, max_state_bytes: int) -> int:
        """Turn the state into bytes as they travel; returns how many more are held than before.

        Raises PayloadTooLarge.
        """
        captured, held_bytes = self.captured, self.held_bytes
        if self.payload is None and captured is not None:
            await self.take_digest()
            self.payload = await aside(self.state_bytes, partial(_encoded, captured, self.digest, max_state_bytes))
            self.captured = None
        return self.held_bytes - held_bytes

    def row(self, index: int) -> ManifestRow:
        assert self.payload is not None
        return ManifestRow(
            index=index, actor_id=str(self.actor_id), version=self.version, digest=self.digest,
            state_bytes=self.state_bytes, transfer_bytes=len(self.payload),
            captured_version=self.captured_version if self.captured_version != self.version else None,
        )  # fmt: skip


def _encoded(captured: Captured, digest: str, max_state_bytes: int) -> bytes:
    frame = pack(
        captured.state, schema=captured.schema, digest=digest, max_bytes=max_state_bytes, actor=captured.actor_id
    )
    return Portable(
        actor_id=captured.actor_id, version=captured.version, epoch=captured.epoch, trail=captured.trail,
        memory=captured.memory, frame=frame,
    ).encode()  # fmt: skip


class Vouched(NamedTuple):
    """What the destination has verified before the gate was closed: its incarnation, rows by index, and when."""

    incarnation: str
    rows: dict[int, ManifestRow]
    at_s: float


@dataclass(slots=True)
class Outgoing:
    """One move of a unit, as far as this source has got with it.

    `precopied` are states that were sent while their actors went on; their places in the manifest stay theirs.
    """

    move: str
    precopied: dict[ActorId, Leaving] = field(default_factory=dict)
    vouched: Vouched | None = None
    precopy: Errand | None = None
    precopy_over: bool = False  # done or failed, it is tried once
    closed_s: float | None = None  # when the gate was closed and no handler ran any more
    ahead: Errand | None = None  # the steps up to COMMIT, taken in one go
    prepared: dict[str, tuple[dict[str, Any], float]] = field(default_factory=dict)  # what they answered, and when
    leaving: list[Leaving] | None = None  # everything to be handed over, once the gate is closed
    rows: list[ManifestRow] | None = None
    sending: Errand | None = None
    sent: bool = False
    sent_bytes: int = 0
    held_bytes: int = 0  # of everything captured for this move, as states or as payloads
    acknowledging: Errand | None = None
    word: str | None = None  # the same, as it came before `await_ack`, which takes it from here
    heir: str | None = None  # the incarnation of the destination that has acknowledged everything
    preparing: asyncio.Lock = field(default_factory=asyncio.Lock)  # a step that runs twice prepares once

    def news(self) -> list[ManifestRow]:
        """The rows that the destination has not verified as they are now."""
        known = self.vouched.rows if self.vouched is not None else {}
        return [row for row in self.rows or () if known.get(row.index) != row]

    def payload(self, index: int) -> bytes:
        assert self.leaving is not None
        payload = self.leaving[index].payload
        assert payload is not None
        return payload

    def cancel(self) -> None:
        for errand in (self.precopy, self.ahead, self.sending, self.acknowledging):
            if errand is not None:
                errand.cancel()


def manifest_pages(request: StepRequest, rows: list[ManifestRow], *, verify: bool) -> Iterator[MigrationRequest]:
    """At least one page, for an empty unit is announced too. `verify` goes with the last one."""
    starts = range(0, max(len(rows), 1), ROWS_PER_PAGE)
    for start in starts:
        yield MigrationRequest(
            move=request.move, unit=request.unit, epoch=request.epoch, source=request.source,
            destination=request.destination, rows=tuple(rows[start : start + ROWS_PER_PAGE]),
            verify=verify and start == starts[-1],
        )  # fmt: skip
