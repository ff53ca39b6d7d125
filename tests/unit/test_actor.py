"""Writing actors: the contract's examples, and everything that tempts live and replayed state apart."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.address import ActorId
from routing.envelope import Command
from routing.errors import (
    FerryError,
    HandlerFailed,
    InvalidInput,
    InvariantViolated,
    Rejected,
    StateNotPortable,
    UnknownActorType,
    UnknownCommand,
)
from runtime.actor import Actor, ActorClasses, command, event, query, run
from runtime.codec import capture_state
from runtime.journal import Kind, Record
from runtime.live_actor import LiveActor, replay
from runtime.memory import Limits, Memory
from tests.unit.virtual_time import run_virtually

TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


class Notebook(Actor):
    """Does what people do: keeps what it is given, changes it later, and hands it out."""

    actor_type = "notebook"

    def __init__(self) -> None:
        self.pages: dict[str, list[Any]] = {}
        self.writes = 0

    @command
    def put(self, *, page: str, value: Any, times: int = 1) -> dict[str, Any]:
        for _ in range(times):
            self.emit("put_down", page=page, value=value)
        return {"writes": self.writes, "page": self.pages[page]}

    @command
    async def put_later(self, *, page: str, value: Any) -> int:
        await asyncio.sleep(1)
        self.emit("put_down", page=page, value=value)
        await asyncio.sleep(1)
        return self.writes

    @command
    def put_shared(self, *, value: Any) -> None:
        shared = [value]
        self.emit("put_down", page="one", value=shared)
        shared.append("changed after emitting")
        self.emit("put_down", page="two", value=shared)

    @command
    def grow(self, *, page: str) -> int:
        self.emit("grown", page=page)
        return len(self.pages[page])

    @command
    def put_tuple(self) -> None:
        self.emit("put_down", page="tuple", value=(1, (2, 3)))

    @command
    def put_strange(self, *, strange: str) -> None:
        self.emit("put_down", page="strange", value={"set": {1}, "nan": float("nan"), "object": object()}[strange])

    @command
    def refuse(self) -> None:
        raise Rejected("not today")

    @command
    def emit_unknown(self) -> None:
        self.emit("never_heard_of", value=1)

    @command
    def emit_wrongly(self) -> None:
        self.emit("put_down", nonsense=1)

    @command
    def emit_from_the_event(self) -> None:
        self.emit("chained")

    @command
    def reply_strangely(self) -> Any:
        return object()

    @query
    def read(self) -> dict[str, Any]:
        return self.pages

    @query
    async def read_later(self) -> int:
        await asyncio.sleep(1)
        return self.writes

    @query
    def emit_in_a_query(self) -> int:
        self.emit("put_down", page="query", value=1)
        return 1

    @event
    def put_down(self, page: str, value: Any) -> None:
        self.pages.setdefault(page, []).append(value)
        self.writes += 1

    @event
    def grown(self, page: str) -> None:
        for value in self.pages.setdefault(page, []):
            if isinstance(value, list):
                value.append("grown")
        self.pages[page].append(self.writes)

    @event
    def chained(self) -> None:
        self.emit("put_down", page="chained", value=1)


def call(instance: Actor, name: str, /, **arguments: Any) -> tuple[Any, list[list[Any]]]:
    """(reply, events) of one command or query; the events as an append right after it would store them."""
    emitted: list[list[Any]] = []
    reply = run_virtually(run(instance, type(instance).handlers[name], arguments, emitted))
    return reply, orjson.loads(orjson.dumps(emitted))


def replayed(events: list[list[Any]], into: type[Actor] = Notebook) -> Actor:
    fresh = into()
    for name, values in events:
        fresh.apply(name, values)
    return fresh


def test_a_command_emits_and_replies() -> None:
    """The event has changed the state before the reply is made."""
    reply, events = call(Notebook(), "put", page="p", value=7)

    assert reply == {"writes": 1, "page": [7]}
    assert events == [["put_down", {"page": "p", "value": 7}]]


def test_handlers_may_be_async() -> None:
    """Commands and queries; emitting between awaits."""
    notebook = Notebook()

    assert call(notebook, "put_later", page="p", value=7) == (1, [["put_down", {"page": "p", "value": 7}]])
    assert call(notebook, "read_later") == (1, [])


def test_a_rejection_rises_and_emits_nothing() -> None:
    """What to do with it is the mailbox's business."""
    with pytest.raises(Rejected, match="not today"):
        call(Notebook(), "refuse")


def test_a_query_must_not_emit() -> None:
    """An error, no event, and the state is as it was."""
    notebook = Notebook()

    with pytest.raises(FerryError):
        call(notebook, "emit_in_a_query")

    assert call(notebook, "read") == ({}, [])


