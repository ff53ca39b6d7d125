"""The inboxes of live actors: one command at a time per actor, each decided, appended, applied, answered."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, assert_never

import structlog

from routing.envelope import Answer, Command
from routing.errors import (
    Busy,
    FerryError,
    InDoubt,
    InvalidInput,
    NotApplicable,
    OutOfOrder,
    PayloadTooLarge,
    PermanentError,
    SessionExpired,
    Timeout,
    Unavailable,
    WrongSequence,
    from_wire,
    to_wire,
)
from routing.local import LATER
from routing.session_id import opened_at
from routing.settings import Settings
from runtime import rules
from runtime.actor import ActorClasses, Handler, query_at_once
from runtime.catch_up import CatchUp, Fenced
from runtime.delivery import Delivery
from runtime.journal import Journal, Kind, Record
from runtime.live_actor import LiveActor
from runtime.rules import Admission
from runtime.snapshots import Snapshots
from runtime.unit import Unit, UnitState

if TYPE_CHECKING:
    from runtime.host import Host

log = structlog.get_logger("ferry.mailbox")

T = TypeVar("T")

RETRY_FIRST_S, RETRY_MOST_S = 0.01, 0.5


class Mailboxes:
    """Serves the commands of all actors of a host, each actor's one at a time.

    An actor is `running` from the beginning of a command to its end. It has a task then when anything has to be waited
    for but the append of one command, or of a snapshot; what comes meanwhile waits in its inbox.
    """

    def __init__(
        self, *, journal: Journal, catch_up: CatchUp, snapshots: Snapshots, classes: ActorClasses, settings: Settings,
        incarnation: str, may_serve: Callable[[], bool], spawn: Callable[[Coroutine[Any, Any, None]], Any],
    ) -> None:  # fmt: skip
        self._journal, self._catch_up, self._snapshots = journal, catch_up, snapshots
        self._classes, self._settings = classes, settings
        self._incarnation, self._may_serve, self._spawn = incarnation, may_serve, spawn
        self._looks: dict[LiveActor, list[tuple[asyncio.Future[Any], Callable[[], Any]]]] = {}
        self._host: Host

    def attach(self, host: Host) -> None:
        self._host = host

    def put(self, unit: Unit, delivery: Delivery) -> None:
        """Serve a command for an actor of an open unit, or queue it. Raises Busy when the actor's inbox is full."""
        actor_id = delivery.command.actor
        live = unit.actors.get(actor_id)
        if live is None:
            live = unit.actors[actor_id] = LiveActor(actor_id)
        elif live.at_rest(fence=unit.fence) and self._served_at_once(unit, live, delivery):
            return
        if live.inbox is None:
            live.inbox = deque()
        if len(live.inbox) >= self._settings.mailbox_messages:
            raise Busy(f"{len(live.inbox)} commands wait for {actor_id} already: retry shortly", retry_after_s=0.05)
        live.inbox.append(delivery)
        if not live.running:
            live.running = True
            unit.mailbox_started()
            self._spawn(self._run(unit, live))

    # -- without a task: nothing to wait for but the append ----------------------------------------------------------
    def _served_at_once(self, unit: Unit, live: LiveActor, delivery: Delivery) -> bool:
        """Answer a query, or decide a command and send off its append; False when it is for a task to serve.

        The actor is at rest and current, so nothing has to be loaded, verified or claimed. `_appended` hears how the
        append ended; what cannot go straight on goes on with a task.
        """
        command = delivery.command
        if command.session or command.linearizable or not self._may_serve() or self._host.expired(command):
            return False
        assert live.instance is not None
        assert live.memory is not None
        handler = live.instance.handlers.get(command.name)
        if handler is None or not handler.fits(command.arguments):
            return False
        if handler.at_once == "query":
            return self._queried_at_once(unit, live, handler, delivery)
        if handler.at_once != "command" or live.memory.commands.answer_to(command.message_id) is not None:
            return False
        if not self._journal.takes_more():
            return False
        live.running = True
        unit.mailbox_started()
        try:
            record = live.evaluate_at_once(handler, command, epoch=unit.epoch, incarnation=self._incarnation)
            if record is None:
                self._go_on(unit, live, delivery)
            else:
                then = partial(self._appended, unit, live, delivery, record)
                self._journal.append_then(live.actor_id, record, after=live.version, then=then)
        except FerryError as error:
            self._go_on(unit, live, delivery, error)
        except Exception as mistake:
            self._fail(unit, live, mistake)
        return True

    def _queried_at_once(self, unit: Unit, live: LiveActor, handler: Handler, delivery: Delivery) -> bool:
        assert live.instance is not None
        live.idle_since_s = None
        try:
            answer = Answer(query_at_once(live.instance, handler, delivery.command.arguments))
        except Exception as error:
            answer = Answer(error=live.failed(error, handler))
        if answer.value is LATER:
            return False
        self._answer(unit, delivery, answer)
        return True

    def _appended(
        self, unit: Unit, live: LiveActor, delivery: Delivery, record: Record, outcome: int | FerryError
    ) -> None:
        """The append of a command that was decided at once has ended."""
        if isinstance(outcome, FerryError):
            self._go_on(unit, live, delivery, outcome)
            return
        try:
            self._answer(unit, delivery, self._stored(live, record, outcome))
            if not self._snapshots.due(unit, live):
                self._next(unit, live)
            elif not self._snapshots.send(unit, live, then=partial(self._rolled_up, unit, live)):
                self._spawn(self._run(unit, live, snapshot=True))
        except Exception as mistake:
            self._fail(unit, live, mistake)

    def _rolled_up(self, unit: Unit, live: LiveActor, snapshot: Record, outcome: int | FerryError) -> None:
        """The append of a snapshot that was sent at once has ended."""
        try:
            self._snapshots.ended(live, snapshot, outcome)
            self._next(unit, live)
        except Exception as mistake:
            self._fail(unit, live, mistake)

    def _next(self, unit: Unit, live: LiveActor) -> None:
        if live.inbox:
            self._spawn(self._run(unit, live))
        else:
            self._rest(unit, live)

    def _go_on(self, unit: Unit, live: LiveActor, delivery: Delivery, error: FerryError | None = None) -> None:
        """Let a task decide again what could not be decided at once.

        Nothing is in the log yet, as far as is known, but the instance may have changed.
        """
        live.dirty = True
        failed = None if isinstance(error, PayloadTooLarge) else error  # decided again, that becomes a logged refusal
        self._spawn(self._run(unit, live, (delivery, failed)))

    def _fail(self, unit: Unit, live: LiveActor, mistake: Exception) -> None:
        """Have a task raise a mistake of ours, which ends the node. Whoever called would take it for one of its own."""

        async def end() -> None:
            try:
                raise mistake
            finally:
                self._rest(unit, live)

        self._spawn(end())

    # -- with a task -------------------------------------------------------------------------------------------------
    async def _run(
        self, unit: Unit, live: LiveActor, begun: tuple[Delivery, FerryError | None] | None = None, *,
        snapshot: bool = False,
    ) -> None:  # fmt: skip
        """Serve what waits for an actor; first what was `begun` without a task and failed, and how, or a `snapshot`."""
        try:
            if begun is not None:
                await self._serve(unit, live, *begun)
            elif snapshot:
                await self._snapshots.take(unit, live)
            self._let_look(live)
            while live.inbox and unit.state is UnitState.OPEN:
                await self._serve(unit, live, live.inbox.popleft())
                self._let_look(live)
        finally:
            self._rest(unit, live)

    def _rest(self, unit: Unit, live: LiveActor) -> None:
        live.running = False
        self._let_look(live)
        live.idle_since_s = None
        unit.mailbox_stopped()
        if not live.inbox:
            live.inbox = None
            if live.instance is None and unit.actors.get(live.actor_id) is live:
                del unit.actors[live.actor_id]  # it never came to life: do not count it as one

    async def between_commands(self, live: LiveActor, look: Callable[[], T]) -> T:
        """Call `look` when no command of this actor is being decided: at once, or as soon as the current one is."""
        if not live.running:
            return look()
        looked: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._looks.setdefault(live, []).append((looked, look))
        return await looked

    def _let_look(self, live: LiveActor) -> None:
        for looked, look in self._looks.pop(live, ()) if self._looks else ():
            if looked.done():
                continue  # whoever asked has given up
            try:
                looked.set_result(look())
            except FerryError as error:
                looked.set_exception(error)

    async def _serve(self, unit: Unit, live: LiveActor, delivery: Delivery, failed: FerryError | None = None) -> None:
        """Answer one delivery, or send it on when the unit is lost meanwhile. Keeps trying while neither is known.

        `failed` is how it ended when it was tried before.
        """
        command, pause_s, maybe_landed = delivery.command, RETRY_FIRST_S, isinstance(failed, InDoubt)
        handler = self._handler_for(command)
        if isinstance(handler, InvalidInput) and not command.number:
            self._answer(unit, delivery, Answer(error=handler))
            return
        while True:
            if unit.actors.get(live.actor_id) is not live:  # dropped, or a unit of its own now
                if maybe_landed:  # the owner knows; the sender asks it again under the same id
                    doubt = InDoubt(f"{command.name!r} may have been applied before {unit.name} moved on")
                    self._answer(unit, delivery, Answer(error=doubt))
                else:
                    self._host.send_on(delivery)
                return
            if not maybe_landed and self._host.expired(command):
                self._host.counters["expired"] += 1
                return  # nobody waits for the answer, and nothing was appended
            try:
                if failed is not None:
                    earlier, failed = failed, None
                    raise earlier
                if not self._may_serve():
                    raise Unavailable("this node has lost its lease: it serves again when NATS answers")
                answer = await self._decide(unit, live, handler, delivery)
            except Fenced:
                await self._step_down(unit)
            except InDoubt:
                live.dirty = maybe_landed = True
            except WrongSequence:
                live.dirty = True
            except (Unavailable, Timeout) as error:
                live.dirty = True
                if not maybe_landed and not self._may_serve():
                    self._answer(unit, delivery, Answer(error=error))
                    return
            except (OutOfOrder, SessionExpired) as error:
                self._host.counters["out_of_session"] += 1
                self._answer(unit, delivery, Answer(error=error))
                return
            except PermanentError as error:
                self._host.counters["failed_activations"] += 1
                log.error("actor cannot serve", actor=str(command.actor), error=str(error))
                refusal: FerryError = error
                if maybe_landed:
                    refusal = InDoubt(f"{command.name!r} may have been applied; now its actor cannot serve: {error}")
                self._answer(unit, delivery, Answer(error=refusal))
                return
            else:
                self._answer(unit, delivery, answer)
                decided = isinstance(handler, InvalidInput) or handler.kind == "command"
                if decided and self._snapshots.due(unit, live):
                    await self._snapshots.take(unit, live)
                return
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, RETRY_MOST_S)

    def _handler_for(self, command: Command) -> Handler | InvalidInput:
        """The handler of a command, or why there is none; in a session such a command takes its number all the same."""
        try:
            handler = self._classes.handler(command.actor.actor_type, command.name)
            handler.check(command.arguments)
            if command.number and handler.kind == "query":
                return InvalidInput(f"{command.name!r} is a query: in a session, ask it with `session.query`")
            if command.session and not command.number and handler.kind == "command":
                return InvalidInput(f"{command.name!r} is a command: in a session, send it with `send_message`")
        except InvalidInput as error:
            return error
        return handler

    async def _decide(self, unit: Unit, live: LiveActor, handler: Handler | InvalidInput, delivery: Delivery) -> Answer:
        """Bring the actor to the end of its log, then answer from memory, ask it, or append what it decides.

        Raises InDoubt and WrongSequence when an append was not acknowledged: the command is then evaluated again on
        what the log says, and never the same append sent again. Raises OutOfOrder and SessionExpired.
        """
        command = delivery.command
        if not live.is_current(fence=unit.fence):
            await self._catch_up.make_current(unit, live)
        if isinstance(handler, Handler) and handler.kind == "query":
            return await self._query(unit, live, handler, command)
        assert live.memory is not None
        if command.number:
            known = await self._known_in_session(unit, live, command)
        else:
            known = live.memory.commands.answer_to(command.message_id)
        if known is not None:
            self._host.counters["duplicates"] += 1
            return known
        if isinstance(handler, InvalidInput):
            record = self._refusal(unit, live, command, handler)
        else:
            record = await live.evaluate(handler, command, epoch=unit.epoch, incarnation=self._incarnation)
        try:
            version = await self._journal.append(live.actor_id, record, after=live.version)
        except PayloadTooLarge as error:
            live.dirty = True
            record = self._refusal(unit, live, command, PayloadTooLarge(str(error), logged=True))
            version = await self._journal.append(live.actor_id, record, after=live.version)
        return self._stored(live, record, version)

    def _stored(self, live: LiveActor, record: Record, version: int) -> Answer:
        """What is answered to a command whose record has landed as `version`."""
        live.stored(record, version)
        self._host.counters["commands"] += 1
        if record.error is not None:
            self._host.counters["rejections"] += 1
            return Answer(error=from_wire(record.error))
        return Answer(record.reply)

    def _refusal(self, unit: Unit, live: LiveActor, command: Command, error: PermanentError) -> Record:
        return Record(
            kind=Kind.REJECTION, epoch=unit.epoch, incarnation=self._incarnation, trail=live.trail,
            message_id=command.message_id, session=command.session, number=command.number, error=to_wire(error),
        )  # fmt: skip

    async def _query(self, unit: Unit, live: LiveActor, handler: Handler, command: Command) -> Answer:
        """Answer a query from memory, after a look at the end of the log where it asks for that. Raises OutOfOrder."""
        assert live.memory is not None
        if command.linearizable:
            await self._catch_up.look_again(unit, live)
        if command.after and (live.memory.sessions.last(command.session) or 0) < command.after:
            if not command.linearizable:
                await self._catch_up.look_again(unit, live)
            sessions = live.memory.sessions
            if sessions.last(command.session) is None and opened_at(command.session) <= sessions.floor:
                raise _expired(live, sessions.floor)
            if (sessions.last(command.session) or 0) < command.after:
                raise OutOfOrder(f"command {command.after} of this session has not reached {live.actor_id} yet")
        return await live.ask(handler, command)

    async def _known_in_session(self, unit: Unit, live: LiveActor, command: Command) -> Answer | None:
        """The answer given before to a command of a session, or None when it is to be decided now.

        Raises OutOfOrder and SessionExpired, never before the end of the log has been read: an owner that missed
        something would send its callers away for ever.
        """
        assert live.memory is not None
        if self._admit(live, command) in (Admission.GAP, Admission.EXPIRED):
            await self._catch_up.look_again(unit, live)
        sessions = live.memory.sessions
        match self._admit(live, command):
            case Admission.NEXT:
                return None
            case Admission.SEEN:
                known = sessions.answer_to(command.session, command.number)
                gone = NotApplicable(f"command {command.number} of this session was answered long ago")
                return known or Answer(error=gone)
            case Admission.GAP:
                last = sessions.last(command.session) or 0
                raise OutOfOrder(f"{live.actor_id} waits for command {last + 1} of this session, not {command.number}")
            case Admission.EXPIRED:
                raise _expired(live, sessions.floor)
            case unknown:
                assert_never(unknown)

    def _admit(self, live: LiveActor, command: Command) -> Admission:
        assert live.memory is not None
        sessions = live.memory.sessions
        return rules.admit(
            command.number, last=sessions.last(command.session), opened=opened_at(command.session),
            floor=sessions.floor,
        )  # fmt: skip

    async def _step_down(self, unit: Unit) -> None:
        """The log says somebody else owns this unit: learn it from the map, which then drops or re-opens the unit."""
        try:
            await self._host.refresh(unit.name)
        except (Timeout, Unavailable) as error:
            log.warning("fenced, and the map cannot be read yet", unit=unit.name, error=str(error))

    def _answer(self, unit: Unit, delivery: Delivery, answer: Answer) -> None:
        """Tell the sender of a command what became of it, and who says so; all that is said for an actor goes here."""
        answer.owner, answer.epoch = self._host.node_id, unit.epoch
        self._host.answer(delivery, answer)


def _expired(live: LiveActor, floor: int) -> SessionExpired:
    return SessionExpired(f"{live.actor_id} has forgotten sessions as old as this: open a new one", floor=floor)
