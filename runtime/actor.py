"""Writing an actor: subclass Actor, mark handlers with @command, @query and @event.

    class Counter(Actor):
        actor_type = "counter"

        def __init__(self) -> None:
            self.total = 0

        @command
        def add(self, *, amount: int) -> int:
            if amount <= 0:
                raise Rejected("amount must be positive")
            self.emit("added", amount=amount)
            return self.total

        @event
        def added(self, amount: int) -> None:
            self.total += amount

A command decides and emits events; an event changes state and must do the same on every replay: no clock, no
random, no I/O. A query only reads. State is the instance's public attributes: JSON-like values, lists rather than
tuples. An attribute that `__init__` sets anew keeps its default when older state lacks it; raise `schema_version` for
any other change. Set an attribute to None rather than deleting it: restoring sets it again.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from marshmallow import Schema

from routing import jsonlike
from routing.address import ActorId
from routing.errors import (
    HandlerFailed,
    InvalidInput,
    InvariantViolated,
    Rejected,
    StateNotPortable,
    UnknownActorType,
    UnknownCommand,
)
from routing.jsonlike import shown
from routing.local import LATER

__all__ = ["Actor", "ActorClasses", "Rejected", "command", "event", "query"]

F = TypeVar("F", bound=Callable[..., Any])
_MARK = "__ferry_handler__"
# Those of HANDLER_ERRORS, which says why, that are no Exception. Where one is awaited, a CancelledError may be ours.
_NOT_ITS_TO_RAISE = (asyncio.CancelledError, SystemExit)
_LEAST, _MOST = -jsonlike.SMALL, jsonlike.SMALL
_ANSWERS = frozenset({str, int, float, bool, type(None), list, dict})  # nearly all are one of these


def command(function: F) -> F:
    """Marks a method that may change state, through `emit` alone. May be `async`. Its result is the reply."""
    setattr(function, _MARK, "command")
    return function


def query(function: F) -> F:
    """Marks a method that reads state and must not emit. May be `async`. Its result is the reply."""
    setattr(function, _MARK, "query")
    return function


def event(function: F) -> F:
    """Marks a method that applies one kind of event to the state; also called on replay. Never `async`."""
    setattr(function, _MARK, "event")
    return function


@dataclass(slots=True)
class Handler:
    """One marked method: its kind, the plain function and its signature without `self`.

    `at_once`: "command" or "query" when it has its reply without waiting for anything, else "". One that is not
    `async` is taken for that until it answers with something to wait for.
    """

    name: str
    kind: str
    function: Callable[..., Any]
    signature: inspect.Signature
    required: frozenset[str] = frozenset()
    known: frozenset[str] | None = None  # None: whatever is given, or not so simple to tell
    at_once: str = ""

    @classmethod
    def of(cls, name: str, kind: str, function: Callable[..., Any]) -> Handler:
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())[1:]
        simple = all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters)
        return cls(
            name, kind, function, signature.replace(parameters=parameters),
            required=frozenset(p.name for p in parameters if p.default is p.empty),
            known=frozenset(p.name for p in parameters) if simple else None,
            at_once="" if kind == "event" or inspect.iscoroutinefunction(function) else kind,
        )  # fmt: skip

    def fits(self, arguments: dict[str, Any]) -> bool:
        """Whether these arguments certainly fit the signature; `check` knows for sure."""
        if not arguments:
            return not self.required
        return self.known is not None and self.required <= arguments.keys() <= self.known

    def call(self, instance: Actor, arguments: dict[str, Any]) -> Any:
        """Its result, or what is to be awaited for that. It gets a copy of the arguments.

        Whatever it raises rises, but HandlerFailed for what is not its to raise.
        """
        try:
            return self.function(instance, **jsonlike.copy(arguments)) if arguments else self.function(instance)
        except _NOT_ITS_TO_RAISE as error:
            raise _has_failed(self, error) from error

    def check(self, arguments: dict[str, Any]) -> None:
        """Raises InvalidInput when the arguments do not fit the signature."""
        if self.fits(arguments):
            return
        try:
            self.signature.bind(**arguments)
        except TypeError as error:
            raise InvalidInput(f"{self.name}{self.signature}: {error}") from error


class Actor:
    """Base class of all actors. One instance is one live activation; at most one message runs in it at a time."""

    actor_type: ClassVar[str] = ""
    schema_version: ClassVar[int] = 1
    state_schema: ClassVar[type[Schema] | None] = None
    handlers: ClassVar[dict[str, Handler]] = {}

    _emitted: list[list[Any]] | None = None  # collects while a command runs, None otherwise
    _spoiled: Exception | None = None  # an event that failed half way in the command that ran last
    _actor_id: ActorId | None = None

    @property
    def actor_id(self) -> ActorId:
        """Who this is. Raises InvalidInput on an instance that no host activated."""
        if self._actor_id is None:
            raise InvalidInput(f"this {type(self).__name__} was made by hand: it has no id")
        return self._actor_id

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        handlers = dict(cls.handlers)
        for name, function in vars(cls).items():
            kind = getattr(function, _MARK, None)
            if kind is None:
                continue
            if kind == "event" and inspect.iscoroutinefunction(function):
                raise InvalidInput(f"{cls.__name__}.{name}: an @event must not be async, for it is replayed")
            handlers[name] = Handler.of(name, kind, function)
        cls.handlers = handlers
        if hasattr(cls, "capture") != hasattr(cls, "restore"):
            raise InvalidInput(f"{cls.__name__} has one of capture() and restore(): define both, or neither")
        if type(cls.schema_version) is not int:
            raise InvalidInput(f"{cls.__name__}.schema_version is {shown(cls.schema_version)}: must be a whole number")

    def emit(self, event_name: str, /, **values: Any) -> None:
        """Record that something happened, and apply it. Only inside a @command.

        Values are JSON-like; the event handler sees them as they will be read back, so live and replayed state agree.
        It gets a copy of its own: what it keeps may be changed by a later event, and the log must not change with it.
        Raises InvalidInput in a @query or an @event, and for values that are not JSON-like.
        """
        if self._emitted is None:
            raise InvalidInput(f"emit({event_name!r}) outside a @command: a @query only reads, an @event only applies")
        try:
            applied, recorded = jsonlike.copies(values, 2) if values else ({}, {})
        except TypeError as error:
            raise InvalidInput(f"event {event_name!r} has a value that is not JSON-like: {error}") from error
        emitted, self._emitted = self._emitted, None  # an event that emits would do so again on every replay
        try:
            self.apply(event_name, applied)
        except Exception as error:
            self._spoiled = error  # half applied: even a command that catches this must not be journalled
            raise
        finally:
            self._emitted = emitted
        emitted.append([event_name, recorded])

    def apply(self, event_name: str, values: dict[str, Any]) -> None:
        """Run the @event handler. Raises StateNotPortable when this class does not know the event."""
        handler = self.handlers.get(event_name)
        if handler is None or handler.kind != "event":
            raise StateNotPortable(f"{type(self).__name__} has no @event {event_name!r}: keep handlers of old events")
        handler.function(self, **values)

    def upgrade(self, state: Any, from_version: int) -> Any:
        """Turn state captured under an older `schema_version` into this one's. Override when raising the version."""
        raise StateNotPortable(
            f"{self.actor_type} state of version {from_version} meets code of version {self.schema_version}:"
            f" define upgrade() on {type(self).__name__}"
        )