def test_emitting_outside_a_command_is_an_error() -> None:
    """Nobody would log it: on an instance of one's own, or after the command has ended."""
    notebook = Notebook()
    with pytest.raises(FerryError):
        notebook.emit("put_down", page="p", value=1)

    call(notebook, "put", page="p", value=1)
    with pytest.raises(FerryError):
        notebook.emit("put_down", page="p", value=2)

    assert notebook.writes == 1


def test_emitting_in_an_event_handler_is_an_error() -> None:
    """On replay there is no command around it, so the second event would be applied twice or never."""
    with pytest.raises(FerryError):
        call(Notebook(), "emit_from_the_event")


def test_an_event_that_does_not_exist_is_an_error_when_emitted() -> None:
    """Not only on replay, when it would be too late."""
    for name in ("emit_unknown", "emit_wrongly"):
        with pytest.raises((FerryError, TypeError)):
            call(Notebook(), name)


def test_an_unknown_event_on_replay_is_not_portable() -> None:
    """The log is newer than this code."""
    for name in ("never_heard_of", "put", "read", "emit", "__init__"):
        with pytest.raises(StateNotPortable):
            Notebook().apply(name, {})


def test_an_event_with_other_values_than_the_handler_takes_is_not_portable() -> None:
    """The handler's signature changed since: this code cannot replay that log."""
    logged = Record(kind=Kind.COMMAND, epoch=1, incarnation="a-1", events=[["put_down", {"page": "p"}]])

    with pytest.raises(StateNotPortable):
        replay(Notebook(), Memory(Limits(3, 3)), logged)


def test_an_event_sees_what_will_be_read_back() -> None:
    """A tuple is a list already when the live handler sees it."""
    notebook = Notebook()

    _, events = call(notebook, "put_tuple")

    assert notebook.pages == {"tuple": [[1, [2, 3]]]}
    assert capture_state(replayed(events)) == capture_state(notebook)


@pytest.mark.parametrize("strange", ["set", "object"])
def test_an_event_value_that_is_not_json_like_is_an_error(strange: str) -> None:
    """Before it changed anything."""
    notebook = Notebook()

    with pytest.raises((FerryError, TypeError)):
        call(notebook, "put_strange", strange=strange)

    assert notebook.pages == {}


def test_a_float_that_json_does_not_have_is_the_same_live_and_replayed() -> None:
    """Refused, or already None when the live handler sees it."""
    notebook = Notebook()

    try:
        _, events = call(notebook, "put_strange", strange="nan")
    except (FerryError, TypeError, ValueError):
        assert notebook.pages == {}
    else:
        assert notebook.pages == {"strange": [None]}
        assert capture_state(replayed(events)) == capture_state(notebook)


def test_what_a_handler_changes_after_emitting_does_not_reach_the_state() -> None:
    """The event holds the value of the moment, live as well as replayed."""
    notebook = Notebook()

    _, events = call(notebook, "put_shared", value=1)

    assert notebook.pages == {"one": [[1]], "two": [[1, "changed after emitting"]]}
    assert capture_state(replayed(events)) == capture_state(notebook)


def test_what_the_state_does_with_a_value_later_does_not_reach_the_log() -> None:
    """A later command changes the state in place; what the earlier one logged replays to the same."""
    notebook = Notebook()
    _, first = call(notebook, "put", page="p", value=["a"])
    _, second = call(notebook, "grow", page="p")

    assert first == [["put_down", {"page": "p", "value": ["a"]}]]
    assert capture_state(replayed(first + second)) == capture_state(notebook)


def test_a_command_that_emits_and_changes_within_one_run_logs_what_it_emitted() -> None:
    """Two events of one command, the second changing what the first put down."""

    class Hasty(Notebook):
        actor_type = "hasty"

        @command
        def put_and_grow(self) -> None:
            self.emit("put_down", page="p", value=["a"])
            self.emit("grown", page="p")

    hasty = Hasty()

    _, events = call(hasty, "put_and_grow")

    assert capture_state(replayed(events, Hasty)) == capture_state(hasty)


def test_a_reply_is_not_the_state_itself() -> None:
    """A local caller that changes its reply must not change the actor."""
    notebook = Notebook()
    reply, _ = call(notebook, "put", page="p", value=1)

    reply["page"].append("by the caller")
    read, _ = call(notebook, "read")
    read["p"].append("by the reader")

    assert notebook.pages == {"p": [1]}


def test_a_handler_that_changes_its_arguments_does_not_change_the_command() -> None:
    """The command is decided again when its append fails: from what was sent, not from what the first try left."""

    class Eater(Notebook):
        actor_type = "eater"

        @command
        def eat(self, *, items: list[str]) -> str:
            return items.pop()

    arguments = {"items": ["a", "b"]}

    assert [run_virtually(run(Eater(), Eater.handlers["eat"], arguments, [])) for _ in range(2)] == ["b", "b"]
    assert arguments == {"items": ["a", "b"]}


