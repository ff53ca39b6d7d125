"""The node's side of a move: the verbs a worker asks for, at the source and at the destination.

    source        pause -> capture -> serialize -> send -> await_ack -> commit       or resume, at any point
    destination              stage (handle_migration_request), chunks, verify, activate

Every verb is idempotent under the move id, and acts only while this source is paused for that move. A source that is
not (any more) raises NotApplicable: the map has moved on, and the worker reads there how.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import structlog

from routing import control, shard_map
from routing.address import ActorId
from routing.control import ROWS_PER_PAGE, ManifestRow, MigrationRequest, StepRequest
from routing.directory import Directory
from routing.errors import FerryError, InvalidInput, NotApplicable, Unavailable
from routing.failpoints import Failpoints
from routing.link import Link
from routing.settings import Settings
from routing.shard_map import Outcome
from routing.subjects import Subjects
from runtime import rules
from runtime.arrivals import StagedActors
from runtime.codec import capture_state, digest_of, join, number, numbers, pack, text
from runtime.host import Host
from runtime.live_actor import LiveActor
from runtime.mailbox import Mailboxes
from runtime.portable import Portable
from runtime.turn import Turn
from runtime.unit import Unit, UnitState

log = structlog.get_logger("ferry.handover")

COMMITS_REMEMBERED = 1_000  # a `delete` that runs twice gets the first one's answer
NEWS_S = 0.05  # the map's watch tells of a COMMIT at about the time its source does
ACTIVATE_S = 2.0  # how long a committed source waits for the destination; it activates from the map in any case


@dataclass(frozen=True, slots=True, kw_only=True)
class _Captured:
    """One actor as it stood when the gate was closed. Nothing here follows the live actor afterwards."""

    actor_id: ActorId
    schema: int
    version: int
    epoch: int
    trail: tuple[int, ...]
    memory: dict[str, Any]
    state: bytes
    digest: str

    @classmethod
    def of(cls, live: LiveActor) -> _Captured:
        """Raises StateNotPortable when the state cannot be encoded."""
        assert live.instance is not None
        assert live.memory is not None
        state = capture_state(live.instance)
        return cls(
            actor_id=live.actor_id, schema=live.instance.schema_version, version=live.version, epoch=live.epoch,
            trail=live.trail, memory=live.memory.to_document(), state=state, digest=digest_of(state),
        )  # fmt: skip


@dataclass(slots=True)
class _Outgoing:
    """What a paused source has prepared for one move."""

    move: str
    captured: list[_Captured] | None = None
    rows: list[ManifestRow] | None = None
    payloads: list[bytes] = field(default_factory=list)
    sent: bool = False
    heir: str | None = None  # the incarnation of the destination that has acknowledged everything
    capturing: asyncio.Lock = field(default_factory=asyncio.Lock)  # a step that runs twice captures once


class Handover:
    """Moves units out of and into a host, one verb at a time."""

    def __init__(
        self, *, host: Host, mailboxes: Mailboxes, arrivals: StagedActors, link: Link, transfer_link: Link,
        directory: Directory, subjects: Subjects, settings: Settings, clock: Callable[[], float],
        failpoints: Failpoints,
    ) -> None:  # fmt: skip
        self._host, self._mailboxes, self._arrivals = host, mailboxes, arrivals
        self._link, self._transfer_link = link, transfer_link
        self._directory, self._subjects, self._settings, self._clock = directory, subjects, settings, clock
        self._failpoints = failpoints
        self._outgoing: dict[str, _Outgoing] = {}  # unit -> the move it is paused for
        self._committed: OrderedDict[str, dict[str, Any]] = OrderedDict()

    # -- source ------------------------------------------------------------------------------------------------------
    async def pause(self, request: StepRequest) -> dict[str, Any]:
        """Close the gate of the whole unit and let what runs finish. Answers `{"actors", "waiting"}`.

        The whole unit, not only its live actors: otherwise a message would activate one in the middle of the move.
        """
        entry = await self._directory.refresh(request.unit)
        host = self._host
        if entry is None or not rules.applies(
            entry.ownership, move=request.move, epoch=request.epoch, node=host.node_id, incarnation=host.incarnation
        ):
            raise NotApplicable(f"{request.unit} is not locked for {request.move} at epoch {request.epoch} here")
        unit = host.units.get(request.unit)
        if unit is None or unit.state is UnitState.OPENING:
            raise Unavailable(f"{request.unit} is just being opened here: try again")
        if request.unit not in self._outgoing or self._outgoing[request.unit].move != request.move:
            self._outgoing[request.unit] = _Outgoing(request.move)
        await host.close_gate(unit, request.move)
        return {"actors": len(unit.actors), "waiting": len(unit.buffer)}

    async def capture(self, request: StepRequest) -> dict[str, Any]:
        """Take the state of every live actor at the last sequence of its log. Answers a page of rows.

        Raises StateNotPortable naming the actor whose state cannot be encoded.
        """
        unit, outgoing = self._paused(request)
        async with outgoing.capturing:
            if outgoing.captured is None:
                outgoing.captured = await self._capture_all(unit, request)
        rows = [
            {"index": index, "actor_id": str(c.actor_id), "version": c.version, "digest": c.digest}
            for index, c in enumerate(outgoing.captured)
        ]
        return _page(rows, request.offset)

    async def _capture_all(self, unit: Unit, request: StepRequest) -> list[_Captured]:
        def still_alone() -> None:
            self._still_paused(unit, request)

        await unit.quiet(self._settings.drain_handlers_s)
        still_alone()
        captured, turn = [], Turn()
        for live in list(unit.actors.values()):
            if live.instance is None:
                continue  # its first message came with the gate: the log has all there is of it
            if live.dirty or not live.unverified:
                await self._mailboxes.make_current(unit, live, still_alone)
            # else it came by a move and nobody has used it since: it goes on as it came, and is compared with its log
            # before its first use there as it would have been here. Reading a thousand logs now would be half a second.
            captured.append(_Captured.of(live))
            if await turn.over():
                still_alone()
        return captured

    async def serialize(self, request: StepRequest) -> dict[str, Any]:
        """Turn captured state into bytes. Answers a page of rows with sizes. Raises PayloadTooLarge."""
        _, outgoing = self._paused(request)
        if outgoing.captured is None:
            raise NotApplicable(f"move {request.move} is not captured yet")
        if outgoing.rows is None:
            rows, payloads, turn = [], [], Turn()
            for index, captured in enumerate(outgoing.captured):
                payload = self._portable(captured).encode()
                payloads.append(payload)
                rows.append(
                    ManifestRow(
                        index=index, actor_id=str(captured.actor_id), version=captured.version,
                        digest=captured.digest, state_bytes=len(captured.state), transfer_bytes=len(payload),
                    )
                )  # fmt: skip
                await turn.over()  # let commands of other shards run
            outgoing.rows, outgoing.payloads = rows, payloads
        answered = [
            {
                "index": row.index, "actor_id": row.actor_id, "version": row.version, "digest": row.digest,
                "state_bytes": row.state_bytes,
            }
            for row in outgoing.rows
        ]  # fmt: skip
        return _page(answered, request.offset)

    def _portable(self, captured: _Captured) -> Portable:
        frame = pack(
            captured.state, schema=captured.schema, digest=captured.digest,
            max_bytes=self._settings.max_state_bytes, actor=captured.actor_id,
        )  # fmt: skip
        return Portable(
            actor_id=captured.actor_id, version=captured.version, epoch=captured.epoch, trail=captured.trail,
            memory=captured.memory, frame=frame,
        )  # fmt: skip

    async def send(self, request: StepRequest) -> dict[str, Any]:
        """Announce the actors to the destination, then send what it lacks. Answers `{"sent_bytes"}`.

        Raises what the destination raised: UnknownActorType, PayloadTooLarge; Unavailable, Timeout when it is away.
        """
        unit, outgoing = self._paused(request)
        if outgoing.rows is None:
            raise NotApplicable(f"move {request.move} is not serialized yet")
        lacking: list[int] = []
        for start in range(0, max(len(outgoing.rows), 1), ROWS_PER_PAGE):
            page = MigrationRequest(
                move=request.move, unit=request.unit, epoch=request.epoch, source=request.source,
                destination=request.destination, rows=tuple(outgoing.rows[start : start + ROWS_PER_PAGE]),
            )  # fmt: skip
            answer = await self._ask_destination(request, "stage", page)
            lacking.extend(numbers(answer, "lacking"))
        if any(index >= len(outgoing.rows) for index in lacking):
            raise InvalidInput(f"{request.destination} lacks actors that were never announced: upgrade it")
        sent_bytes = await self._send_chunks(unit, request, outgoing, lacking)
        outgoing.sent = True
        return {"sent_bytes": sent_bytes}

    async def _send_chunks(self, unit: Unit, request: StepRequest, outgoing: _Outgoing, lacking: list[int]) -> int:
        chunks = chunks_of(request.move, [(i, outgoing.payloads[i]) for i in lacking], self._settings.chunk_bytes)
        subject = self._subjects.transfer(request.destination, request.move)
        in_flight = max(1, self._settings.transfer_window_bytes // self._settings.chunk_bytes)

        async def sender() -> None:
            for chunk in chunks:  # the senders share one iterator: each takes the next chunk when its last is acked
                answer = await self._transfer_link.request(subject, chunk, timeout_s=self._settings.step_timeout_s)
                control.result_of(answer)
                self._still_paused(unit, request)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(in_flight):
                    group.create_task(sender())
        except* FerryError as several:
            raise _first(several) from several
        return sum(len(outgoing.payloads[i]) for i in lacking)

    async def await_ack(self, request: StepRequest) -> dict[str, Any]:
        """Have the destination verify and decode everything, and keep its word. Answers `{"actors"}`.

        An acknowledgement means staged, verified and decodable by the destination's code, not merely received.
        """
        _, outgoing = self._paused(request)
        if not outgoing.sent:
            raise NotApplicable(f"move {request.move} is not sent yet")
        expected = len(outgoing.rows or ())
        held, heir = await self._verified(request)
        if held != expected:
            await self.send(request)  # the destination was restarted, say: it gets what it lacks now
            held, heir = await self._verified(request)
            if held != expected:
                raise Unavailable(f"{request.destination} holds {held} of {expected} actors after sending twice")
        outgoing.heir = heir
        return {"actors": expected}

    async def _verified(self, request: StepRequest) -> tuple[int, str]:
        """How many actors the destination holds ready, and its incarnation; -1 when it lacks some, or all."""
        try:
            answer = await self._ask_destination(request, "verify", request)
        except Unavailable as error:
            log.info("destination lacks something", move=request.move, error=str(error))
            return -1, ""
        return number(answer, "actors"), text(answer, "incarnation")

    async def commit(self, request: StepRequest) -> dict[str, Any]:
        """COMMIT: the point of no return. Then the destination serves, and gets what waited here, in order.

        Answers `{"blackout_ms", "waiting"}`: from closing the gate here to the destination's word that it serves, on
        this node's clock; `blackout_ms` is null when that word did not come (it activates from the map all the same).
        """
        if request.move in self._committed:
            return self._committed[request.move]
        unit, outgoing = self._paused(request)
        if outgoing.heir is None:
            raise NotApplicable(f"move {request.move} is not acknowledged by {request.destination}")
        assert unit.pause is not None
        began_s, waiting = unit.pause.began_s, len(unit.buffer)
        await self._write_commit(request, outgoing.heir)
        self._failpoints.hit("committed")
        answer: dict[str, Any] = {"blackout_ms": None, "waiting": waiting}
        try:
            await self._ask_destination(request, "activate", request)
            answer["blackout_ms"] = round((self._clock() - began_s) * 1000, 3)
        except FerryError as error:
            log.warning("destination has not answered; it activates from the map", move=request.move, error=str(error))
        self._outgoing.pop(request.unit, None)
        self._committed[request.move] = answer
        while len(self._committed) > COMMITS_REMEMBERED:
            self._committed.popitem(last=False)
        return answer

    async def _write_commit(self, request: StepRequest, heir: str) -> None:
        """Write COMMIT, once. A write of unknown fate leaves the gate closed and is settled by reading again."""

        def change(view: shard_map.Ownership) -> shard_map.Ownership:
            if view.outcome_of(request.move) is Outcome.COMMITTED:
                raise _Done
            return shard_map.commit(view, move=request.move, incarnation=self._host.incarnation, heir=heir)

        try:
            await self._directory.decide(request.unit, change)
        except _Done:
            return

    async def resume(self, request: StepRequest) -> dict[str, Any]:
        """Look at the map at once instead of waiting for it: a rolled back source opens, a destination forgets."""
        await self._directory.refresh(request.unit)
        self.forget_resolved()
        unit = self._host.units.get(request.unit)
        return {"state": unit.state.value if unit is not None else "not held"}

    # -- destination -------------------------------------------------------------------------------------------------
    async def handle_migration_request(self, request: MigrationRequest) -> dict[str, Any]:
        """A source announces actors: answers `{"lacking": [index, ...]}`, what is to be sent.

        Raises NotApplicable unless the map says that this move comes here, UnknownActorType, PayloadTooLarge.
        """
        entry = self._directory.get(request.unit)
        if entry is None or entry.ownership.move != request.move:
            entry = await self._directory.refresh(request.unit)
        view = entry.ownership if entry is not None else None
        if view is None or view.move != request.move or view.destination != self._host.node_id:
            raise NotApplicable(f"{request.unit} is not coming here with {request.move}")
        return {"lacking": self._arrivals.announce(request)}

    async def verify(self, request: StepRequest) -> dict[str, Any]:
        """Check and decode what arrived. Raises Unavailable when something is missing, StateNotPortable."""
        return {"actors": await self._arrivals.verify(request.move), "incarnation": self._host.incarnation}

    async def activate(self, request: StepRequest) -> dict[str, Any]:
        """The source has committed: take the unit over now instead of when the map's news arrives."""
        await self._directory.news(request.unit, beyond=request.epoch, timeout_s=NEWS_S)
        await self._host.opened(request.unit, timeout_s=ACTIVATE_S)
        return {"actors": len(self._host.units[request.unit].actors)}

    def forget_resolved(self) -> None:
        """Free what was prepared for moves that the map has ended meanwhile."""
        for name, outgoing in list(self._outgoing.items()):
            unit = self._host.units.get(name)
            if unit is None or unit.pause is None or unit.pause.move != outgoing.move:
                del self._outgoing[name]

    # -- shared ------------------------------------------------------------------------------------------------------
    def _paused(self, request: StepRequest) -> tuple[Unit, _Outgoing]:
        unit, outgoing = self._host.units.get(request.unit), self._outgoing.get(request.unit)
        if unit is None or outgoing is None or outgoing.move != request.move:
            raise NotApplicable(f"{request.unit} is not paused for {request.move} here")
        self._still_paused(unit, request)
        assert unit.pause is not None
        unit.pause.lease_until_s = self._clock() + self._settings.pause_lease_s
        return unit, outgoing

    def _still_paused(self, unit: Unit, request: StepRequest) -> None:
        if unit.pause is None or unit.pause.move != request.move or unit.pause.epoch != request.epoch:
            raise NotApplicable(f"{request.unit} is no longer paused for {request.move}: see the map")

    async def _ask_destination(self, request: StepRequest, verb: str, message: Any) -> dict[str, Any]:
        return await control.ask(
            self._link, self._subjects, request.destination, verb, message, timeout_s=self._settings.append_timeout_s
        )


class _Done(Exception):
    """The map says it has happened already."""


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """One error out of a group: the senders share a fate, so any of them says what went wrong."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def chunks_of(move: str, payloads: list[tuple[int, bytes]], chunk_bytes: int) -> Iterator[bytes]:
    """Cut payloads into messages of about `chunk_bytes`: small ones share a message, large ones take several."""
    pieces: list[tuple[int, int, int]] = []
    parts: list[bytes] = []
    filled = 0
    for index, payload in payloads:
        for offset in range(0, len(payload), chunk_bytes):
            part = payload[offset : offset + chunk_bytes]
            if filled + len(part) > chunk_bytes and pieces:
                yield join({"move": move, "pieces": pieces}, b"".join(parts))
                pieces, parts, filled = [], [], 0
            pieces.append((index, offset, len(part)))
            parts.append(part)
            filled += len(part)
    if pieces:
        yield join({"move": move, "pieces": pieces}, b"".join(parts))


def _page(rows: list[dict[str, Any]], offset: int) -> dict[str, Any]:
    """Rows from `offset` on, and where the next page begins (null: this was the last)."""
    end = offset + ROWS_PER_PAGE
    return {"rows": rows[offset:end], "next": end if end < len(rows) else None}