class ActorClasses:
    """The actor classes a process can activate, by actor type."""

    def __init__(self, classes: Iterable[type[Actor]] = ()) -> None:
        self._by_type: dict[str, type[Actor]] = {}
        for actor_class in classes:
            self.add(actor_class)

    @classmethod
    def load(cls, modules: Iterable[str]) -> ActorClasses:
        """Import modules and take every Actor with an `actor_type` they define or import. Raises InvalidInput."""
        found = cls()
        for name in modules:
            if not name or name.startswith("."):
                raise InvalidInput(f"--actors {name!r}: name a module, e.g. examples.flights")
            try:
                module = importlib.import_module(name)
            except ImportError as error:
                raise InvalidInput(f"--actors {name}: cannot be imported ({error}); name a module") from error
            classes = [x for x in vars(module).values() if isinstance(x, type) and issubclass(x, Actor)]
            classes = [actor_class for actor_class in classes if actor_class.actor_type]
            if not classes:
                raise InvalidInput(f"--actors {name}: defines no Actor with an actor_type")
            for actor_class in classes:
                found.add(actor_class)
        return found

    def add(self, actor_class: type[Actor]) -> None:
        ActorId(actor_class.actor_type, "check")
        other = self._by_type.setdefault(actor_class.actor_type, actor_class)
        if other is not actor_class:
            raise InvalidInput(f"actor type {actor_class.actor_type!r} is defined twice: {other} and {actor_class}")

    @property
    def types(self) -> list[str]:
        return sorted(self._by_type)

    def get(self, actor_type: str) -> type[Actor]:
        """Raises UnknownActorType."""
        if actor_type not in self._by_type:
            raise UnknownActorType(
                f"actor type {actor_type!r} is unknown here: this node has {', '.join(self.types) or 'none'};"
                " start it with --actors MODULE"
            )
        return self._by_type[actor_type]

    def handler(self, actor_type: str, name: str) -> Handler:
        """The @command or @query `name`. Raises UnknownActorType, UnknownCommand."""
        actor_class = self.get(actor_type)
        handler = actor_class.handlers.get(name)
        if handler is None or handler.kind == "event":
            known = sorted(h.name for h in actor_class.handlers.values() if h.kind != "event")
            raise UnknownCommand(f"{actor_type} has no command {name!r}: it has {', '.join(known) or 'none'}")
        return handler