@pytest.mark.parametrize("reply", [2**80, "\ud800", float("nan"), [float("inf")], b"bytes"])
def test_a_reply_that_the_log_cannot_hold_is_a_type_error(reply: Any) -> None:
    """Found here, as the actor's mistake, and not when the record is encoded."""

    class Strange(Notebook):
        actor_type = "strange"

        @query
        def ask(self) -> Any:
            return reply

    with pytest.raises(TypeError):
        call(Strange(), "ask")


def test_a_reply_that_is_not_json_like_is_a_type_error() -> None:
    """The mailbox turns it into HandlerFailed: the actor's own mistake."""
    with pytest.raises(TypeError):
        call(Notebook(), "reply_strangely")


@pytest.mark.parametrize(
    "arguments", [{}, {"page": "p"}, {"page": "p", "value": 1, "more": 2}, {"self": 1, "page": "p", "value": 1}]
)
def test_arguments_that_do_not_fit_are_invalid_input(arguments: dict[str, Any]) -> None:
    """Found before the handler runs, so it is the caller's mistake and not the actor's."""
    with pytest.raises(InvalidInput):
        Notebook.handlers["put"].check(arguments)


def test_arguments_that_fit_are_taken() -> None:
    """Defaults need not be given."""
    Notebook.handlers["put"].check({"page": "p", "value": None})
    Notebook.handlers["put"].check({"page": "p", "value": None, "times": 2})


@given(
    st.lists(
        st.tuples(
            st.just("put"),
            st.fixed_dictionaries({"page": st.sampled_from("ab"), "value": JSON, "times": st.integers(1, 3)}),
        )
        | st.tuples(st.just("grow"), st.fixed_dictionaries({"page": st.sampled_from("ab")}))
        | st.tuples(st.just("put_shared"), st.fixed_dictionaries({"value": JSON})),
        max_size=6,
    )
)
def test_live_state_is_replayed_state(calls: list[tuple[str, dict[str, Any]]]) -> None:
    """Whatever was sent: replaying the log gives the very bytes the live instance would hand over."""
    notebook = Notebook()
    log: list[list[Any]] = []

    for name, arguments in calls:
        log += call(notebook, name, **arguments)[1]

    assert capture_state(replayed(log)) == capture_state(notebook)


def test_a_second_message_never_runs_in_an_actor_at_work() -> None:
    """At most one at a time: what the mailbox guarantees, `run` checks."""

    async def both() -> None:
        notebook = Notebook()
        first = asyncio.create_task(run(notebook, Notebook.handlers["put_later"], {"page": "p", "value": 1}, []))
        await asyncio.sleep(0.5)
        with pytest.raises(InvariantViolated):
            await run(notebook, Notebook.handlers["put"], {"page": "p", "value": 2}, [])
        await first

    run_virtually(both())


def test_a_handler_whose_task_is_cancelled_has_not_failed() -> None:
    """The cancellation rises: whoever ends the task must not be told of a failure, nor log one."""

    async def cancelled() -> None:
        reading = asyncio.create_task(run(Notebook(), Notebook.handlers["read_later"], {}, []))
        await asyncio.sleep(0.5)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    run_virtually(cancelled())


def test_an_actor_nobody_activated_has_no_id() -> None:
    """InvalidInput says so, instead of an AttributeError."""
    with pytest.raises(InvalidInput):
        _ = Notebook().actor_id


def test_subclasses_inherit_and_override_handlers() -> None:
    """As methods do; the parent is untouched."""

    class Diary(Notebook):
        actor_type = "diary"

        @query
        def read(self) -> dict[str, Any]:
            return {"diary": True}

    assert call(Diary(), "read")[0] == {"diary": True}
    assert call(Notebook(), "read")[0] == {}
    assert set(Notebook.handlers) <= set(Diary.handlers)


def test_an_async_event_is_refused() -> None:
    """Its coroutine would never be awaited, and the event silently not applied."""
    with pytest.raises((FerryError, TypeError)):

        class Late(Actor):
            actor_type = "late"

            @command
            def go(self) -> None:
                self.emit("gone")

            @event
            async def gone(self) -> None:
                self.state = 1

        call(Late(), "go")


@pytest.mark.parametrize("alone", ["capture", "restore"])
def test_capture_and_restore_come_as_a_pair(alone: str) -> None:
    """One without the other shows in the first move, or after a crash, unless it is refused where it is written."""
    with pytest.raises(InvalidInput, match="Half has one of capture"):
        type("Half", (Actor,), {alone: lambda self, *data: b""})

    whole = type("Whole", (Actor,), {"capture": lambda self: b"", "restore": lambda self, data: None})
    assert issubclass(type("Inheriting", (whole,), {"capture": lambda self: b"1"}), whole)


