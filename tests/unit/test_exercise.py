"""The harness for users: correct actor classes pass, and each kind of mistake is found and named."""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
import threading
import time
import uuid
from typing import Any, ClassVar

import pytest

from examples.flights import Aircraft
from routing.errors import InvalidInput
from runtime.actor import Actor, Rejected, command, event, query
from runtime.testing import Violation, exercise

WRITES = [("write", {"entry": n}) for n in range(12)]


class Notes(Actor):
    actor_type = "notes"

    def __init__(self) -> None:
        self.entries: list[Any] = []

    @command
    def write(self, *, entry: Any) -> int:
        if entry in self.entries:
            raise Rejected("written already")
        self.emit("written", entry=entry)
        return len(self.entries)

    @query
    def read(self) -> list[Any]:
        return self.entries

    @event
    def written(self, entry: Any) -> None:
        self.entries.append(entry)


def test_a_correct_actor_passes_and_is_really_disturbed() -> None:
    """Moves, crashes, lost acknowledgements, repeats and refusals all happened, or passing would mean nothing."""
    done = exercise(Notes, [*WRITES, ("write", {"entry": 3}), ("read", {})], seeds=range(8))

    assert done.runs == 8
    assert done.commands == 8 * len(WRITES)
    assert done.rejected == 8
    assert min(done.moves, done.crashes, done.repeated, done.unacknowledged, done.queries, done.replays) > 0


def test_the_example_of_the_documentation_passes() -> None:
    """Calls may be drawn from the seed."""

    def flights(rng: random.Random) -> list[tuple[str, dict[str, Any]]]:
        return [("fly", {"flight": f"UA{n}", "distance": rng.randint(1, 5000)}) for n in range(10)]

    handler = Aircraft.handlers["fly"]
    names = set(handler.signature.parameters)
    calls = [
        (name, {key: value for key, value in arguments.items() if key in names})
        for name, arguments in flights(random.Random(1))
    ]
    assert exercise(Aircraft, calls, seeds=range(3)).runs == 3


def test_the_same_seed_is_the_same_run() -> None:
    """A violation is repeated by its seed alone."""
    assert exercise(Notes, WRITES, seeds=[7]) == exercise(Notes, WRITES, seeds=[7])


class Dice(Notes):
    actor_type = "dice"

    @event
    def written(self, entry: Any) -> None:
        self.entries.append([entry, random.random()])


class Shortcut(Notes):
    actor_type = "shortcut"

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0

    @command
    def write(self, *, entry: Any) -> int:
        self.writes += 1
        self.emit("written", entry=entry)
        return len(self.entries)


class Curious(Notes):
    actor_type = "curious"

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    @query
    def read(self) -> list[Any]:
        self.reads += 1
        return self.entries


class Shared(Actor):
    actor_type = "shared"
    everything: ClassVar[list[Any]] = []

    @command
    def write(self, *, entry: Any) -> int:
        self.emit("written", entry=entry)
        return len(self.everything)

    @event
    def written(self, entry: Any) -> None:
        self.everything.append(entry)


class Forgetful(Notes):
    actor_type = "forgetful"

    def capture(self) -> bytes:
        return ",".join(str(entry) for entry in self.entries[-3:]).encode()

    def restore(self, data: bytes) -> None:
        self.entries = [int(entry) + 1 for entry in data.decode().split(",") if entry]


class Unportable(Notes):
    """A tuple from the beginning: the first state already cannot travel."""

    actor_type = "unportable"

    def __init__(self) -> None:
        super().__init__()
        self.corner: Any = (0, 0)


class Numbered(Notes):
    """Every command fails, for JSON has no keys but text."""

    actor_type = "numbered"

    def __init__(self) -> None:
        super().__init__()
        self.by_number: dict[Any, Any] = {}

    @event
    def written(self, entry: Any) -> None:
        self.by_number[1] = entry


class Secretive(Notes):
    """Counts in a private attribute, and answers with it."""

    actor_type = "secretive"

    def __init__(self) -> None:
        super().__init__()
        self._writes = 0

    @command
    def write(self, *, entry: Any) -> int:
        self.emit("written", entry=entry)
        return self._writes

    @event
    def written(self, entry: Any) -> None:
        self.entries.append(entry)
        self._writes += 1