async def run(instance: Actor, handler: Handler, arguments: dict[str, Any], emitted: list[list[Any]]) -> Any:
    """Run one command or query and return its reply, as it will be read back from JSON.

    A command's events are added to `emitted` as [name, values], also when it raises: then the instance already has
    them and must be discarded. The handler gets a copy of the arguments, for a command is decided again when its append
    fails. Whatever the handler raises rises, as from `Handler.call`; TypeError for a reply that is not JSON-like.
    """
    if instance._emitted is not None:
        raise _not_alone(handler)
    instance._emitted, instance._spoiled = (emitted if handler.kind == "command" else None), None
    try:
        result = handler.call(instance, arguments)
        if inspect.isawaitable(result):
            result = await result
    except _NOT_ITS_TO_RAISE as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise  # whoever runs this is told to end, not the handler
        raise _has_failed(handler, error) from error
    finally:
        instance._emitted = None
    if instance._spoiled is not None:
        raise _went_on(handler) from instance._spoiled
    return jsonlike.copy(result)


def query_at_once(instance: Actor, handler: Handler, arguments: dict[str, Any]) -> Any:
    """As `run`, for a query that needs nothing to be waited for; LATER when it turns out to, and is to be run again."""
    if instance._emitted is not None:
        raise _not_alone(handler)
    try:  # as Handler.call, without the call: this is all that a local query does
        result = handler.function(instance, **jsonlike.copy(arguments)) if arguments else handler.function(instance)
    except _NOT_ITS_TO_RAISE as error:
        raise _has_failed(handler, error) from error
    if type(result) is int and _LEAST < result < _MOST:  # as `copy` finds it, without the call
        return result
    return jsonlike.copy(result) if type(result) in _ANSWERS else _reply_at_once(handler, result)


def run_at_once(instance: Actor, handler: Handler, arguments: dict[str, Any], emitted: list[list[Any]]) -> Any:
    """As `run`, for a command that needs nothing to be waited for; LATER when it turns out to.

    Then it is to be run again, on another instance: this one has what was emitted before.
    """
    if instance._emitted is not None:
        raise _not_alone(handler)
    instance._emitted, instance._spoiled = emitted, None
    try:
        result = handler.call(instance, arguments)
    finally:
        instance._emitted = None
    if instance._spoiled is not None:
        raise _went_on(handler) from instance._spoiled
    return jsonlike.copy(result) if type(result) in _ANSWERS else _reply_at_once(handler, result)


def _reply_at_once(handler: Handler, result: Any) -> Any:
    if not inspect.isawaitable(result):
        return jsonlike.copy(result)
    handler.at_once = ""
    if inspect.iscoroutine(result):
        result.close()
    return LATER


def _has_failed(handler: Handler, error: BaseException) -> HandlerFailed:
    """What a handler that raised one of `_NOT_ITS_TO_RAISE` has done, as with any other error."""
    if isinstance(error, asyncio.CancelledError):
        return HandlerFailed(f"{handler.name} met what was cancelled")
    return HandlerFailed(f"{handler.name} raised SystemExit: an actor does not end its node")


def _went_on(handler: Handler) -> HandlerFailed:
    return HandlerFailed(f"{handler.name} went on after one of its events had failed")


def _not_alone(handler: Handler) -> InvariantViolated:
    return InvariantViolated(f"{handler.name} started while another handler runs in the same actor")
