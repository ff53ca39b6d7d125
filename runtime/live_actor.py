"""One live activation: the instance, the version of its log it stands at, and what it remembers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import structlog

from routing import errors
from routing.address import ActorId
from routing.envelope import Answer, Command
from routing.errors import FerryError, HandlerFailed, InvalidInput, PermanentError, Rejected
from routing.local import LATER
from runtime import actor as actors
from runtime import rules
from runtime.actor import Actor, Handler
from runtime.codec import Frame, aside, bytes_of_plain, capture_state, pack, restore_state, unpack
from runtime.delivery import Delivery
from runtime.journal import History, Kind, Record
from runtime.memory import Limits, Memory
from runtime.turn import Turn

log = structlog.get_logger("ferry.actor")

_COMMAND = Kind.COMMAND  # to look a member up on its class takes a while
SMALL_BYTES = 16 * 1024  # to encode so much, or to pack it as well, takes tens of microseconds, an append hundreds


class LiveActor:
    """An actor in memory.

    Invariants: `instance` is exactly the state after the message `version` of its log, or `dirty` is set and nobody
    reads it; at most one handler runs at a time; at most one append is in flight.
    """

    __slots__ = (
        "actor_id", "dirty", "epoch", "idle_since_s", "inbox", "instance", "memory", "running", "snapshot_from",
        "state_bytes", "trail", "unverified", "version",
    )  # fmt: skip

    def __init__(self, actor_id: ActorId) -> None:
        self.actor_id = actor_id
        self.instance: Actor | None = None  # None until loaded
        self.version = 0
        self.epoch = 0  # of the last entry of its log
        self.trail: tuple[int, ...] = ()
        self.memory: Memory | None = None
        self.inbox: deque[Delivery] | None = None
        self.running = False
        self.dirty = True
        self.unverified = False  # taken over from a move: compare with the log's tail before the first use
        self.idle_since_s: float | None = None  # found so when its host last looked; None: used since then
        self.state_bytes = 0  # about, when last looked at; 0: never. Plans, and what is large, go by it
        self.snapshot_from = 0  # how long its log has to be for the next snapshot; 0: to be settled

    # -- standing at a version ---------------------------------------------------------------------------------------
    async def restore(
        self, actor_class: type[Actor], history: History, *, limits: Limits, max_state_bytes: int,
        still_alone: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Become the state at the end of `history`, unless `still_alone` raises: others run while a log is long.

        Raises StateNotPortable, PayloadTooLarge.
        """
        instance, memory = new_instance(actor_class), Memory(limits)
        instance._actor_id = self.actor_id  # events may read it
        turn = Turn(asyncio.get_running_loop().time)
        for _, record in history.records:
            if record.kind is Kind.SNAPSHOT:
                assert record.frame is not None
                state = unpack(record.frame, max_bytes=max_state_bytes)
                self.state_bytes = len(state)
                instance = restore_state(actor_class, state, record.frame.schema)
                instance._actor_id = self.actor_id
                memory = Memory.from_document(record.memory, limits)
            else:
                replay(instance, memory, record)
            if turn.over():
                await turn.next()
                still_alone()
        self.stand_at(instance, memory, version=history.version, epoch=history.epoch, trail=history.trail)

    def stand_at(self, instance: Actor, memory: Memory, *, version: int, epoch: int, trail: tuple[int, ...]) -> None:
        instance._actor_id = self.actor_id
        self.instance, self.memory = instance, memory
        self.version, self.epoch, self.trail = version, epoch, trail
        self.dirty = self.unverified = False

    def at_rest(self, *, fence: int) -> bool:
        """Whether a command that comes now is the only one, and finds the actor ready to serve it."""
        # `is_current` without its two calls; when in doubt the actor's task asks the rules.
        return not (self.running or self.inbox or self.dirty or self.unverified or self.epoch < fence)

    def is_current(self, *, fence: int) -> bool:
        """Whether the instance is known to be the end of its log, and that to be beyond its unit's fence."""
        return not (self.dirty or self.unverified or rules.must_claim(tail_epoch=self.epoch, fence=fence))

    def stored(self, record: Record, version: int) -> None:
        """`record`, whose events the instance already has, landed in the log as `version`."""
        assert self.memory is not None
        remember(self.memory, record)
        if record.kind is not Kind.PIECE:  # of no use to anybody but the snapshot that names it
            self.trail = (version,) if record.kind is Kind.SNAPSHOT else (*self.trail, version)
        self.version, self.epoch = version, record.epoch

    # -- deciding ----------------------------------------------------------------------------------------------------
    async def evaluate(self, handler: Handler, command: Command, *, epoch: int, incarnation: str) -> Record:
        """Run a command on the instance and return what to append. A refusal by the actor is a record too.

        Sets `dirty` when the handler failed: it may have changed the instance before it did.
        """
        assert self.instance is not None
        record = self._begin(command, epoch, incarnation)
        try:
            reply = await actors.run(self.instance, handler, command.arguments, record.events)
            return self._decided(record, reply)
        except Exception as error:
            return self._refused(record, command, error)

    def evaluate_at_once(self, handler: Handler, command: Command, *, epoch: int, incarnation: str) -> Record | None:
        """As `evaluate`, for a handler with nothing to wait for; None, and `dirty` set, when it turns out to."""
        assert self.instance is not None
        record = self._begin(command, epoch, incarnation)
        try:
            reply = actors.run_at_once(self.instance, handler, command.arguments, record.events)
            return None if reply is LATER else self._decided(record, reply)
        except Exception as error:
            return self._refused(record, command, error)

    def _begin(self, command: Command, epoch: int, incarnation: str) -> Record:
        self.dirty = True
        return Record(_COMMAND, epoch, incarnation, self.trail, command.message_id, command.session, command.number)

    def _decided(self, record: Record, reply: Any) -> Record:
        """Raises StateNotPortable."""
        record.reply = reply
        self._check_state(record.events)
        self.dirty = False
        return record

    def _refused(self, record: Record, command: Command, error: Exception) -> Record:
        """The record of a command that was not applied."""
        assert self.instance is not None
        clean = isinstance(error, Rejected) and not record.events and self.instance._spoiled is None
        self.dirty = not clean
        record.kind, record.events, record.reply = Kind.REJECTION, [], None
        record.error = errors.to_wire(as_refusal(error, self.actor_id, command.name))
        return record

    def _check_state(self, events: list[list[Any]]) -> None:
        """Refuse a command that leaves a state which could not be captured later, as long as looking is cheap.

        Raises StateNotPortable. A large state, or one with a `capture()` of its own, is checked when it is next
        snapshotted or moved.
        """
        assert self.instance is not None
        if events and self._is_small():
            size = bytes_of_plain(self.instance)
            self.state_bytes = len(capture_state(self.instance)) if size is None else size

    def _is_small(self) -> bool:
        return self.state_bytes <= SMALL_BYTES and not hasattr(self.instance, "capture")

    async def ask(self, handler: Handler, command: Command) -> Answer:
        """Run a query."""
        assert self.instance is not None
        try:
            return Answer(value=await actors.run(self.instance, handler, command.arguments, []))
        except Exception as error:
            return Answer(error=self.failed(error, handler))

    def failed(self, error: Exception, handler: Handler) -> FerryError:
        """What the sender of a query is told when its handler raised; nothing vouches for the instance then."""
        self.dirty = not isinstance(error, Rejected)
        return as_refusal(error, self.actor_id, handler.name)

    async def snapshot(self, *, epoch: int, incarnation: str, max_state_bytes: int) -> Record:
        """Only who has the actor to itself may ask. Raises StateNotPortable, PayloadTooLarge."""
        packing = self._packing(max_state_bytes)
        return self._snapshot_of(await aside(self.state_bytes, packing), epoch, incarnation)

    def snapshot_at_once(self, *, epoch: int, incarnation: str, max_state_bytes: int) -> Record | None:
        """As `snapshot`; None for a state that may be so large that packing it holds up the commands of others."""
        if not self._is_small():
            return None
        packing = self._packing(max_state_bytes)  # from now on its size is known, if it was not
        return self._snapshot_of(packing(), epoch, incarnation) if self._is_small() else None

    def _packing(self, max_state_bytes: int) -> Callable[[], Frame]:
        """Capture the state now; how to pack it, in any thread. Raises StateNotPortable."""
        assert self.instance is not None
        state, schema = capture_state(self.instance), self.instance.schema_version
        self.state_bytes = len(state)
        return partial(pack, state, schema=schema, max_bytes=max_state_bytes, actor=self.actor_id)

    def _snapshot_of(self, frame: Frame, epoch: int, incarnation: str) -> Record:
        assert self.memory is not None
        return Record(Kind.SNAPSHOT, epoch, incarnation, memory=self.memory.to_document(), frame=frame)


