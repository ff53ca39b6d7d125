"""The error tree, and what is left of an error after it crossed the wire."""

from __future__ import annotations

from collections.abc import Iterator

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing import errors
from routing.errors import (
    Busy,
    FerryError,
    HandlerFailed,
    InDoubt,
    InvalidInput,
    InvariantViolated,
    Moved,
    NotApplicable,
    PayloadTooLarge,
    PermanentError,
    Rejected,
    StreamMissing,
    Timeout,
    TransientError,
    Unavailable,
    UnknownActorType,
    UnknownCommand,
    WrongSequence,
    from_wire,
    to_wire,
)


def below(root: type[FerryError]) -> Iterator[type[FerryError]]:
    for kind in (child for child in root.__subclasses__() if child.__module__ == errors.__name__):
        yield kind
        yield from below(kind)


def make(kind: type[FerryError]) -> FerryError:
    if kind is Moved:
        return Moved("ask b", owner="b", epoch=7)
    if kind is InDoubt:
        return InDoubt("send it again", message_id="m-1")
    return kind("do this next")


# Moved travels as a field of its own in an answer (test_envelope.py); InvariantViolated stops a process; StreamMissing
# is for those who ask NATS themselves.
CONCRETE = [
    kind
    for kind in below(FerryError)
    if kind not in {TransientError, PermanentError, Moved, InvariantViolated, StreamMissing}
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("kind", CONCRETE, ids=lambda kind: kind.__name__)
def test_every_error_arrives_as_what_it_left_as(kind: type[FerryError]) -> None:
    """A caller's `except` clauses work the same whether the error was raised here or on another node."""
    arrived = from_wire(to_wire(make(kind)))

    assert type(arrived) is kind
    assert str(arrived) == str(make(kind))


@pytest.mark.parametrize(
    "kind", [Moved, InvariantViolated, PermanentError, TransientError], ids=lambda kind: kind.__name__
)
def test_no_error_of_ours_is_blamed_on_the_actor_after_the_wire(kind: type[FerryError]) -> None:
    """HandlerFailed claims that the actor's own code raised and that this is journalled: true of foreign errors."""
    assert not isinstance(from_wire(to_wire(make(kind))), HandlerFailed)


@pytest.mark.parametrize("kind", [Moved, TransientError], ids=lambda kind: kind.__name__)
def test_what_may_be_retried_may_still_be_retried_after_the_wire(kind: type[FerryError]) -> None:
    """A Celery step retries TransientError only: a transient error that arrives as permanent rolls a move back."""
    assert isinstance(from_wire(to_wire(make(kind))), TransientError)


def test_a_missing_stream_travels_as_what_earlier_versions_know() -> None:
    """They take an unknown kind for permanent, and a Celery step would roll its move back."""
    assert to_wire(StreamMissing("start a node"))["kind"] == "Unavailable"


def test_the_retry_hint_of_busy_survives_the_wire() -> None:
    """The receiver's wish, not the default."""
    arrived = from_wire(to_wire(Busy("full", retry_after_s=1.25)))

    assert isinstance(arrived, Busy)
    assert arrived.retry_after_s == 1.25


def test_an_unknown_outcome_still_names_its_message_after_the_wire() -> None:
    """The caller needs the id to ask again."""
    arrived = from_wire(to_wire(InDoubt("send it again", message_id="m-1")))

    assert isinstance(arrived, InDoubt)
    assert arrived.message_id == "m-1"


def test_an_error_that_is_not_ours_travels_as_a_failed_handler() -> None:
    """With its message, so that the caller sees what the actor's code said."""
    document = to_wire(ZeroDivisionError("division by zero"))

    assert isinstance(from_wire(document), HandlerFailed)
    assert "division by zero" in document["message"]


def test_a_derived_error_travels_as_what_it_is_derived_from() -> None:
    """An application's own Rejected is a decision, not a failure of the handler."""

    class OutOfStock(Rejected):
        pass

    arrived = from_wire(to_wire(OutOfStock("no tea left")))

    assert type(arrived) is Rejected
    assert str(arrived) == "no tea left"


def test_a_foreign_error_is_not_taken_for_ours_by_its_name() -> None:
    """Many libraries have a Timeout: it says nothing about whether the command was applied."""
    foreign = type("Timeout", (Exception,), {})

    assert isinstance(from_wire(to_wire(foreign("of another library"))), HandlerFailed)


def test_a_message_that_is_no_valid_text_still_travels() -> None:
    """An actor may put anything into its Rejected."""
    assert orjson.dumps(to_wire(Rejected("half a character: \ud800")))


@pytest.mark.parametrize("kind", ["FromTheFuture", "Exception", "SystemExit", "to_wire", "", "__class__"])
def test_an_unknown_kind_becomes_a_permanent_error(kind: str) -> None:
    """A newer peer's error is not retried blindly, and no name of the module can be reached through a message."""
    arrived = from_wire({"kind": kind, "message": "what happened"})

    assert type(arrived) is PermanentError
    assert "what happened" in str(arrived)


@given(st.dictionaries(st.sampled_from(["kind", "message", "retry_after_s", "message_id"]), JSON))
def test_whatever_a_peer_sends_as_an_error_becomes_an_error_of_the_tree(document: dict[str, object]) -> None:
    """Reading an error never raises one of another kind."""
    assert isinstance(from_wire(document), FerryError)


@given(st.sampled_from(CONCRETE), st.sampled_from(["retry_after_s", "message_id", "owner", "epoch", "message"]), JSON)
def test_a_known_kind_with_damaged_fields_is_still_an_error_of_the_tree(
    kind: type[FerryError], field: str, value: object
) -> None:
    """One wrong field of a known kind does not turn into a ValueError in the reader."""
    assert isinstance(from_wire({"kind": kind.__name__, "message": "m", field: value}), FerryError)


@pytest.mark.parametrize(
    ("branch", "kinds"),
    [
        (TransientError, {Timeout, Unavailable, Busy, Moved, WrongSequence}),
        (PermanentError, {Rejected, HandlerFailed, NotApplicable, InvalidInput}),
        (InvalidInput, {UnknownActorType, UnknownCommand, PayloadTooLarge}),
    ],
)
def test_the_tree_tells_what_may_be_retried(branch: type[FerryError], kinds: set[type[FerryError]]) -> None:
    """Celery retries TransientError only; an unknown outcome and a bug are neither transient nor permanent."""
    assert kinds <= set(below(branch))
    assert not {InDoubt, InvariantViolated} & set(below(branch))


def test_every_error_is_drawn_and_says_what_it_means() -> None:
    """The tree at the top of the module is complete, and each class has its sentence."""
    for kind in below(FerryError):
        assert f" {kind.__name__} " in f"{errors.__doc__} ".replace("\n", " \n"), kind
        assert kind.__doc__, kind
