"""The judge itself: silent on good histories, and of each kind of violation it says exactly what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from routing.errors import Busy, HandlerFailed, InDoubt, Quarantined, Rejected, SessionExpired, Timeout, Unavailable
from runtime.actor import ActorClasses, run
from tests.checker.check import violations
from tests.checker.history import Evidence, Operation, Outcome, RecordEnd, outcome_of
from tests.checker.ledger import Ledger

K = "ledger/k"
READS = count(1)
TERMINAL_WITHOUT_COMMIT = ("rolled_back", "failed", "cancelled")


def command(entry: str, span: tuple[float, float | None], reply: int | Outcome, **more: Any) -> Operation:
    """A command to `K`, invoked and returned at `span`: acknowledged with a position, or with another outcome."""
    told = reply if isinstance(reply, Outcome) else Outcome.ACKNOWLEDGED
    fields: dict[str, Any] = {"message_id": entry, "actor": K, "sender": "c1", "kind": "command", "entry": entry}
    fields |= {"invoked_s": span[0], "returned_s": span[1], "outcome": told, "reply": None if told is reply else reply}
    return Operation(**(fields | more))


def read(seen: Any, span: tuple[float, float], **more: Any) -> Operation:
    """A read of `K` that was answered with `seen`."""
    fields: dict[str, Any] = {"message_id": f"read-{next(READS)}", "actor": K, "sender": "c2", "kind": "query"}
    fields |= {"invoked_s": span[0], "returned_s": span[1], "outcome": Outcome.ACKNOWLEDGED, "reply": seen}
    return Operation(**(fields | more))


def judged(
    operations: Sequence[Operation], applied: Sequence[str] | Mapping[str, Sequence[str]], **more: Any
) -> list[str]:
    """The violations, each cut down to its kind."""
    by_actor = applied if isinstance(applied, Mapping) else {K: applied}
    return [what.split(":")[0] for what in violations(operations, Evidence(applied=by_actor, **more))]


A = command("a", (1, 2), 1)
B = command("b", (3, 4), 2)
C = command("c", (5, 6), 3)
UNKNOWN = Outcome.UNKNOWN


# -- good histories --------------------------------------------------------------------------------------------------
def test_a_run_without_fault_has_no_violation() -> None:
    """Acknowledged, rejected, unknown both ways, concurrent, local and linearizable reads, moves of each end."""
    operations = [
        A, B,
        command("later", (1, None), UNKNOWN),  # never returned, and was applied long afterwards
        command("never", (1, 9), UNKNOWN),
        command("refused", (3, 4), Outcome.REJECTED),
        command("timed out", (3, 4), Outcome.NOT_APPLIED),
        command("elsewhere", (1, 2), 1, actor="ledger/other"),
        read([], (7, 8)), read(["a"], (7, 8)), read(["a", "b"], (7, 8), linearizable=True),
        read(["a", "b", "later"], (10, 11), linearizable=True),
        replace(read(None, (1, 2)), outcome=UNKNOWN),
    ]  # fmt: skip
    records = [RecordEnd(id="m1", unit="shard.0", status="completed", outcome="committed")]
    for status in TERMINAL_WITHOUT_COMMIT:
        records.append(RecordEnd(id=status, unit="shard.0", status=status, outcome="aborted"))
        records.append(RecordEnd(id=status, unit="shard.0", status=status, outcome=None))
    evidence = Evidence(
        applied={K: ["a", "b", "later"], "ledger/other": ["elsewhere"]}, epochs={K: [1, 1, 2, 5, 5]}, records=records
    )

    assert violations(operations, evidence) == []


def test_concurrent_commands_may_be_applied_either_way() -> None:
    """`b` runs beside both others, and returns in the instant in which `c` is sent; `a` does return before `c`."""
    operations = [command("a", (1, 3), 3), command("b", (2, 4), 2), command("c", (4, 5), 1)]

    assert judged(operations, ["c", "b", "a"]) == ["real-time order"]
    assert judged(operations[1:], ["c", "b"]) == []
    assert judged([replace(operations[0], reply=2), replace(operations[1], reply=1)], ["b", "a"]) == []


def test_a_command_of_unknown_outcome_may_be_applied_after_it_returned() -> None:
    """The sender gave up at 2; an append that was on its way landed after what was sent and acknowledged at 3..4."""
    operations = [command("a", (1, 2), UNKNOWN), command("b", (3, 4), 1)]

    assert judged(operations, ["b", "a"]) == []


def test_a_session_may_use_the_number_of_a_command_that_surely_was_not_applied_again() -> None:
    operations = [
        command("a", (1, 2), Outcome.NOT_APPLIED, session="s", number=1),
        command("b", (3, 4), 1, session="s", number=1),
        command("c", (5, 6), Outcome.REJECTED, session="s", number=2),
        command("d", (7, 8), UNKNOWN, needs="x", session="s", number=3),  # it may have been rejected
        command("e", (7, 9), 2, session="s", number=4),
        command("f", (7, 9), UNKNOWN, session="s", number=5),
        read(["b"], (7, 8), session="s", after=3),
        read(["b", "e"], (9, 10), session="s", after=4),
    ]

    assert judged(operations, ["b", "e"]) == []


def test_the_losses_of_a_quarantined_actor_are_excused() -> None:
    """It says that its log lost its end; what was acknowledged or read there is gone, and nobody claims otherwise."""
    operations = [
        A, B, read(["a", "b"], (5, 6), linearizable=True),
        command("x", (5, 6), Outcome.REJECTED, session="s", number=2),
        command("y", (5, 6), UNKNOWN, session="s", number=1),
    ]  # fmt: skip

    assert judged(operations, ["a"]) == ["lost", "session gap", "invented read"]
    assert judged(operations, ["a"], quarantined=[K]) == []


def test_a_quarantined_actor_is_still_held_to_what_is_left() -> None:
    """Nothing doubled or overtaken in what is left, and reads saw just that and then what had been sent by then."""
    operations = [A, B, C, read(["a", "ghost"], (5, 6)), read(["b"], (5, 6)), read(["a", "b"], (1, 2))]
    operations += [command("elsewhere", (1, None), UNKNOWN, actor="ledger/other"), read(["a", "elsewhere"], (5, 6))]

    assert judged(operations, ["a"], quarantined=[K]) == ["invented read"] * 4
    assert judged([A, B, read(["b"], (5, 6))], ["a", "b", "a"], quarantined=[K]) == ["doubled", "torn read"]


# -- commands --------------------------------------------------------------------------------------------------------
def test_an_acknowledged_command_that_is_not_in_the_log_is_lost() -> None:
    assert judged([A, B], ["a"]) == ["lost"]
    assert judged([A], {}) == ["lost"]


def test_a_message_names_what_was_lost_whose_it_was_and_when() -> None:
    assert violations([A], Evidence(applied={})) == [
        "lost: 'a' of c1 (1.000000..2.000000 s) was acknowledged, but ledger/k does not have it"
    ]


def test_an_entry_that_is_in_the_log_twice_is_doubled() -> None:
    assert judged([A, command("b", (3, 4), 3)], ["a", "a", "b"]) == ["doubled"]


def test_an_entry_that_nobody_sent_is_invented() -> None:
    assert judged([A], ["a", "ghost"]) == ["invented"]


def test_an_entry_that_was_sent_to_another_actor_is_invented_here_and_lost_there() -> None:
    assert judged([A], {"ledger/other": ["a"]}) == ["lost", "invented"]


def test_a_rejected_command_must_not_be_applied() -> None:
    assert judged([command("a", (1, 2), Outcome.REJECTED)], ["a"]) == ["rejected but applied"]


def test_a_command_reported_as_not_applied_must_not_be_applied() -> None:
    assert judged([command("a", (1, 2), Outcome.NOT_APPLIED)], ["a"]) == ["not applied but applied"]


@pytest.mark.parametrize("reply", [0, 2, True, "1", None])
def test_a_reply_must_be_the_position_of_the_entry(reply: Any) -> None:
    assert judged([replace(A, reply=reply)], ["a"]) == ["wrong reply"]


def test_a_command_must_not_be_applied_before_what_it_needs() -> None:
    late = command("b", (1, 2), 1, needs="a")

    assert judged([command("a", (1, 2), 2), late], ["b", "a"]) == ["applied too early"]
    assert judged([late], ["b"]) == ["applied too early"]
    assert judged([A, command("b", (3, 4), 2, needs="a")], ["a", "b"]) == []


def test_a_rejection_must_not_be_decided_on_a_state_that_was_known_to_be_over() -> None:
    """A zombie would reject because it never saw `a`; both a reply and a read prove that `a` was there."""
    refused = command("b", (3, 4), Outcome.REJECTED, needs="a")
    unanswered = command("a", (1, None), UNKNOWN)

    assert judged([A, refused], ["a"]) == ["rejected on stale state"]
    assert judged([unanswered, read(["a"], (1, 2)), refused], ["a"]) == ["rejected on stale state"]
    assert judged([unanswered, refused], ["a"]) == []
    assert judged([A, replace(refused, invoked_s=2)], ["a"]) == []


# -- order -----------------------------------------------------------------------------------------------------------
def test_a_command_must_not_overtake_one_that_was_acknowledged_before_it_was_sent() -> None:
    late = replace(A, reply=2)

    assert judged([late, replace(B, reply=1)], ["b", "a"]) == ["real-time order"]
    assert judged([late, command("b", (3, None), UNKNOWN)], ["b", "a"]) == ["real-time order"]
    assert judged([replace(A, reply=3), B, replace(C, reply=1)], ["c", "b", "a"]) == ["real-time order"] * 2


def test_commands_of_one_session_must_not_be_applied_out_of_order() -> None:
    first = command("a", (1, 9), 2, session="s", number=1)
    second = command("b", (1, 9), 1, session="s", number=2)

    assert judged([second, first], ["b", "a"]) == ["session order"]
    assert judged([replace(second, session="other", number=1), first], ["b", "a"]) == []


def test_a_number_of_a_session_must_not_be_applied_twice() -> None:
    first = command("a", (1, 9), 1, session="s", number=1)

    assert judged([first, command("b", (1, 9), 2, session="s", number=1)], ["a", "b"]) == ["session order"]


@pytest.mark.parametrize("outcome", [UNKNOWN, Outcome.NOT_APPLIED])
def test_a_session_must_not_pass_over_a_number(outcome: Outcome) -> None:
    passed_over = command("a", (1, 9), outcome, session="s", number=1)

    assert judged([passed_over, command("b", (1, 9), 1, session="s", number=2)], ["b"]) == ["session gap"]
    refused = command("b", (1, 9), Outcome.REJECTED, session="s", number=2)
    assert judged([passed_over, refused], []) == ["session gap"]


def test_a_session_gap_names_the_first_of_many_missing_numbers() -> None:
    [found] = violations([command("a", (1, 2), 1, session="s", number=9)], Evidence(applied={K: ["a"]}))

    assert "number 9 of session s, but passed over 1, 2, 3, 4, 5 and 3 more" in found


# -- reads -----------------------------------------------------------------------------------------------------------
def test_a_linearizable_read_must_see_what_was_acknowledged_or_read_before_it_was_sent() -> None:
    stale = read(["a"], (7, 8), linearizable=True)
    unanswered = command("b", (3, None), UNKNOWN)

    assert judged([A, B, stale], ["a", "b"]) == ["stale read"]
    assert judged([A, unanswered, read(["a", "b"], (4, 5)), stale], ["a", "b"]) == ["stale read"]
    assert judged([A, unanswered, stale], ["a", "b"]) == []
    assert judged([A, B, replace(stale, invoked_s=4)], ["a", "b"]) == []
    assert judged([A, B, replace(stale, linearizable=False)], ["a", "b"]) == []


def test_a_read_in_a_session_must_see_the_commands_of_the_session_before_it() -> None:
    writes = [replace(A, session="s", number=1), replace(B, session="s", number=2)]
    blind = read(["a"], (7, 8), session="s", after=2)

    assert judged([*writes, blind], ["a", "b"]) == ["stale session read"]
    assert judged([*writes, replace(blind, after=1)], ["a", "b"]) == []


@pytest.mark.parametrize("seen", [["b"], ["b", "a"], ["a", "a"], ["a", "b", "a"]])
def test_a_read_must_see_a_prefix_of_the_log(seen: list[str]) -> None:
    assert judged([A, B, read(seen, (7, 8))], ["a", "b"]) == ["torn read"]


def test_a_torn_read_proves_nothing_about_other_reads() -> None:
    unanswered = command("b", (1, None), UNKNOWN)
    operations = [A, unanswered, read(["b", "a"], (3, 4)), read(["a"], (5, 6), linearizable=True)]

    assert judged(operations, ["a", "b"]) == ["torn read"]


def test_a_read_must_not_see_what_was_never_applied() -> None:
    assert judged([A, read(["a", "ghost"], (7, 8))], ["a"]) == ["invented read"]
    rolled_back = command("b", (3, None), UNKNOWN)
    assert judged([A, rolled_back, read(["a", "b"], (7, 8))], ["a"]) == ["invented read"]


def test_a_read_must_not_see_what_was_sent_after_it_returned() -> None:
    assert judged([A, B, read(["a", "b"], (1, 2))], ["a", "b"]) == ["early read"]
    assert judged([A, B, read(["a", "b"], (1, 3))], ["a", "b"]) == []
    unanswered = command("c", (1, None), UNKNOWN)
    assert judged([replace(B, reply=1), unanswered, read(["b", "c"], (1, 2))], ["b", "c"]) == ["early read"]


@pytest.mark.parametrize("seen", [None, "a", ["a", 1], [["a"]]])
def test_a_read_must_get_a_list_of_entries(seen: Any) -> None:
    assert judged([A, read(seen, (7, 8), linearizable=True)], ["a"]) == ["wrong reply"]


# -- logs and moves --------------------------------------------------------------------------------------------------
def test_the_epoch_of_a_log_must_not_fall() -> None:
    assert judged([], {}, epochs={K: [1, 3, 2, 3]}) == ["epoch fell"]


@pytest.mark.parametrize("status", ["planned", "acked", "nonsense"])
def test_a_record_must_reach_a_terminal_status(status: str) -> None:
    record = RecordEnd(id="m1", unit="shard.0", status=status, outcome="committed")

    assert judged([], {}, records=[record]) == ["record not over"]


@pytest.mark.parametrize(
    ("status", "outcome"),
    [("completed", "aborted"), ("completed", None), *((status, "committed") for status in TERMINAL_WITHOUT_COMMIT)],
)
def test_a_record_must_not_contradict_the_map(status: str, outcome: Any) -> None:
    record = RecordEnd(id="m1", unit="shard.0", status=status, outcome=outcome)

    assert judged([], {}, records=[record]) == ["record contradicts the map"]


def test_whatever_is_left_over_is_a_violation_in_its_own_words() -> None:
    evidence = Evidence(applied={}, leftovers=["shard.0 is paused on n1"])

    assert violations([], evidence) == ["left over: shard.0 is paused on n1"]


def test_violations_are_sorted_by_actor_and_do_not_depend_on_the_order_of_the_evidence() -> None:
    operations = [A, replace(A, actor="ledger/j", message_id="x", entry="x")]

    found = violations(operations, Evidence(applied={K: [], "ledger/j": []}))

    assert found == violations(operations[::-1], Evidence(applied={"ledger/j": [], K: []}))
    assert ["ledger/j" in what for what in found] == [True, False]


# -- what cannot be judged -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("twin", [replace(A, message_id="other"), replace(A, entry="other")])
def test_a_history_with_an_entry_or_a_message_id_used_twice_is_refused(twin: Operation) -> None:
    with pytest.raises(ValueError, match="twice"):
        violations([A, twin], Evidence(applied={}))


@pytest.mark.parametrize(
    "nonsense", [{"entry": ""}, {"returned_s": None}, {"returned_s": 0.5}, {"session": "s"}, {"number": 1}]
)
def test_an_operation_that_contradicts_itself_is_refused(nonsense: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        replace(A, **nonsense)


@pytest.mark.parametrize(
    ("error", "outcome", "after_doubt"),
    [
        (None, Outcome.ACKNOWLEDGED, Outcome.ACKNOWLEDGED),
        (Rejected("no"), Outcome.REJECTED, Outcome.REJECTED),
        (HandlerFailed("no"), Outcome.REJECTED, Outcome.REJECTED),
        (Timeout("no"), Outcome.NOT_APPLIED, UNKNOWN),
        (Unavailable("no"), Outcome.NOT_APPLIED, UNKNOWN),
        *((error("?"), UNKNOWN, UNKNOWN) for error in (InDoubt, Quarantined, SessionExpired, Busy, ConnectionError)),
    ],
)
def test_only_errors_that_promise_it_count_as_not_applied(
    error: Exception | None, outcome: Outcome, after_doubt: Outcome
) -> None:
    """A Timeout after an earlier call in doubt speaks of the latest call alone: the earlier one may have applied it."""
    assert outcome_of(error) is outcome
    assert outcome_of(error, in_doubt_before=True) is after_doubt


# -- the actor -------------------------------------------------------------------------------------------------------
async def test_the_ledger_replies_positions_and_rejects_what_lacks_its_need() -> None:
    classes = ActorClasses.load(["tests.checker.ledger"])
    ledger, emitted = Ledger(), list[list[Any]]()

    async def ask(name: str, **arguments: Any) -> Any:
        return await run(ledger, classes.handler(Ledger.actor_type, name), arguments, emitted)

    assert await ask("write", entry="a") == 1
    assert await ask("write_slowly", entry="b", delay_s=0) == 2
    assert await ask("write_after", entry="c", needs="b") == 3
    with pytest.raises(Rejected):
        await ask("write_after", entry="d", needs="x")
    assert await ask("read") == ["a", "b", "c"]
    assert emitted == [["written", {"entry": entry}] for entry in "abc"]