def new_instance(actor_class: type[Actor]) -> Actor:
    """Raises StateNotPortable when the class's own `__init__` fails."""
    try:
        return actor_class()
    except errors.HANDLER_ERRORS as error:
        raise errors.StateNotPortable(
            f"{actor_class.__name__}() raised {type(error).__name__}: {error}; it must work without arguments"
        ) from error


def replay(instance: Actor, memory: Memory, record: Record) -> None:
    """Apply one logged record to a state. Raises StateNotPortable when this code cannot."""
    for name, values in record.events:
        try:
            instance.apply(name, values)
        except PermanentError:
            raise
        except errors.HANDLER_ERRORS as error:
            raise errors.StateNotPortable(
                f"@event {name} of {instance.actor_type} failed on replay: {type(error).__name__}: {error};"
                " events must apply the same way every time"
            ) from error
    remember(memory, record)


def remember(memory: Memory, record: Record) -> None:
    """Keep the answer that a record of the log carries."""
    if record.session:
        memory.sessions.add(record.session, record.number, record.reply, record.error)
    elif record.message_id:  # else it is no command's
        memory.commands.add(record.message_id, record.reply, record.error)


def as_refusal(error: Exception, actor_id: ActorId, name: str) -> FerryError:
    """What the sender is told when a handler raised: Rejected and InvalidInput as they are, else HandlerFailed."""
    if isinstance(error, (Rejected, InvalidInput)):
        return error
    log.error("handler failed", actor=str(actor_id), command=name, exc_info=error)
    return HandlerFailed(f"{name!r} of {actor_id} raised {_in_words(error)}; nothing was applied")


def _in_words(error: Exception) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # the class of an exception is the application's as well
        return type(error).__name__
