"""The harness for users: correct actor classes pass, and each kind of mistake is found and named."""

from __future__ import annotations

import itertools
import random
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
    ],
)
def test_a_mistake_is_found_and_named(actor_class: type[Actor], named: str) -> None:
    """The message says what differs and how to see it again."""
    calls = WRITES if actor_class is Shared else [*WRITES, ("read", {})]
    with pytest.raises(Violation) as caught:
        exercise(actor_class, calls)

    assert named in str(caught.value)
    assert "repeat with seeds=[" in str(caught.value)
    seed = int(str(caught.value).rpartition("[")[2].rstrip("])"))
    with pytest.raises(Violation):
        exercise(actor_class, calls, seeds=[seed])


def test_a_command_that_leaves_a_state_which_cannot_travel_is_refused_and_counted() -> None:
    """Nodes refuse it at once, so nothing breaks later; the report shows it."""
    assert exercise(Immovable, WRITES, seeds=range(3)).failed > 0


def test_a_call_that_the_class_does_not_have_is_invalid_input() -> None:
    with pytest.raises(InvalidInput):
        exercise(Notes, [("no_such_call", {})], seeds=[1])
