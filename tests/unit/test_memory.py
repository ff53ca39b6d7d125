"""What an actor remembers of answered commands."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.errors import InDoubt, InvalidInput, Rejected, to_wire
from routing.session_id import IN_FLIGHT
from runtime.memory import LARGE_BYTES, REPLIES_BYTES, AnsweredCommands, Limits, Memory, check_memory

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


DAMAGED = [None, 7, "m", [], ["m"], [1, 2], ["m", 1, {"kind": "Rejected"}], ["m", None, "no"], ["m", None, {}, 1]]


@pytest.mark.parametrize("entry", DAMAGED)
def test_a_damaged_window_is_invalid_input(entry: Any) -> None:
    """A wrong answer remembered would be given to whoever repeats the command."""
    with pytest.raises(InvalidInput):
        check_memory({"commands": [["fine", 1], entry], "sessions": {"floor": 0, "known": []}})


# -- sender sessions ---------------------------------------------------------------------------------------------------
def session_id(opened: int) -> str:
    return f"{opened}-00000000"


LIMITS = Limits(commands=8, sessions=3)
NUMBERED = st.lists(st.tuples(st.integers(1, 6), st.booleans()), max_size=60)


def numbered(calls: list[tuple[int, bool]], memory: Memory) -> dict[int, int]:
    """Each call is the next command of session `opened`; returns the last number of each."""
    last: dict[int, int] = {}
    for opened, refused in calls:
        last[opened] = number = (memory.sessions.last(session_id(opened)) or 0) + 1
        memory.sessions.add(session_id(opened), number, None if refused else number, NO if refused else None)
    return last


def test_numbered_commands_leave_the_window_of_plain_ids_alone() -> None:
    """A busy session must not push out what plain senders still may repeat."""
    memory = Memory(LIMITS)
    memory.commands.add("plain", 1, None)

    numbered([(1, False)] * 100, memory)

    assert memory.commands.answer_to("plain") is not None
    assert memory.sessions.last(session_id(1)) == 100


def test_as_many_replies_are_kept_as_a_sender_may_wait_for() -> None:
    """Any command a sender can still be waiting for gets the reply it got before; what is older is gone."""
    memory = Memory(LIMITS)
    numbered([(1, False)] * (IN_FLIGHT + 5), memory)

    kept = [memory.sessions.answer_to(session_id(1), n) is not None for n in range(1, IN_FLIGHT + 6)]

    assert kept == [False] * 5 + [True] * IN_FLIGHT


def test_a_forgotten_session_leaves_the_floor_behind() -> None:
    """The session unused for longest goes; whatever was opened no later can never begin anew."""
    memory = Memory(LIMITS)

    numbered([(50, False), (10, False), (20, False), (50, False), (30, False)], memory)

    assert memory.sessions.last(session_id(10)) is None
    assert memory.sessions.last(session_id(50)) == 2
    assert memory.sessions.floor == 10


@given(NUMBERED)
def test_sessions_are_the_same_after_a_snapshot(calls: list[tuple[int, bool]]) -> None:
    """Written into a document, read back and filled further: no difference to never having been away."""
    for cut in (0, len(calls) // 2, len(calls)):
        straight, before = Memory(LIMITS), Memory(LIMITS)
        numbered(calls, straight)
        numbered(calls[:cut], before)
        after = Memory.from_document(orjson.loads(orjson.dumps(before.to_document())), LIMITS)
        numbered(calls[cut:], after)

        assert after.to_document() == straight.to_document()
        assert len(straight.sessions) <= LIMITS.sessions


@pytest.mark.parametrize(
    "sessions",
    [
        None,
        [],
        {"floor": 0},
        {"floor": -1, "known": []},
        {"floor": True, "known": []},
        {"floor": 0, "known": [], "more": 1},
        {"floor": 0, "known": [["1-00000000", 1]]},
        {"floor": 0, "known": [["nonsense", 1, [[1, 1]]]]},
        {"floor": 0, "known": [["1-00000000", 2, [[1, 1]]]]},
        {"floor": 0, "known": [["1-00000000", 1, []]]},
        {"floor": 0, "known": [["1-00000000", 1, [[2, 1], [1, 1]]]]},
        {"floor": 0, "known": [["1-00000000", 1, [[True, 1]]]]},
    ],
)
def test_damaged_sessions_are_invalid_input(sessions: Any) -> None:
    """A wrong number remembered would apply a command twice, or never."""
    with pytest.raises(InvalidInput):
        check_memory({"commands": [], "sessions": sessions})


# -- large replies -----------------------------------------------------------------------------------------------------
LARGE = REPLIES_BYTES // 4


def bytes_of(memory: Memory) -> int:
    return len(orjson.dumps(memory.to_document()))


@pytest.mark.parametrize("reply", ["x" * LARGE, ["x" * (LARGE // 2)] * 2])
def test_of_old_large_replies_only_that_they_were_given_is_remembered(reply: Any) -> None:
    """So what an actor remembers is bounded in bytes; a repeated command is told that it was applied."""
    memory = Memory(Limits(commands=128, sessions=64))
    for number in range(1, 101):
        memory.commands.add(f"m-{number}", reply, None)
        memory.commands.add(f"small-{number % 20}", number, None)
        memory.sessions.add(f"{number % 7 + 1}-00000000", number, reply, None)
    assert bytes_of(memory) < 3 * REPLIES_BYTES

    for again in (memory, Memory.from_document(memory.to_document(), Limits(commands=128, sessions=64))):
        newest, oldest = again.commands.answer_to("m-100"), again.commands.answer_to("m-1")
        assert newest is not None
        assert newest.value == reply
        assert oldest is not None
        assert isinstance(oldest.error, InDoubt)
        small = [again.commands.answer_to(f"small-{number % 20}") for number in range(81, 101)]
        assert [answer.value for answer in small if answer is not None] == [*range(81, 101)]
        latest, earlier = again.sessions.answer_to("2-00000000", 99), again.sessions.answer_to("3-00000000", 2)
        assert latest is not None
        assert latest.value == reply
        assert earlier is not None
        assert isinstance(earlier.error, InDoubt)


def test_a_reply_larger_than_all_that_is_kept_is_remembered_while_it_is_the_newest() -> None:
    """Its sender may not have it yet."""
    answered = AnsweredCommands(128)
    for number in range(2):
        answered.add(f"m-{number}", "x" * (2 * REPLIES_BYTES), None)

    newest, oldest = answered.answer_to("m-1"), answered.answer_to("m-0")

    assert newest is not None
    assert newest.error is None
    assert oldest is not None
    assert isinstance(oldest.error, InDoubt)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 2)), max_size=60))
def test_what_is_counted_is_what_is_there(commands: list[tuple[int, int]]) -> None:
    """Whatever is forgotten for other reasons is not counted any more."""
    answered, sessions = AnsweredCommands(5), Memory(Limits(commands=5, sessions=3)).sessions
    for place, (which, size) in enumerate(commands, start=1):
        reply = "x" * (size * LARGE_BYTES)
        answered.add(f"m-{which}", reply, None)
        sessions.add(f"{which % 6 + 1}-00000000", place, reply, None)

    large = {entry[0]: entry[1] for entry in answered.to_document() if len(entry[1]) >= LARGE_BYTES}
    held = answered._large._sizes if answered._large is not None else {}
    assert held == {message_id: len(reply) for message_id, reply in large.items()}
    replies = [entry[1] for _, _, entries in sessions.to_document()["known"] for entry in entries]
    of_sessions = sum(len(reply) for reply in replies if len(reply) >= LARGE_BYTES)
    assert (sessions._large._bytes if sessions._large is not None else 0) == of_sessions