class Impatient(Notes):
    """What a command keeps beside the state is in no log either; only its refusals show it."""

    actor_type = "impatient"
    _last: Any = None

    @command
    def write(self, *, entry: Any) -> int:
        if self._last == entry - 1:
            raise Rejected("not two in a row")
        self._last = entry
        self.emit("written", entry=entry)
        return len(self.entries)


class Derived(Notes):
    """The public total is made of a private one."""

    actor_type = "derived"

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._total = 0

    @event
    def written(self, entry: Any) -> None:
        self.entries.append(entry)
        self._total += entry
        self.total = self._total


class Ranked(Notes):
    """Answers in the order in which keys came: a dict in the state comes back sorted."""

    actor_type = "ranked"

    def __init__(self) -> None:
        super().__init__()
        self.by_name: dict[str, int] = {}

    @query
    def read(self) -> list[Any]:
        return list(self.by_name)

    @event
    def written(self, entry: Any) -> None:
        self.by_name[str(-entry)] = entry


class Refusing(Notes):
    actor_type = "refusing"

    @command
    def write(self, *, entry: Any) -> int:
        raise Rejected("never")


class Broken(Notes):
    actor_type = "broken"

    @command
    def write(self, *, entry: Any) -> int:
        raise KeyError(entry)


class Eventless(Notes):
    actor_type = "eventless"

    @command
    def write(self, *, entry: Any) -> int:
        self.emit("writen", entry=entry)
        return len(self.entries)


class Unborn(Notes):
    actor_type = "unborn"

    def __init__(self, size: int) -> None:
        super().__init__()


class Immovable(Notes):
    actor_type = "immovable"

    def __init__(self) -> None:
        super().__init__()
        self.counter: Any = None

    @event
    def written(self, entry: Any) -> None:
        self.entries.append(entry)
        if len(self.entries) == 5:
            self.counter = itertools.count()


@pytest.mark.parametrize(
    ("actor_class", "named"),
    [
        (Dice, "entries is"),
        (Shortcut, "writes is"),
        (Curious, "query 'read' changed the state: reads is"),
        (Shared, "class attributes: everything is"),
        (Forgetful, "restored state differs from captured state"),
        (Unportable, "attribute 'corner' is not JSON-like"),
        (Numbered, "attribute 'by_number' is not JSON-like"),
        (Immovable, "attribute 'counter' is not JSON-like"),
        (Secretive, "'write' uses what is not in the state: after a move: reply is"),
        (Impatient, "'write' uses what is not in the state: after a move: "),
        (Derived, "'write' uses what is not in the state: after a move: state is"),
        (Ranked, "'read' uses what is not in the state: after a move: reply is"),
        (Refusing, "no command was ever applied; the first was told Rejected: never"),
        (Broken, "no command was ever applied; the first was told HandlerFailed: "),
        (Eventless, "has no @event 'writen'"),
        (Unborn, "it must work without arguments"),
    ],
)
def test_a_mistake_is_found_and_named(actor_class: type[Actor], named: str) -> None:
    """The message says what differs and how to see it again."""
    calls = WRITES if actor_class is Shared else [*WRITES, ("read", {})]
    with pytest.raises(Violation) as caught:
        exercise(actor_class, calls, seeds=range(6))

    assert named in str(caught.value)
    assert "repeat with seeds=[" in str(caught.value)
    seed = int(str(caught.value).rpartition("[")[2].rstrip("])"))
    with pytest.raises(Violation):
        exercise(actor_class, calls, seeds=[seed])


class Caching(Notes):
    """Private attributes of every honest kind: a cache, a lock that cannot be copied, an index into the state."""

    actor_type = "caching"

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[list[Any]] = []
        self._lock = threading.Lock()
        self._total: int | None = None
        self._by_entry: dict[Any, list[Any]] | None = None

    @command
    def write(self, *, entry: Any) -> int:
        if self._by_entry is None:
            self._by_entry = {pair[0]: pair for pair in self.pairs}
        if entry in self._by_entry:
            raise Rejected("written already")
        with self._lock:
            self.emit("written", entry=entry)
        return len(self.pairs)

    @query
    def read(self) -> int:
        if self._total is None:
            self._total = sum(pair[0] for pair in self.pairs)
        return self._total

    @event
    def written(self, entry: Any) -> None:
        self.pairs.append([entry, 0])
        self._total = self._by_entry = None


