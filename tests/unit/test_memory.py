"""What an actor remembers of answered commands."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.errors import InvalidInput, Rejected, to_wire
from runtime.memory import AnsweredCommands

ENTRIES = st.lists(
    st.tuples(st.integers(0, 12).map(lambda n: f"m-{n}"), st.integers() | st.text(), st.booleans()), max_size=30
)
NO = to_wire(Rejected("no"))


def filled(entries: list[tuple[str, Any, bool]], limit: int) -> AnsweredCommands:
    answered = AnsweredCommands(limit)
    for message_id, reply, refused in entries:
        answered.add(message_id, None if refused else reply, NO if refused else None)
    return answered


def test_an_answered_command_has_the_same_answer_again() -> None:
    """A reply, or a refusal."""
    answered = filled([("yes", 7, False), ("no", None, True)], 10)

    first, second = answered.answer_to("yes"), answered.answer_to("no")

    assert first is not None
    assert second is not None
    assert (first.value, first.error) == (7, None)
    assert isinstance(second.error, Rejected)
    assert str(second.error) == "no"


def test_a_reply_of_none_is_an_answer() -> None:
    """Not to be mistaken for "never seen", or the command would be applied again."""
    answer = filled([("m", None, False)], 10).answer_to("m")

    assert answer is not None
    assert (answer.value, answer.error) == (None, None)


def test_an_unknown_command_has_no_answer() -> None:
    """Empty, or just another id."""
    assert AnsweredCommands(3).answer_to("m") is None
    assert filled([("n", 1, False)], 3).answer_to("m") is None


def test_the_oldest_is_forgotten_first() -> None:
    """The window is bounded; within it nothing is forgotten."""
    answered = filled([(f"m-{n}", n, False) for n in range(5)], 3)

    assert [answered.answer_to(f"m-{n}") is not None for n in range(5)] == [False, False, True, True, True]


@given(ENTRIES, st.integers(1, 8))
def test_the_window_is_the_same_after_a_snapshot(entries: list[tuple[str, Any, bool]], limit: int) -> None:
    """Written into a document, read back and filled further: no difference to never having been away."""
    for cut in (0, len(entries) // 2, len(entries)):
        straight = filled(entries, limit)
        half = AnsweredCommands.from_document(filled(entries[:cut], limit).to_document(), limit)
        for message_id, reply, refused in entries[cut:]:
            half.add(message_id, None if refused else reply, NO if refused else None)

        assert half.to_document() == straight.to_document()
        assert len(straight.to_document()) <= limit


@given(ENTRIES, st.integers(1, 8), st.integers(1, 8))
def test_a_smaller_window_keeps_the_newest(entries: list[tuple[str, Any, bool]], limit: int, smaller: int) -> None:
    """The setting may change between deployments."""
    document = filled(entries, limit).to_document()

    again = AnsweredCommands.from_document(document, smaller).to_document()

    assert again == document[max(0, len(document) - smaller) :]


def test_the_document_does_not_change_with_what_comes_later() -> None:
    """A snapshot under way holds the window of its version."""
    answered = filled([("m", 1, False)], 3)
    document = answered.to_document()

    answered.add("n", 2, None)

    assert [entry[0] for entry in document] == ["m"]


@pytest.mark.parametrize(
    "entry", [None, 7, "m", [], ["m"], [1, 2], ["m", 1, {"kind": "Rejected"}], ["m", None, "no"], ["m", None, {}, 1]]
)
def test_a_damaged_window_is_invalid_input(entry: Any) -> None:
    """A wrong answer remembered would be given to whoever repeats the command."""
    with pytest.raises(InvalidInput):
        AnsweredCommands.from_document([["fine", 1], entry], 10)
