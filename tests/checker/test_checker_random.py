"""The judge on random runs: silent on correct ones, and no corruption of one goes unnoticed.

Each corruption lists, by brute force over pairs, every way in which it can spoil a run, and one of them is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.checker.check import violations
from tests.checker.history import Operation, Outcome
from tests.checker.random_run import ACTORS, RandomRun, Run

Corruption = Callable[[Run], Iterator[Run]]
CORRUPTIONS: dict[str, tuple[str, Corruption]] = {}  # by name: the violation it must cause, and how it is done
UNHURRIED = settings(deadline=None, derandomize=True, max_examples=30)  # the same examples in every run
SEEDS = st.integers(min_value=0, max_value=2**32)


@settings(UNHURRIED, max_examples=200)
@given(seed=SEEDS, steps=st.integers(min_value=0, max_value=200))
def test_a_correct_run_has_no_violation(seed: int, steps: int) -> None:
    run = RandomRun(Random(seed)).play(steps)

    assert violations(run.operations, run.evidence) == []


def test_a_correct_run_of_thousands_of_operations_has_no_violation() -> None:
    run = RandomRun(Random(1)).play(20_000)

    assert len(run.operations) > 5_000
    assert violations(run.operations, run.evidence) == []


def corruption(kind: str) -> Callable[[Corruption], Corruption]:
    """Registers a way to spoil a run that must be noticed as `kind`."""

    def register(spoil: Corruption) -> Corruption:
        CORRUPTIONS[spoil.__name__] = (kind, spoil)
        return spoil

    return register


# -- the log is not what the senders were told -----------------------------------------------------------------------
@corruption("lost")
def forget_an_acknowledged_entry(run: Run) -> Iterator[Run]:
    for command in applied_commands(run):
        if command.outcome is Outcome.ACKNOWLEDGED:
            yield with_log(run, command.actor, [entry for entry in log_of(run, command) if entry != command.entry])


@corruption("doubled")
def apply_an_entry_again(run: Run) -> Iterator[Run]:
    for command in applied_commands(run):
        for at in range(len(log_of(run, command)) + 1):
            yield with_log(run, command.actor, inserted(log_of(run, command), at, command.entry))


@corruption("invented")
def apply_what_nobody_sent(run: Run) -> Iterator[Run]:
    for actor in ACTORS:
        for at in range(len(run.evidence.applied[actor]) + 1):
            yield with_log(run, actor, inserted(run.evidence.applied[actor], at, "ghost"))


@corruption("invented")
def apply_an_entry_to_another_actor(run: Run) -> Iterator[Run]:
    for command in applied_commands(run):
        [other] = set(ACTORS) - {command.actor}
        yield with_log(run, other, [*run.evidence.applied[other], command.entry])


@corruption("rejected but applied")
def say_rejected_of_an_applied_command(run: Run) -> Iterator[Run]:
    for command in applied_commands(run):
        if command.returned_s is not None:
            yield changed(run, command, outcome=Outcome.REJECTED, reply=None)


@corruption("not applied but applied")
def say_not_applied_of_an_applied_command(run: Run) -> Iterator[Run]:
    for command in applied_commands(run):
        if command.returned_s is not None:
            yield changed(run, command, outcome=Outcome.NOT_APPLIED, reply=None)


@corruption("wrong reply")
def reply_another_position(run: Run) -> Iterator[Run]:
    for command in applied_commands(run):
        if command.outcome is Outcome.ACKNOWLEDGED:
            yield changed(run, command, reply=command.reply + 1)
            yield changed(run, command, reply=command.reply - 1)


# -- the log is in another order -------------------------------------------------------------------------------------
@corruption("real-time order")
def swap_two_commands_that_followed_each_other(run: Run) -> Iterator[Run]:
    for first, second in applied_pairs(run):
        if first.outcome is Outcome.ACKNOWLEDGED and returned_before(first, second):
            yield with_swapped(run, first, second)


@corruption("session order")
def swap_two_commands_of_a_session(run: Run) -> Iterator[Run]:
    for first, second in applied_pairs(run):
        if first.session and first.session == second.session:
            yield with_swapped(run, first, second)


@corruption("session gap")
def drop_a_command_from_within_a_session(run: Run) -> Iterator[Run]:
    for first, second in applied_pairs(run):
        if first.session and first.session == second.session and not first.needs:
            yield with_log(run, first.actor, [entry for entry in log_of(run, first) if entry != first.entry])


@corruption("applied too early")
def swap_a_command_with_what_it_needs(run: Run) -> Iterator[Run]:
    for first, second in applied_pairs(run):
        if second.needs == first.entry:
            yield with_swapped(run, first, second)


@corruption("rejected on stale state")
def reject_what_must_have_been_accepted(run: Run) -> Iterator[Run]:
    refused = [operation for operation in run.operations if operation.outcome is Outcome.REJECTED]
    for command in refused:
        for needed in applied_commands(run):
            known = needed.outcome is Outcome.ACKNOWLEDGED and returned_before(needed, command)
            if needed.actor == command.actor and known:
                yield changed(run, command, needs=needed.entry)


# -- reads see something else ----------------------------------------------------------------------------------------
@corruption("stale read")
def miss_in_a_linearizable_read_what_was_acknowledged(run: Run) -> Iterator[Run]:
    for read in reads(run):
        for command in applied_commands(run):
            known = command.outcome is Outcome.ACKNOWLEDGED and returned_before(command, read)
            if read.linearizable and command.actor == read.actor and known:
                yield changed(run, read, reply=read.reply[: log_of(run, command).index(command.entry)])


@corruption("stale read")
def miss_in_a_linearizable_read_what_was_read_before(run: Run) -> Iterator[Run]:
    for read in reads(run):
        for earlier in reads(run):
            if read.linearizable and earlier.actor == read.actor and earlier.reply and returned_before(earlier, read):
                yield changed(run, read, reply=earlier.reply[:-1])


@corruption("stale session read")
def miss_in_a_read_an_earlier_command_of_its_session(run: Run) -> Iterator[Run]:
    for read in reads(run):
        for command in applied_commands(run):
            same = (command.actor, command.session) == (read.actor, read.session)
            if read.session and same and command.number <= read.after:
                yield changed(run, read, reply=read.reply[: log_of(run, command).index(command.entry)])


@corruption("early read")
def see_what_is_sent_later(run: Run) -> Iterator[Run]:
    for read in reads(run):
        for command in applied_commands(run):
            if command.actor == read.actor and returned_before(read, command):
                log = log_of(run, command)
                yield changed(run, read, reply=log[: log.index(command.entry) + 1])


@corruption("torn read")
def see_entries_in_another_order(run: Run) -> Iterator[Run]:
    for read in reads(run):
        for at in range(len(read.reply) - 1):
            yield changed(run, read, reply=swapped(read.reply, at, at + 1))
            yield changed(run, read, reply=[*read.reply[:at], *read.reply[at + 1 :]])
            yield changed(run, read, reply=inserted(read.reply, at, read.reply[-1]))


@corruption("invented read")
def see_what_was_never_applied(run: Run) -> Iterator[Run]:
    applied = {command.entry for command in applied_commands(run)}
    for read in reads(run):
        for entry in ["ghost", *(each.entry for each in run.operations if each.entry and each.entry not in applied)]:
            yield changed(run, read, reply=inserted(read.reply, len(read.reply) // 2, entry))


# -- logs and moves --------------------------------------------------------------------------------------------------
@corruption("epoch fell")
def let_an_epoch_fall(run: Run) -> Iterator[Run]:
    for actor, epochs in run.evidence.epochs.items():
        for at in range(len(epochs) - 1):
            if epochs[at] < epochs[at + 1]:
                yield with_evidence(run, epochs={**run.evidence.epochs, actor: swapped(epochs, at, at + 1)})


@corruption("record contradicts the map")
def turn_an_outcome_of_the_map_round(run: Run) -> Iterator[Run]:
    for at, record in enumerate(run.evidence.records):
        outcome: Any = "aborted" if record.outcome == "committed" else "committed"
        records = [*run.evidence.records[:at], replace(record, outcome=outcome), *run.evidence.records[at + 1 :]]
        yield with_evidence(run, records=records)


@corruption("record not over")
def leave_a_record_unfinished(run: Run) -> Iterator[Run]:
    for at, record in enumerate(run.evidence.records):
        records = [*run.evidence.records[:at], replace(record, status="acked"), *run.evidence.records[at + 1 :]]
        yield with_evidence(run, records=records)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupted_run_is_caught(name: str) -> None:
    """Whatever else the corruption breaks as well, the violation that it stands for is among those found."""
    kind, spoil = CORRUPTIONS[name]

    @UNHURRIED
    @given(seed=SEEDS, steps=st.integers(min_value=100, max_value=200))
    def caught(seed: int, steps: int) -> None:
        # given a correct run that can be spoilt in this way
        random = Random(seed)
        candidates = list(spoil(RandomRun(random).play(steps)))
        assume(candidates)

        # when it is
        run = random.choice(candidates)

        # then the judge says so
        assert kind in {what.split(":")[0] for what in violations(run.operations, run.evidence)}

    caught()


# -- taking runs apart and putting them together ---------------------------------------------------------------------
def log_of(run: Run, operation: Operation) -> Sequence[str]:
    return run.evidence.applied[operation.actor]


def applied_commands(run: Run) -> list[Operation]:
    """In the order of their logs."""
    sent = {operation.entry: operation for operation in run.operations if operation.kind == "command"}
    return [sent[entry] for entries in run.evidence.applied.values() for entry in entries]


def applied_pairs(run: Run) -> Iterator[tuple[Operation, Operation]]:
    """Any two applied commands of one actor, the earlier one first."""
    commands = applied_commands(run)
    for at, first in enumerate(commands):
        for second in commands[at + 1 :]:
            if first.actor == second.actor:
                yield first, second


def reads(run: Run) -> list[Operation]:
    return [each for each in run.operations if each.kind == "query" and each.outcome is Outcome.ACKNOWLEDGED]


def returned_before(first: Operation, second: Operation) -> bool:
    return first.returned_s is not None and first.returned_s < second.invoked_s


def changed(run: Run, operation: Operation, **changes: Any) -> Run:
    operations = [replace(each, **changes) if each is operation else each for each in run.operations]
    return replace(run, operations=operations)


def with_evidence(run: Run, **changes: Any) -> Run:
    return replace(run, evidence=replace(run.evidence, **changes))


def with_log(run: Run, actor: str, entries: Sequence[str]) -> Run:
    applied: Mapping[str, Sequence[str]] = {**run.evidence.applied, actor: entries}
    return with_evidence(run, applied=applied)


def with_swapped(run: Run, first: Operation, second: Operation) -> Run:
    log = log_of(run, first)
    return with_log(run, first.actor, swapped(log, log.index(first.entry), log.index(second.entry)))


def swapped(items: Sequence[Any], one: int, other: int) -> list[Any]:
    result = list(items)
    result[one], result[other] = result[other], result[one]
    return result


def inserted(items: Sequence[str], at: int, item: str) -> list[str]:
    return [*items[:at], item, *items[at:]]
