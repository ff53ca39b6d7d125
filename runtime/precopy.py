"""States travel before the gate is closed: while the unit is locked for its move, and its actors go on.

A state is captured between two commands of its actor, at a version of its log, and staged at the destination. When the
gate is closed, nothing more is said of an actor that has not changed since; of one that has, the destination replays
the log from the version that it holds. So what is copied ahead is never wrong, only old.

How fast it goes is bounded (FERRY_PRECOPY_BYTES_PER_S): nobody waits for it, and others need the same network.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from routing.control import ManifestRow, StepRequest
from routing.errors import Busy, NotApplicable, PayloadTooLarge, StateNotPortable
from routing.settings import Settings
from runtime.chunks import ChunkSender
from runtime.live_actor import SMALL_BYTES, LiveActor
from runtime.mailbox import Mailboxes
from runtime.outgoing import Leaving, Outgoing, Vouched
from runtime.throttle import TokenBucket
from runtime.turn import Turn
from runtime.unit import Unit, UnitState

log = structlog.get_logger("ferry.precopy")


class Precopy:
    """Copies the states of units that are about to be paused, where that takes long."""

    def __init__(
        self, *, mailboxes: Mailboxes, sender: ChunkSender, settings: Settings, clock: Callable[[], float],
        announce: Callable[[StepRequest, list[ManifestRow]], Awaitable[list[int]]],
        verify: Callable[[StepRequest], Awaitable[str]], check_room: Callable[[Outgoing, int], None],
    ) -> None:  # fmt: skip
        self._mailboxes, self._sender, self._settings, self._clock = mailboxes, sender, settings, clock
        self._announce, self._verify, self._check_room = announce, verify, check_room
        self._turn = Turn(clock)  # of all units together: nobody waits for them
        self._throttle = TokenBucket(settings.precopy_bytes_per_s, 4 * settings.chunk_bytes, clock=clock)

    def candidates(self, unit: Unit) -> list[LiveActor]:
        """Whose state is to be copied ahead: those that are large enough, or may be.

        May be: one that was never encoded, or once was not small.
        """
        least_bytes = min(self._settings.precopy_from_bytes, SMALL_BYTES)
        return [
            live for live in unit.actors.values()
            if (live.state_bytes == 0 or live.state_bytes >= least_bytes) and live.instance is not None
        ]  # fmt: skip

    async def run(self, unit: Unit, request: StepRequest, outgoing: Outgoing) -> None:
        """Copy what takes long, and have the destination decode it.

        Raises NotApplicable when the move has ended, and what the destination raises.
        """

        def goes_on() -> None:
            view = unit.ownership
            if unit.state is not UnitState.OPEN or view is None or view.move != request.move:
                raise NotApplicable(f"{request.unit} is no longer locked for {request.move}: see the map")
            if unit.locked_since_s is not None:
                unit.locked_since_s = self._clock()  # the lock is followed by work: nobody has left it alone

        for live in self.candidates(unit):
            leaving = await self._prepared(live, outgoing)
            if self._turn.over():
                await self._turn.next()
            goes_on()
            if leaving is not None:
                outgoing.precopied[live.actor_id] = leaving
                outgoing.held_bytes += leaving.held_bytes
        if not outgoing.precopied:
            return
        copied = list(outgoing.precopied.values())
        rows = [one.row(index) for index, one in enumerate(copied)]
        lacking = await self._announce(request, rows)
        payloads = [(index, copied[index].payload or b"") for index in lacking]
        await self._sender.send(request.destination, request.move, payloads, on_ack=goes_on, throttle=self._throttle)
        incarnation = await self._verify(request)
        outgoing.vouched = Vouched(incarnation, {row.index: row for row in rows}, self._clock())
        goes_on()

    async def _prepared(self, live: LiveActor, outgoing: Outgoing) -> Leaving | None:
        """A state as it travels; None for one that is too small, or does not travel: the capture will say why."""
        try:
            leaving = await self._capture(live)
            if leaving is not None:
                self._check_room(outgoing, leaving.state_bytes)
                await leaving.encode(self._settings.max_state_bytes)
            return leaving
        except (StateNotPortable, PayloadTooLarge, Busy) as error:
            log.warning("not copied ahead", actor=str(live.actor_id), error=str(error))
            return None

    async def _capture(self, live: LiveActor) -> Leaving | None:
        """The state between two commands; None when it is smaller, or not what the log says at the moment."""

        def capture() -> Leaving | None:
            if live.dirty or live.instance is None:
                return None  # not compared with the log yet is fine: the destination will
            leaving = Leaving.of(live)
            return leaving if leaving.state_bytes >= self._settings.precopy_from_bytes else None

        if not live.running:
            return capture()
        try:
            async with asyncio.timeout(self._settings.drain_handlers_s):
                return await self._mailboxes.between_commands(live, capture)
        except TimeoutError:
            return None  # a handler that does not end is the business of the pause
