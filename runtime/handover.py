"""The source's side of a move: the verbs a worker asks for. The destination's side is runtime/reception.py.

    source        pause -> capture -> serialize -> send -> await_ack -> commit       or resume, at any point
    destination                       stage, chunks ----> verify -----> activate

`prepare` is capture to await_ack in one go. `precopy`, which `pause` includes, stages and verifies states before the
gate is closed (runtime/precopy.py): `stage_ahead`, chunks, `verify_ahead`.

Every verb is idempotent under the move id, and acts only while this source is paused for that move. A source that is
not (any more) raises NotApplicable: the map has moved on, and the worker reads there how.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from routing import control, shard_map
from routing.control import ROWS_PER_PAGE, ManifestRow, Staged, StepRequest, Verified
from routing.directory import Directory
from routing.errors import (
    Busy,
    FerryError,
    InvalidInput,
    NotApplicable,
    PayloadTooLarge,
    StateNotPortable,
    Timeout,
    Unavailable,
    UnknownActorType,
    to_wire,
)
from routing.failpoints import Failpoints
from routing.link import Link
from routing.settings import Settings
from routing.shard_map import Outcome, Ownership
from routing.subjects import Subjects
from routing.typed import taken_as
from runtime import rules
from runtime.catch_up import CatchUp
from runtime.chunks import ChunkSender
from runtime.errand import Errand
from runtime.host import Host
from runtime.live_actor import LiveActor
from runtime.mailbox import Mailboxes
from runtime.outgoing import Leaving, Outgoing, manifest_pages
from runtime.precopy import Precopy
from runtime.turn import Turn
from runtime.unit import Unit, UnitState

log = structlog.get_logger("ferry.handover")

COMMITS_REMEMBERED = 1_000  # a `delete` that runs twice gets the first one's answer
PATIENCE = 0.5  # of the asker's deadline: a verb answers "pending" after that instead of letting it pass
FEW = 8  # actors: to prepare a move of so many takes about a millisecond, and Celery's first hand-over three
AT_ONCE_S = 0.005
WORD_S = 1.0  # a destination that has verified everything may be dead by then: it is asked once more
ACTIVATE_S = 2.0  # how long a committed source waits for the destination; it activates from the map in any case


class Handover:
    """Moves units out of a host, one verb at a time."""

    def __init__(
        self, *, host: Host, mailboxes: Mailboxes, catch_up: CatchUp, link: Link, transfer_link: Link,
        directory: Directory, subjects: Subjects, settings: Settings, clock: Callable[[], float],
        failpoints: Failpoints, spawn: Callable[[Coroutine[Any, Any, None]], Any],
    ) -> None:  # fmt: skip
        self._host, self._catch_up = host, catch_up
        self._link, self._spawn = link, spawn
        self._directory, self._subjects, self._settings, self._clock = directory, subjects, settings, clock
        self._failpoints = failpoints
        self._patience_s = PATIENCE * settings.step_timeout_s
        self._sender = ChunkSender(transfer_link, subjects, settings)
        self._precopy = Precopy(
            mailboxes=mailboxes, sender=self._sender, settings=settings, clock=clock, announce=self._announce_ahead,
            verify=self._verify_precopied, check_room=self._check_room,
        )  # fmt: skip
        self._outgoing: dict[str, Outgoing] = {}  # unit -> the move it is locked or paused for
        self._committed: OrderedDict[str, dict[str, Any]] = OrderedDict()

    # -- source ------------------------------------------------------------------------------------------------------
    async def pause(self, request: StepRequest) -> dict[str, Any]:
        """Close the gate of the whole unit and let what runs finish. Answers `{"actors", "waiting", "ago_s"}`.

        The whole unit, not only its live actors: otherwise a message would activate one in the middle of the move.
        Asked `ahead`, a unit of few actors is prepared as well, and `"prepared"` is what `prepare` answers.
        States are copied before; while that goes on the answer has `"pending": true` and the gate is open.
        """
        unit = await self._locked(request)
        outgoing = self._begun(request)
        if self._is_to_be_copied(unit, outgoing):
            if not await self._precopied(unit, request, outgoing):
                return {"actors": len(unit.actors), "waiting": 0, "pending": True}
            unit = await self._locked(request)  # that took a while
        await self._host.close_gate(unit, request.move)
        answer: dict[str, Any] = {"actors": len(unit.actors), "waiting": len(unit.buffer)}
        if outgoing.closed_s is None:  # else the answer to the pause was lost
            outgoing.closed_s = self._clock()
        if request.ahead and len(unit.actors) <= FEW:
            answer["prepared"] = await self._prepared(request, within_s=AT_ONCE_S)
        return {**answer, "ago_s": self._clock() - outgoing.closed_s}

    async def precopy(self, request: StepRequest) -> dict[str, Any]:
        """Copy ahead what would take long with the gate closed. `"pending": true`: it goes on, ask again.

        Small moves that share a chain are all copied before the first of them is paused.
        """
        unit = await self._locked(request)
        outgoing = self._begun(request)
        if not self._is_to_be_copied(unit, outgoing) or await self._precopied(unit, request, outgoing):
            return {}
        return {"pending": True}

    def _begun(self, request: StepRequest) -> Outgoing:
        """What is kept of this move; what was kept of an earlier one of the unit ends."""
        outgoing = self._outgoing.get(request.unit)
        if outgoing is None or outgoing.move != request.move:
            if outgoing is not None:
                outgoing.cancel()
            outgoing = self._outgoing[request.unit] = Outgoing(request.move)
        return outgoing

    def _is_to_be_copied(self, unit: Unit, outgoing: Outgoing) -> bool:
        return unit.state is UnitState.OPEN and not outgoing.precopy_over and bool(self._precopy.candidates(unit))

    async def _locked(self, request: StepRequest) -> Unit:
        """The unit as held here, locked for this move by the map. Raises NotApplicable, Unavailable.

        As the map is known here, most often: an ABORT that is on its way opens the gate again when it arrives.
        """

        def is_locked(view: Ownership) -> bool:
            node, incarnation = self._host.node_id, self._host.incarnation
            return rules.applies(view, move=request.move, epoch=request.epoch, node=node, incarnation=incarnation)

        if not await self._directory.holds(request.unit, is_locked):
            raise NotApplicable(f"{request.unit} is not locked for {request.move} at epoch {request.epoch} here")
        unit = self._host.units.get(request.unit)
        if unit is None or unit.state is UnitState.OPENING:
            raise Unavailable(f"{request.unit} is just being opened here: try again")
        return unit

    async def _precopied(self, unit: Unit, request: StepRequest, outgoing: Outgoing) -> bool:
        """Whether copying ahead is over, after waiting for it a little: handlers get their time to finish after that.

        It may have failed: then the steps that follow do without, and tell what is wrong.
        """
        patience_s = PATIENCE * (self._settings.step_timeout_s - self._settings.drain_handlers_s)
        if unit.locked_since_s is not None:
            unit.locked_since_s = self._clock()
        if outgoing.precopy is None:
            outgoing.precopy = Errand(self._spawn, self._precopy.run(unit, request, outgoing))
        try:
            outgoing.precopy_over = await outgoing.precopy.ends_within(patience_s)
        except FerryError as error:
            log.warning("not copied ahead", move=request.move, error=str(error))
            self._host.counters["precopies_failed"] += 1
            outgoing.precopy_over = True
        return outgoing.precopy_over

    async def prepare(self, request: StepRequest) -> dict[str, Any]:
        """Take the steps up to COMMIT in one go, as far as half a step's time lasts.

        Answers `{verb: {"ok": its answer, "ago_s": seconds since then}}`, and at the end `{verb: {"error": ...}}` when
        one was refused. What takes long is left out: whoever asks for that verb then waits.
        """
        return await self._prepared(request, within_s=self._patience_s)

    async def _prepared(self, request: StepRequest, *, within_s: float) -> dict[str, Any]:
        _, outgoing = self._paused(request)
        if outgoing.ahead is None:
            outgoing.prepared.clear()
            outgoing.ahead = Errand(self._spawn, self._go_ahead(request, outgoing))
        ahead = outgoing.ahead
        await ahead.ends_within(within_s)
        now_s = self._clock()
        prepared = {verb: {**answer, "ago_s": now_s - taken_s} for verb, (answer, taken_s) in outgoing.prepared.items()}
        if outgoing.ahead is ahead and any("error" in answer for answer in prepared.values()):
            outgoing.ahead = None  # the refusal is told now: asked again, it tries again
        return prepared

    async def _go_ahead(self, request: StepRequest, outgoing: Outgoing) -> None:
        for verb in ("capture", "serialize", "send", "await_ack"):
            try:
                self._failpoints.hit(verb)
                answer = await getattr(self, verb)(request)
            except FerryError as error:
                log.info("not prepared any further", verb=verb, move=request.move, error=str(error))
                outgoing.prepared[verb] = {"error": to_wire(error)}, self._clock()
                return
            if answer.get("pending"):
                return
            outgoing.prepared[verb] = {"ok": answer}, self._clock()

    async def capture(self, request: StepRequest) -> dict[str, Any]:
        """Take the state of every live actor at the last sequence of its log. Answers a page of rows.

        Raises StateNotPortable naming the actor whose state cannot be encoded.
        """
        unit, outgoing = self._paused(request)
        async with outgoing.preparing:
            if outgoing.leaving is None:
                outgoing.leaving = await self._capture_all(unit, request, outgoing)
        rows = [
            {"index": index, "actor_id": str(one.actor_id), "version": one.version, "digest": one.digest}
            for index, one in enumerate(outgoing.leaving)
        ]
        return _page(rows, request.offset)

    async def _capture_all(self, unit: Unit, request: StepRequest, outgoing: Outgoing) -> list[Leaving]:
        """What was copied before keeps its place and its bytes; everything else is captured now."""

        def still_alone() -> None:
            self._still_paused(unit, request)

        await unit.quiet(self._settings.drain_handlers_s)
        still_alone()
        leaving, turn = list(outgoing.precopied.values()), Turn(self._clock)
        for live in list(unit.actors.values()):
            if live.instance is None:
                continue  # its first message came with the gate: the log has all there is of it
            if (live.dirty or not live.unverified) and not await self._made_current(unit, live, still_alone):
                continue
            # else it came by a move and nobody has used it since: it goes on as it came, and is compared with its log
            # before its first use there as it would have been here. Reading a thousand logs now would be half a second.
            known = outgoing.precopied.get(live.actor_id)
            if known is not None:
                known.version = live.version
                continue
            leaving.append(Leaving.of(live))
            outgoing.held_bytes += leaving[-1].held_bytes
            self._check_room(outgoing)
            await leaving[-1].take_digest()
            if turn.over():
                await turn.next()
                still_alone()
        return leaving

    async def _made_current(self, unit: Unit, live: LiveActor, still_alone: Callable[[], None]) -> bool:
        """False for an actor that is nothing but its log, which this node cannot read: it must not keep the others."""
        dirty = live.dirty
        try:
            await self._catch_up.make_current(unit, live, still_alone)
        except (StateNotPortable, PayloadTooLarge, UnknownActorType) as error:
            if not dirty:
                raise
            log.warning("left to its log", actor=str(live.actor_id), error=str(error))
            return False
        return True

    async def serialize(self, request: StepRequest) -> dict[str, Any]:
        """Turn captured state into bytes. Answers a page of rows with sizes. Raises PayloadTooLarge."""
        _, outgoing = self._paused(request)
        async with outgoing.preparing:
            if outgoing.leaving is None:
                raise NotApplicable(f"move {request.move} is not captured yet")
            if outgoing.rows is None:
                rows, turn = [], Turn(self._clock)
                for index, one in enumerate(outgoing.leaving):
                    outgoing.held_bytes += await one.encode(self._settings.max_state_bytes)
                    rows.append(one.row(index))
                    if turn.over():  # let commands of other shards run
                        await turn.next()
                outgoing.rows = rows
        answered = [
            {
                "index": row.index, "actor_id": row.actor_id, "version": row.version, "digest": row.digest,
                "state_bytes": row.state_bytes,
            }
            for row in outgoing.rows
        ]  # fmt: skip
        return _page(answered, request.offset)

    async def send(self, request: StepRequest) -> dict[str, Any]:
        """Announce the actors to the destination, then send what it lacks. Answers `{"sent_bytes"}`.

        A long transfer goes on after the answer, which then has `"pending": true`: ask again. Raises what the
        destination raised: UnknownActorType, PayloadTooLarge; Unavailable, Timeout when it is away.
        """
        unit, outgoing = self._paused(request)
        if outgoing.rows is None:
            raise NotApplicable(f"move {request.move} is not serialized yet")
        if outgoing.sending is None or outgoing.sending.told:
            outgoing.sending = Errand(self._spawn, self._send_all(unit, request, outgoing))
        if not await outgoing.sending.ends_within(self._patience_s):
            return {"sent_bytes": outgoing.sent_bytes, "pending": True}
        return {"sent_bytes": outgoing.sent_bytes}

    async def _send_all(self, unit: Unit, request: StepRequest, outgoing: Outgoing) -> None:
        """What the destination does not hold yet. The pause lease runs anew with every acknowledged chunk.

        Nothing is said of what it has verified a moment ago. Should it have lost that since, its count tells, or, when
        there is nothing to say, it reads the log once it owns the unit.
        """

        def acknowledged() -> None:
            self._extend_pause(unit, request)

        news, vouched, lacking = outgoing.news(), outgoing.vouched, list[int]()
        if not news and vouched is not None and self._clock() - vouched.at_s < WORD_S:
            outgoing.word = vouched.incarnation
        else:
            lacking, outgoing.word = await self._announce(request, news, of=len(outgoing.rows or ()))
        payloads = [(index, outgoing.payload(index)) for index in lacking]
        await self._sender.send(request.destination, request.move, payloads, on_ack=acknowledged)
        outgoing.sent_bytes, outgoing.sent = sum(len(payload) for _, payload in payloads), True

    async def await_ack(self, request: StepRequest) -> dict[str, Any]:
        """Have the destination verify and decode everything, and keep its word. Answers `{"actors"}`.

        An acknowledgement means staged, verified and decodable by the destination's code, not merely received. The
        answer has `"pending": true` while that goes on: ask again.
        """
        unit, outgoing = self._paused(request)
        if not outgoing.sent:
            raise NotApplicable(f"move {request.move} is not sent yet")
        if outgoing.word is not None:
            outgoing.heir, outgoing.word = outgoing.word, None
            return {"actors": len(outgoing.rows or ())}
        if outgoing.acknowledging is None or outgoing.acknowledging.told:
            outgoing.acknowledging = Errand(self._spawn, self._acknowledge(unit, request, outgoing))
        if not await outgoing.acknowledging.ends_within(self._patience_s):
            return {"actors": 0, "pending": True}
        return {"actors": len(outgoing.rows or ())}

    async def _acknowledge(self, unit: Unit, request: StepRequest, outgoing: Outgoing) -> None:
        expected = len(outgoing.rows or ())
        held, heir = await self._verified(unit, request)
        if held != expected:
            outgoing.vouched = None  # the destination was restarted, say: it gets what it lacks
            await self._send_all(unit, request, outgoing)
            held, heir = await self._verified(unit, request)
            if held != expected:
                raise Unavailable(f"{request.destination} holds {held} of {expected} actors after sending twice")
        outgoing.heir = heir

    async def _verified(self, unit: Unit, request: StepRequest) -> tuple[int, str]:
        """How many actors the destination holds ready, and its incarnation; -1 when it lacks some, or all."""
        try:
            answer = await self._ask_destination(request, "verify", request)
            while answer.get("pending"):
                self._extend_pause(unit, request)
                answer = await self._ask_destination(request, "verify", request)
        except Unavailable as error:
            log.info("destination lacks something", move=request.move, error=str(error))
            return -1, ""
        verified = taken_as(Verified, answer, f"answer of {request.destination}")
        return verified.actors, verified.incarnation

    async def _announce_ahead(self, request: StepRequest, rows: list[ManifestRow]) -> list[int]:
        lacking, _ = await self._announce(request, rows, of=len(rows), ahead=True)
        return lacking

    async def _verify_precopied(self, request: StepRequest) -> str:
        """Have the destination decode ahead what was copied ahead: that takes no less time than sending it.

        Returns its incarnation.
        """
        while (answer := await self._ask_destination(request, "verify_ahead", request)).get("pending"):
            pass
        return taken_as(Verified, answer, f"answer of {request.destination}").incarnation

    async def _announce(
        self, request: StepRequest, rows: list[ManifestRow], *, of: int, ahead: bool = False
    ) -> tuple[list[int], str | None]:
        """Tell the destination what is coming, and unless it comes `ahead` of the pause, ask for its word as well.

        Returns the indexes of the rows that it lacks, and, when it lacks none and has verified all the actors `of` this
        move already, its incarnation.
        """
        lacking: list[int] = []
        word = None
        for page in manifest_pages(request, rows, verify=not ahead):
            answer = await self._ask_destination(request, "stage_ahead" if ahead else "stage", page)
            staged = taken_as(Staged, answer, f"answer of {request.destination}")
            lacking += staged.lacking
            if staged.actors == of:
                word = staged.incarnation
        if not {row.index for row in rows}.issuperset(lacking):
            raise InvalidInput(f"{request.destination} lacks actors that were never announced: upgrade it")
        return lacking, word if not lacking else None

    def _check_room(self, outgoing: Outgoing, more_bytes: int = 0) -> None:
        """Raises PayloadTooLarge when a move alone exceeds what may be held on its way, Busy when all together do."""
        limit = self._settings.transfer_held_bytes
        if outgoing.held_bytes + more_bytes > limit:
            raise PayloadTooLarge(
                f"states of move {outgoing.move} exceed the {limit} bytes that a node holds of states on their way"
                " (FERRY_TRANSFER_HELD_BYTES)"
            )
        if sum(one.held_bytes for one in self._outgoing.values()) + more_bytes > limit:
            raise Busy("too many bytes are on their way from this node: try again", retry_after_s=0.5)

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
        dropped = list(unit.actors.values())  # giving their memory back takes a while: not while everybody waits
        activating = Errand(self._spawn, self._activated(request))  # begun now, it waits there for the map's news
        try:
            await self._write_commit(request, outgoing.heir)
        except BaseException:
            activating.cancel()
            raise
        self._failpoints.hit("committed")
        answer: dict[str, Any] = {"blackout_ms": None, "waiting": waiting}
        try:
            try:
                if not await activating.ends_within(ACTIVATE_S):
                    raise Timeout(f"{request.destination} does not answer within {ACTIVATE_S:g} s")
            except NotApplicable:  # the news was late, or was looked for too early
                await self._activated(request)
            answer["blackout_ms"] = round((self._clock() - began_s) * 1000, 3)
        except FerryError as error:
            log.warning("destination has not answered; it activates from the map", move=request.move, error=str(error))
        dropped.clear()
        if self._outgoing.get(request.unit) is outgoing:  # else the unit has come back, and is leaving once more
            del self._outgoing[request.unit]
        self._committed[request.move] = answer
        while len(self._committed) > COMMITS_REMEMBERED:
            self._committed.popitem(last=False)
        return answer

    async def _activated(self, request: StepRequest) -> None:
        await self._ask_destination(request, "activate", request)

    async def _write_commit(self, request: StepRequest, heir: str) -> None:
        """Write COMMIT, once. A write of unknown fate leaves the gate closed and is settled by reading again."""

        def change(view: Ownership) -> Ownership:
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

    def forget_resolved(self) -> None:
        """Free what was prepared for moves that the map has ended meanwhile."""
        for name, outgoing in list(self._outgoing.items()):
            unit = self._host.units.get(name)
            if unit is None or outgoing.move != _move_of(unit):
                outgoing.cancel()
                del self._outgoing[name]

    # -- shared ------------------------------------------------------------------------------------------------------
    def _paused(self, request: StepRequest) -> tuple[Unit, Outgoing]:
        unit, outgoing = self._host.units.get(request.unit), self._outgoing.get(request.unit)
        if unit is None or outgoing is None or outgoing.move != request.move:
            raise NotApplicable(f"{request.unit} is not paused for {request.move} here")
        self._extend_pause(unit, request)
        return unit, outgoing

    def _extend_pause(self, unit: Unit, request: StepRequest) -> None:
        """The move is driven on: its pause lease runs anew. Raises NotApplicable when the pause is over."""
        self._still_paused(unit, request)
        assert unit.pause is not None
        unit.pause.lease_until_s = self._clock() + self._settings.pause_lease_s

    def _still_paused(self, unit: Unit, request: StepRequest) -> None:
        if unit.pause is None or unit.pause.move != request.move or unit.pause.epoch != request.epoch:
            raise NotApplicable(f"{request.unit} is no longer paused for {request.move}: see the map")

    async def _ask_destination(self, request: StepRequest, verb: str, message: Any) -> dict[str, Any]:
        return await control.ask(
            self._link, self._subjects, request.destination, verb, message, timeout_s=self._settings.append_timeout_s
        )


class _Done(Exception):
    """The map says it has happened already."""


def _move_of(unit: Unit) -> str | None:
    """The move that a unit is paused for, or locked for."""
    if unit.pause is not None:
        return unit.pause.move
    return unit.ownership.move if unit.ownership is not None else None


def _page(rows: list[dict[str, Any]], offset: int) -> dict[str, Any]:
    """Rows from `offset` on, and where the next page begins (null: this was the last)."""
    end = offset + ROWS_PER_PAGE
    return {"rows": rows[offset:end], "next": end if end < len(rows) else None}