@pytest.mark.parametrize("version", [True, 1.0, "2", None])
def test_a_schema_version_is_a_whole_number(version: Any) -> None:
    """It is compared with others, and told in the node's lease: no node may become invisible by it."""
    with pytest.raises(InvalidInput, match=r"Odd.schema_version is .*: must be a whole number"):
        type("Odd", (Actor,), {"schema_version": version})


def test_classes_are_found_by_type_and_handlers_by_name() -> None:
    """Events, private methods and inherited plumbing cannot be called from outside."""
    classes = ActorClasses([Notebook])

    assert classes.types == ["notebook"]
    assert classes.get("notebook") is Notebook
    assert classes.handler("notebook", "put").name == "put"
    with pytest.raises(UnknownActorType):
        classes.get("diary")
    for name in ("put_down", "emit", "apply", "upgrade", "__init__", "actor_id", "handlers", ""):
        with pytest.raises(UnknownCommand):
            classes.handler("notebook", name)


def test_two_classes_of_one_type_are_refused() -> None:
    """Which of them would own the log?"""

    class Other(Actor):
        actor_type = "notebook"

    with pytest.raises(InvalidInput, match="notebook"):
        ActorClasses([Notebook, Other])
    classes = ActorClasses([Notebook])
    classes.add(Notebook)
    assert classes.types == ["notebook"]


@pytest.mark.parametrize("actor_type", ["", "Upper", "has space", "a/b", "a.b", "*"])
def test_a_class_whose_type_no_id_can_name_is_refused(actor_type: str) -> None:
    """Nobody could ever send to it."""
    with pytest.raises(InvalidInput):
        ActorClasses([type("Odd", (Actor,), {"actor_type": actor_type})])


def test_modules_are_loaded_by_name() -> None:
    """The demo's actor, as `ferry node --actors examples.flights` loads it."""
    assert "aircraft" in ActorClasses.load(["examples.flights"]).types


@pytest.mark.parametrize("module", ["no.such.module", "json", "", "..", "examples flights"])
def test_a_module_that_is_missing_or_has_no_actor_is_invalid_input(module: str) -> None:
    """The message names the module: it stands in a setting."""
    with pytest.raises(InvalidInput):
        ActorClasses.load([module])


def test_the_flights_example_counts() -> None:
    """The main job's arithmetic, with partial rows and rejections."""
    aircraft = ActorClasses.load(["examples.flights"]).get("aircraft")
    plane = aircraft()

    assert call(plane, "fly", distance=1400, dest="IAH", arr_delay=11)[0] == 1
    assert call(plane, "fly", distance=200, dest="BOS", arr_delay=None)[0] == 2
    with pytest.raises(Rejected):
        call(plane, "fly", distance=0)

    assert call(plane, "totals")[0] == {"flights": 2, "miles": 1600, "delay_minutes": 11, "last_airport": "BOS"}


async def test_a_command_that_hides_the_failure_of_its_event_is_refused() -> None:
    """The instance is half changed by then: a normal reply would journal a command whose effect nobody can replay."""

    class Careless(Actor):
        actor_type = "careless"

        def __init__(self) -> None:
            self.first = self.second = 0

        @command
        def step(self) -> int:
            try:
                self.emit("stepped")
            except ZeroDivisionError:
                return -1
            return self.first

        @event
        def stepped(self) -> None:
            self.first = 1
            self.second = 1 // 0

    # when the command swallows what its event raised, then it fails all the same
    with pytest.raises(HandlerFailed, match="went on after one of its events"):
        await run(Careless(), Careless.handlers["step"], {}, [])


async def test_a_command_that_leaves_a_state_no_node_could_take_over_is_refused() -> None:
    """Said at once and to whoever sent it, instead of blocking the shard's next move."""

    class Cart(Actor):
        actor_type = "cart"

        def __init__(self) -> None:
            self.items: dict[Any, int] = {}

        @command
        def add(self, *, sku: Any) -> int:
            self.emit("added", sku=sku)
            return len(self.items)

        @event
        def added(self, sku: Any) -> None:
            self.items[sku] = 1

    live = LiveActor(ActorId("cart", "q"))
    live.stand_at(Cart(), Memory(Limits(8, 8)), version=0, epoch=0, trail=())
    wrong = Command(actor=live.actor_id, name="add", arguments={"sku": 5}, message_id="m", expires_ms=0)

    record = await live.evaluate(Cart.handlers["add"], wrong, epoch=1, incarnation="i")

    assert record.kind is Kind.REJECTION
    assert record.error is not None
    assert "items" in record.error["message"]
    assert live.dirty
