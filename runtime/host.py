"""The live actors of a node: which units it holds, and what it does with every command that arrives."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable
from itertools import islice
from typing import Any, NamedTuple, Protocol, assert_never

import structlog

from routing import shard_map
from routing.address import ActorId
from routing.directory import Directory, MapEntry
from routing.envelope import MAX_HOPS, Answer, Command, encode_answer, encode_command
from routing.errors import (
    Busy,
    FerryError,
    HandlerFailed,
    InDoubt,
    Moved,
    NotApplicable,
    PayloadTooLarge,
    PermanentError,
    Timeout,
    TransientError,
    Unavailable,
)
from routing.link import Link
from routing.local import LATER
from routing.settings import Settings
from routing.shard_map import Ownership
from routing.subjects import Subjects, actor_key
from runtime import rules
from runtime.actor import query_at_once
from runtime.delivery import Delivery
from runtime.homecoming import Homecoming
from runtime.live_actor import LiveActor
from runtime.mailbox import Mailboxes
from runtime.rules import Verdict
from runtime.unit import Buffer, Pause, Unit, UnitState

log = structlog.get_logger("ferry.host")

_OPEN = UnitState.OPEN  # to look a member up on its class costs as much as to find an actor
OPEN_RETRY_S = 0.05
INVENTORY_ROWS = 2_000  # of a page: with the longest actor ids 900 kB, below NATS' default payload limit
REST_SHARE = 0.05  # of the passivation time lies between two looks for idle actors of a unit


class Inventory(NamedTuple):
    """A page of live actors, unit -> [[actor, bytes], ...], and where the next begins (None: this was the last)."""

    units: dict[str, list[list[Any]]]
    following: tuple[str, int] | None


class Arrivals(Protocol):
    """Actors staged by a move, to be taken over when the map hands their unit to this node."""

    def take(self, unit: str, move: str) -> list[LiveActor]: ...

    def forget_unless(self, unit: str, move: str | None) -> None: ...


class Host:
    """Holds units and their actors for one incarnation of one node.

    Everything it does about ownership follows from `rules.judge` on the map's value; nothing follows from a message.
    """

    def __init__(
        self, *, node_id: str, incarnation: str, link: Link, directory: Directory, subjects: Subjects,
        settings: Settings, mailboxes: Mailboxes, arrivals: Arrivals, spawn: Callable[[Coroutine[Any, Any, None]], Any],
        may_serve: Callable[[], bool], clock: Callable[[], float], wall_clock: Callable[[], float] = time.time,
        counters: Counter[str] | None = None,
    ) -> None:  # fmt: skip
        self._may_serve = may_serve
        self.node_id, self.incarnation = node_id, incarnation
        self.units: dict[str, Unit] = {}
        self.counters: Counter[str] = Counter() if counters is None else counters
        self._link, self._directory, self._subjects, self._settings = link, directory, subjects, settings
        self._unit_of = directory.unit_of
        self._mailboxes, self._arrivals, self._spawn = mailboxes, arrivals, spawn
        self._clock, self._wall_clock = clock, wall_clock
        self._outbox: deque[Coroutine[Any, Any, None]] = deque()
        self._sending = False
        self._homecoming = Homecoming(
            units=self.units, directory=directory, incarnation=incarnation, reopen=self._reopen, spawn=spawn,
            may_serve=may_serve, clock=clock, drain_handlers_s=settings.drain_handlers_s,
        )  # fmt: skip
        mailboxes.attach(self)
        directory.on_change(self._on_map)

    # -- a command arrives -------------------------------------------------------------------------------------------
    def deliver(self, delivery: Delivery) -> None:
        """Serve a command or queue it, let it wait at the gate, or send it on to the owner. Raises nothing.

        It may run the actor's handler.
        """
        name = self._unit_of(delivery.command.actor)
        unit = self.units.get(name)
        if unit is None:
            unit = self._unit_for(name, delivery.command)
            if unit is None:
                self._send_on(name, delivery)
                return
        try:
            if unit.state is _OPEN:
                self._mailboxes.put(unit, delivery)
            else:
                unit.buffer.add(delivery)
        except Busy as error:
            self.counters["refused_busy"] += 1
            self.answer(delivery, Answer(error=error, owner=self.node_id, epoch=unit.epoch))

    def _unit_for(self, name: str, command: Command) -> Unit | None:
        """A unit to wait in while it opens, when the map may give it to this node; None when it is another's."""
        owner, epoch = self._directory.owner_of(name)
        if epoch and owner != self.node_id and command.epoch <= epoch:
            return None
        return self._start_opening(name)  # the sender knows a newer map than this node: read it before deciding

    def serves(self, unit: str) -> bool:
        """Whether a command for `unit` goes to this host without a network hop."""
        return unit in self.units

    def query_at_once(self, actor: ActorId, name: str, arguments: dict[str, Any]) -> Any:
        """The reply of an actor at rest to a plain query; LATER when anything has to be waited for.

        It is what the mailbox would answer, without a task and a turn of the event loop for it. Raises what the actor
        answers instead of a reply. The caller sees to it that somebody still waits for it.
        """
        unit = self.units.get(self._unit_of(actor))
        if unit is None or unit.state is not _OPEN:
            return LATER
        live = unit.actors.get(actor)
        if live is None or live.running or live.inbox or live.dirty or live.unverified or live.epoch < unit.fence:
            return LATER  # not `at_rest`: asked here without a call, which is a twentieth of a local query
        assert live.instance is not None
        handler = live.instance.handlers.get(name)
        if handler is None or handler.at_once != "query" or not self._may_serve():
            return LATER
        if (arguments or handler.required) and not handler.fits(arguments):  # nearly none has any: not even asked
            return LATER
        live.idle_since_s = None
        try:
            return query_at_once(live.instance, handler, arguments)
        except Exception as error:
            refusal = live.failed(error, handler)
            raise refusal from (None if refusal is error else error)

    async def ask(self, command: Command) -> Answer:
        """Deliver a command of this very process and await its answer. The caller sets the deadline."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.deliver(Delivery(command, future=future))
        return await future

    def expired(self, command: Command) -> bool:
        return self._wall_clock() * 1000 > command.expires_ms

    # -- the map changes ---------------------------------------------------------------------------------------------
    def _on_map(self, name: str, entry: MapEntry) -> None:
        view = entry.ownership
        unit = self.units.get(name)
        verdict = rules.judge(
            view, node=self.node_id, incarnation=self.incarnation, held=unit.held if unit is not None else None,
            counts=self._directory.counts(name),
        )  # fmt: skip
        arrived = view.last.move if view.last is not None and view.owner == self.node_id else None
        self._arrivals.forget_unless(name, view.move or arrived)
        match verdict:
            case Verdict.NOT_MINE:
                if unit is not None:
                    self._drop(unit)
            case Verdict.BIND | Verdict.BOOT:
                if unit is not None and unit.state is not UnitState.OPENING:
                    self._begin_anew(unit, view)
                self._start_opening(name)
            case Verdict.OPEN:
                self._open(unit or self._start_opening(name), view)
            case Verdict.KEEP:
                assert unit is not None
                self._keep(unit, view)
            case Verdict.RESUME:
                assert unit is not None
                self._resume(unit, view)
            case Verdict.RELOAD:
                assert unit is not None
                self._reload(unit, view)
            case _:
                assert_never(verdict)
        if view.apart and (unit := self.units.get(name)) is not None:
            self._let_go(unit, (actor for actor, _ in view.apart))

    def _let_go(self, unit: Unit, apart: Iterable[str]) -> None:
        """Give actors of a shard that have a key of their own now to the units that they are.

        A handler that still runs sees it when it ends: what it stores after that is refused, or read by its successor.
        """
        for actor in apart:
            live = unit.actors.pop(ActorId.parse(actor), None)
            if live is None:
                continue
            own = self._start_opening(actor_key(live.actor_id))
            waiting, live.inbox = live.inbox or (), None
            idle = not live.running and not live.dirty
            if idle and live.instance is not None and live.actor_id not in own.actors:
                live.unverified = True  # it is compared with its log before its next use, as after a move
                own.actors[live.actor_id] = live
            for delivery in waiting:
                self.deliver(delivery)

    def _start_opening(self, name: str) -> Unit:
        unit = self.units.get(name)
        if unit is None:
            s = self._settings
            buffer = Buffer(s.buffer_messages, s.buffer_bytes, per_sender=s.buffer_messages_per_sender)
            unit = self.units[name] = Unit(name, buffer)
            self._spawn(self._opening(unit))
        return unit

    async def _opening(self, unit: Unit) -> None:
        """Read the map and write BIND or BOOT until the map has decided. Ends with the unit open or dropped."""
        while unit.state is UnitState.OPENING:
            if not self._may_serve():  # an earlier life that wakes up must not take units back from its successor
                await asyncio.sleep(OPEN_RETRY_S)
                continue
            try:
                entry = await self._directory.refresh(unit.name)
                if unit.state is not UnitState.OPENING:
                    return  # the refresh itself opened or dropped it
                counts = self._directory.counts(unit.name)
                if entry is None or not counts or entry.ownership.owner != self.node_id:
                    self._drop(unit)
                    return
                change = self._taking_over(entry.ownership)
                if change is None:
                    self._open(unit, entry.ownership)
                else:
                    await self._directory.transition(unit.name, entry, change)
            except (TransientError, InDoubt, NotApplicable) as error:
                log.warning("opening goes on", unit=unit.name, error=str(error))
                await asyncio.sleep(OPEN_RETRY_S)

    def _taking_over(self, view: Ownership) -> Ownership | None:
        """The value that makes this incarnation the serving one; None when it is already."""
        if view.incarnation is None:
            return shard_map.bind(view, node=self.node_id, incarnation=self.incarnation)
        if view.incarnation != self.incarnation:
            return shard_map.boot(view, node=self.node_id, incarnation=self.incarnation)
        return None

    def _open(self, unit: Unit, view: Ownership) -> None:
        unit.ownership, unit.fence, unit.state = view, max(unit.fence, view.fence), UnitState.OPEN
        unit.settled.set()
        unit.locked_since_s = self._clock() if view.move is not None else None
        if view.last is not None:
            for live in self._arrivals.take(unit.name, view.last.move):
                unit.actors.setdefault(live.actor_id, live)
        log.info("unit open", unit=unit.name, epoch=view.epoch, actors=len(unit.actors), waiting=len(unit.buffer))
        self._release(unit)

    def _keep(self, unit: Unit, view: Ownership) -> None:
        unit.ownership = view
        if unit.state is UnitState.RETIRING:  # its key has changed since: a RETIRE under way can no longer land
            self._reopen(unit)
        if view.move is None or unit.pause is not None:
            unit.locked_since_s = None
        elif unit.locked_since_s is None:
            unit.locked_since_s = self._clock()

    def _resume(self, unit: Unit, view: Ownership) -> None:
        log.info("unit resumes", unit=unit.name, epoch=view.epoch, waiting=len(unit.buffer))
        unit.ownership, unit.pause, unit.state = view, None, UnitState.OPEN
        unit.locked_since_s = self._clock() if view.move is not None else None  # the next move's, seen with this abort
        self._release(unit)

    def _reopen(self, unit: Unit) -> None:
        unit.state = UnitState.OPEN
        self._release(unit)

    def _reload(self, unit: Unit, view: Ownership) -> None:
        self._open(self._begin_anew(unit, view), view)

    def _begin_anew(self, held: Unit, view: Ownership) -> Unit:
        """Forget what is held of a unit that is ours, but may have had another owner in between; keep what waits.

        Its actors are claimed at their next use. Handlers that still run see the old unit dropped, and hand their
        command to the new one.
        """
        log.warning("unit may have had another owner in between: begun anew", unit=held.name, epoch=view.epoch)
        waiting = held.take_waiting()
        held.drop()
        del self.units[held.name]
        unit = self._start_opening(held.name)
        unit.fence, unit.before = view.epoch, held if held.running else held.before
        unit.buffer.put_first(waiting)
        return unit

    def _release(self, unit: Unit) -> None:
        """Hand what waited to the mailboxes, oldest first."""
        for delivery in unit.take_waiting():
            self.deliver(delivery)

    def _drop(self, unit: Unit) -> None:
        """Forget the unit and send everything that waits in it to its owner, in order."""
        waiting = unit.take_waiting()
        unit.drop()
        del self.units[unit.name]
        log.info("unit dropped", unit=unit.name, epoch=unit.epoch, forwarded=len(waiting))
        counts = self._directory.counts(unit.name)
        for delivery in waiting:
            if counts:
                self._send_on(unit.name, delivery)
            else:
                self.deliver(delivery)  # its shard's again

    async def opened(self, name: str, *, timeout_s: float) -> None:
        """Wait until the unit is open here. Raises Timeout, or NotApplicable when the map gives it to another node."""
        unit = self.units.get(name)
        try:
            async with asyncio.timeout(timeout_s):
                while unit is not None and unit.state is UnitState.OPENING:
                    await unit.settled.wait()
        except TimeoutError as error:
            raise Timeout(f"{name} is not open here after {timeout_s:g} s") from error
        if unit is None or unit.state is UnitState.DROPPED:
            raise NotApplicable(f"{name} is not this node's")

    # -- the gate, for handover --------------------------------------------------------------------------------------
    async def close_gate(self, unit: Unit, move: str) -> None:
        """Stop the unit's actors between two commands and keep what arrives. Idempotent per move.

        Raises Busy when handlers still run after their time, with the gate left closed; NotApplicable when the unit
        is not held, or is paused for another move.
        """
        if unit.state is UnitState.OPEN:
            now_s = self._clock()
            lease_s = now_s + self._settings.pause_lease_s
            unit.pause = Pause(move=move, epoch=unit.epoch, began_s=now_s, lease_until_s=lease_s)
            unit.state, unit.locked_since_s = UnitState.PAUSED, None
        if unit.pause is None or unit.pause.move != move:
            raise NotApplicable(f"{unit.name} is {unit.state} here, not paused for {move}")
        await unit.quiet(self._settings.drain_handlers_s)
        if unit.pause is not None and unit.pause.move == move:
            unit.buffer.put_first(unit.take_queued())

    # -- sending -----------------------------------------------------------------------------------------------------
    def answer(self, delivery: Delivery, answer: Answer) -> None:
        if delivery.future is not None:
            delivery.answer_here(answer)
        elif delivery.reply:
            self.tell(delivery.reply, delivery.command, answer)

    def tell(self, reply: str, command: Command, answer: Answer) -> None:
        """Send the answer to a command to whoever waits for it elsewhere."""
        try:
            try:
                payload = encode_answer(answer)
            except TypeError:
                problem = f"{command.name!r} of {command.actor} answered with a value that is not JSON-like"
                payload = encode_answer(Answer(error=HandlerFailed(problem), owner=answer.owner, epoch=answer.epoch))
            try:
                self._link.answer(reply, payload)
            except PayloadTooLarge as error:  # a query's: what a command answers is in its log, and smaller than that
                problem = f"the answer of {command.name!r} of {command.actor} is too large: {error}"
                payload = encode_answer(Answer(error=PayloadTooLarge(problem), owner=answer.owner, epoch=answer.epoch))
                self._link.answer(reply, payload)
        except Unavailable:
            self._post(self._link.publish(reply, payload))  # which waits for a server that has much to take
        except FerryError as error:
            self._unsent(error)

    def send_on(self, delivery: Delivery) -> None:
        """Give a delivery that this node can no longer serve to whoever can."""
        self.deliver(delivery)

    def _send_on(self, name: str, delivery: Delivery) -> None:
        command = delivery.command
        if self.expired(command):
            self.counters["expired"] += 1
            return
        owner, epoch = self._directory.owner_of(name)
        if owner in (None, self.node_id) or delivery.future is not None or command.hops >= MAX_HOPS:
            moved = Moved(f"{name} is at {owner or 'no node'} (epoch {epoch})", owner=owner, epoch=epoch)
            self.answer(delivery, Answer(error=moved, owner=owner, epoch=epoch))
            return
        self.counters["forwarded"] += 1
        payload = encode_command(command.forwarded(epoch))
        self._post(self._link.publish(self._subjects.command(str(owner), self.node_id), payload, reply=delivery.reply))

    def _post(self, sending: Coroutine[Any, Any, None]) -> None:
        """Send in the order of the calls: a forwarded buffer must not be overtaken by the stragglers behind it."""
        self._outbox.append(sending)
        if not self._sending:
            self._sending = True
            self._spawn(self._send_outbox())

    async def _send_outbox(self) -> None:
        try:
            while self._outbox:
                try:
                    await self._outbox.popleft()
                except (Unavailable, Timeout, PermanentError) as error:
                    self._unsent(error)
        finally:
            self._sending = False

    def _unsent(self, error: FerryError) -> None:
        """Whoever waits asks again under the same message id."""
        self.counters["unsent"] += 1
        log.warning("not sent", error=str(error))

    # -- the map, for others -----------------------------------------------------------------------------------------
    async def refresh(self, unit: str) -> None:
        """Read the unit's map key from the leader and act on it. Raises Timeout, Unavailable."""
        await self._directory.refresh(unit)

    async def abort(self, unit: str, move: str) -> None:
        """Write ABORT for a move that nobody drives on. Losing to its COMMIT, or to another ABORT, is fine."""
        try:
            await self._directory.decide(unit, lambda view: shard_map.abort(view, move=move))
            log.warning("move aborted by its source", unit=unit, move=move)
        except NotApplicable:
            await self._directory.refresh(unit)

    # -- time passes -------------------------------------------------------------------------------------------------
    async def tick(self) -> None:
        """Abort moves that have been left alone, and put idle actors to rest. Called a few times a second."""
        now_s = self._clock()
        for unit in list(self.units.values()):
            left_alone = rules.overdue(
                now_s=now_s, lease_s=self._settings.pause_lease_s, paused=unit.paused_until, locked=unit.locked_since
            )
            try:
                if left_alone is not None:
                    await self.abort(unit.name, left_alone)
            except FerryError as error:
                log.warning("abort not written yet", unit=unit.name, error=str(error))
            if unit.state is UnitState.OPEN and now_s >= unit.rest_at_s:
                # Not all at one tick: to look at a hundred thousand actors takes tens of milliseconds.
                unit.rest_at_s = now_s + REST_SHARE * self._settings.passivate_after_s * _spread(unit.name)
                self._passivate(unit, now_s)
            for text, _ in unit.ownership.apart if unit.ownership is not None else ():
                await self._homecoming.bring_back(unit, ActorId.parse(text))

    def _passivate(self, unit: Unit, now_s: float) -> None:
        """Put to rest whoever has been found idle for long enough; that is seen up to two looks too late."""
        rested = []
        for live in unit.actors.values():
            if live.running or live.inbox:
                live.idle_since_s = None
            elif live.idle_since_s is None:
                live.idle_since_s = now_s
            elif now_s - live.idle_since_s > self._settings.passivate_after_s:
                rested.append(live.actor_id)
        for actor_id in rested:
            del unit.actors[actor_id]
        self.counters["passivated"] += len(rested)

    def inventory(self, after: str = "", skip: int = 0, *, rows_most: int = INVENTORY_ROWS) -> Inventory:
        """A page of live actors with about the bytes of their state, in the order of their units' names.

        It begins behind unit `after`, without the first `skip` actors of the unit that follows: what the page before
        ended with. Actors come and go between two pages, so all pages together are an estimate.
        """
        page: dict[str, list[list[Any]]] = {}
        rows = 0
        for unit in sorted((unit for unit in self.units.values() if unit.name > after), key=lambda unit: unit.name):
            actors = list(islice(unit.actors.values(), skip, skip + rows_most - rows))
            if actors:
                page[unit.name] = [[str(live.actor_id), live.state_bytes] for live in actors]
                rows += len(actors)
            if rows >= rows_most:
                return Inventory(page, (after, skip + len(actors)))
            after, skip = unit.name, 0
        return Inventory(page, None)

    def actors_total(self) -> int:
        """How many actors are live here."""
        return sum(len(unit.actors) for unit in self.units.values())


def _spread(name: str) -> float:
    """A number from 0.5 to 1 that differs between units and not between runs."""
    return 0.5 + zlib.crc32(name.encode()) % 64 / 128