class Gambling(Notes):
    """Commands may be decided by chance and by the clock, as long as the outcome is in their events."""

    actor_type = "gambling"

    def __init__(self) -> None:
        super().__init__()
        self._dice = random.Random()

    @command
    async def write(self, *, entry: Any) -> list[Any]:
        await asyncio.sleep(0.01)
        drawn = [self._dice.randint(0, 1), random.randint(0, 1), secrets.randbelow(2)]
        self.emit("written", entry=[*drawn, uuid.uuid4().hex, time.time()])
        return self.entries[-1]


class Named(Notes):
    """An event may read who the actor is, live and on replay."""

    actor_type = "named"

    @event
    def written(self, entry: Any) -> None:
        self.entries.append(f"{self.actor_id}: {entry}")


class Packed(Notes):
    """A large state in a private attribute, with a capture() of its own."""

    actor_type = "packed"

    def __init__(self) -> None:
        self._packed = bytearray()

    @command
    def write(self, *, entry: int) -> int:
        self.emit("written", entry=entry)
        return len(self._packed)

    @query
    def read(self) -> list[Any]:
        return list(self._packed)

    @event
    def written(self, entry: int) -> None:
        self._packed.append(entry)

    def capture(self) -> bytes:
        return bytes(self._packed)

    def restore(self, data: bytes) -> None:
        self._packed = bytearray(data)


class Tossing(Notes):
    """A coin of its own: each restored copy has another one, and every lived copy the same."""

    actor_type = "tossing"

    def __init__(self) -> None:
        super().__init__()
        self._coin = random.Random()

    @command
    def write(self, *, entry: Any) -> int:
        self.emit("written", entry=entry)
        return self._coin.randint(0, 1)


@pytest.mark.parametrize("actor_class", [Caching, Gambling, Tossing, Named, Packed])
def test_what_an_actor_may_do_is_no_mistake(actor_class: type[Actor]) -> None:
    """A private attribute that changes nothing anybody sees, chance in a command, a capture of its own."""
    assert exercise(actor_class, [*WRITES, ("read", {})], seeds=range(6)).commands == 6 * len(WRITES)


def test_queries_alone_may_be_exercised() -> None:
    assert exercise(Notes, [("read", {})], seeds=range(3)).queries == 3


def test_the_random_numbers_of_a_test_are_not_disturbed() -> None:
    """A test that has seeded them goes on as without `exercise`."""
    random.seed(3)
    expected = random.random()

    random.seed(3)
    exercise(Notes, WRITES[:3], seeds=range(2))

    assert random.random() == expected


class Summed(Notes):
    """Notes, a version later: it keeps their sum as well, and can tell it."""

    schema_version = 2

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def upgrade(self, state: Any, from_version: int) -> Any:
        return {**state, "total": sum(state["entries"])}

    @query
    def sum(self) -> int:
        return self.total

    @event
    def written(self, entry: Any) -> None:
        self.entries.append(entry)
        self.total += entry


class SummedWrongly(Summed):
    def upgrade(self, state: Any, from_version: int) -> Any:
        return {**state, "total": 0}


class WithoutUpgrade(Notes):
    schema_version = 2


class WithoutOldEvent(Summed):
    handlers: ClassVar[Any] = {name: one for name, one in Summed.handlers.items() if name != "written"}


def test_a_newer_class_takes_over_what_the_older_has_left() -> None:
    """By a move and by its log; calls that only the newer one has come when all nodes are new."""
    done = exercise(Summed, [*WRITES, ("sum", {}), ("write", {"entry": 99}), ("sum", {})], before=Notes)

    assert (done.commands, done.queries) == (20 * 13, 40)


@pytest.mark.parametrize(
    ("newer", "named"),
    [
        (SummedWrongly, "state upgraded from version 1 differs from what its events lead to: total is 0, not"),
        (WithoutUpgrade, "define upgrade()"),
        (WithoutOldEvent, "no @event 'written': keep handlers of old events"),
    ],
)
def test_a_mistake_in_a_newer_class_is_found_and_named(newer: type[Actor], named: str) -> None:
    """Before it meets what is stored."""
    with pytest.raises(Violation) as caught:
        exercise(newer, WRITES, before=Notes)

    assert named in str(caught.value)
    assert "repeat with seeds=[" in str(caught.value)


def test_a_call_that_the_class_does_not_have_is_invalid_input() -> None:
    with pytest.raises(InvalidInput):
        exercise(Notes, [("no_such_call", {})], seeds=[1])
