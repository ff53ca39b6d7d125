"""The judge of a run: every promise of the protocol that its history and its evidence show broken, in words.

Each entry is unique and the log of an actor is the witness of the order in which its entries were applied, so nothing
has to be searched: sorting and one pass over each actor's story find

    doubled, invented                applied more than once, or though nobody sent it to this actor
    lost, wrong reply                acknowledged but not applied, or under another position than the sender was told
    rejected but applied             so is "not applied but applied"
    applied too early                `needs` was not there yet
    rejected on stale state          `needs` had been there for all to know before the command was sent
    real-time order                  applied before one that was acknowledged before this one was sent
    session order, session gap       numbers of one session applied out of order, or passed over
    early, torn or invented read     saw what was not sent yet, no prefix of the log, what was never applied
    stale read, stale session read   missed what it promises to see
    epoch fell                       somebody appended after a newer owner had
    record ...                       not over, or saying something else than the map
    left over                        as the evidence words it

A local read may be any prefix of the log. The loss of a quarantined actor is excused: what is left of its log must
still be right.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from tests.checker.history import Evidence, Operation, Outcome, RecordEnd
from tests.checker.story import Highest, Story
from workflows.records import TERMINAL, MigrationStatus

NAMED = 5  # of many missing numbers these are named, so that a message stays readable


def violations(operations: Sequence[Operation], evidence: Evidence) -> list[str]:
    """Every broken promise, by actor and then by kind; an empty list is a run without fault.

    O(n log n) in the operations, and linear in the entries that reads returned. Raises ValueError for a history that
    cannot be judged because an entry, or a message id of one actor, is used twice.
    """
    sent = _sent(operations)
    by_actor: dict[str, list[Operation]] = {actor: [] for actor in evidence.applied}
    for operation in operations:
        by_actor.setdefault(operation.actor, []).append(operation)
    found: list[str] = []
    for actor in sorted(by_actor):
        story = Story(actor, by_actor[actor], evidence.applied.get(actor, ()), actor in evidence.quarantined)
        found += _entries(story, sent)
        found += _outcomes(story)
        found += _needs(story)
        found += _real_time(story)
        found += _sessions(story)
        found += _reads(story, sent)
    found += _epochs(evidence.epochs)
    found += _records(evidence.records)
    found += [f"left over: {what}" for what in evidence.leftovers]
    return found


def _sent(operations: Sequence[Operation]) -> dict[str, Operation]:
    """Each command by its entry. Raises ValueError."""
    sent: dict[str, Operation] = {}
    ids: set[tuple[str, str]] = set()
    for operation in operations:
        if (operation.actor, operation.message_id) in ids:
            raise ValueError(f"message id {operation.message_id} is used twice: make retries one operation")
        ids.add((operation.actor, operation.message_id))
        if operation.kind == "command":
            if operation.entry in sent:
                raise ValueError(f"entry {operation.entry!r} is sent twice: entries must be unique in a run")
            sent[operation.entry] = operation
    return sent


# -- one actor's commands --------------------------------------------------------------------------------------------
def _entries(story: Story, sent: Mapping[str, Operation]) -> Iterator[str]:
    for entry, times in Counter(story.applied).items():
        if times > 1:
            yield f"doubled: {entry!r} was applied {times} times to {story.actor}"
        if entry not in sent:
            yield f"invented: {entry!r} was applied to {story.actor}, but nobody sent it"
        elif sent[entry].actor != story.actor:
            yield f"invented: {_told(sent[entry])} was applied to {story.actor}, but sent to {sent[entry].actor}"


def _outcomes(story: Story) -> Iterator[str]:
    for command in story.commands:
        position = story.position_of(command)
        match command.outcome:
            case Outcome.ACKNOWLEDGED if not position:
                if not story.quarantined:
                    yield f"lost: {_told(command)} was acknowledged, but {story.actor} does not have it"
            case Outcome.ACKNOWLEDGED if type(command.reply) is not int or command.reply != position:
                yield f"wrong reply: {_told(command)} is at {position} of {story.actor}, not {command.reply!r}"
            case Outcome.REJECTED | Outcome.NOT_APPLIED if position:
                yield f"{command.outcome} but applied: {_told(command)} is at {position} of {story.actor}"


def _needs(story: Story) -> Iterator[str]:
    for command in story.commands:
        if not command.needs:
            continue
        needed, position = story.position.get(command.needs, 0), story.position_of(command)
        if position and not 0 < needed < position:
            yield f"applied too early: {_told(command)} is in {story.actor} without {command.needs!r} before it"
        known, proof = story.known_before(command.invoked_s)
        if command.outcome is Outcome.REJECTED and proof is not None and 0 < needed <= known:
            yield (
                f"rejected on stale state: {_told(command)} needs {command.needs!r}, which {story.actor} had"
                f" according to {_told(proof)}"
            )


def _real_time(story: Story) -> Iterator[str]:
    """From the end of the log to its start: whoever comes earlier in it must not have been sent after an answer."""
    found: list[str] = []
    first_answered: Operation | None = None  # of those further on in the log
    first_answer_s = float("inf")
    for command in reversed(story.in_order()):
        if first_answered is not None and first_answer_s < command.invoked_s:
            found.append(
                f"real-time order: {_told(first_answered)} was acknowledged before {_told(command)} was sent,"
                f" but comes after it in {story.actor}"
            )
        returned_s = command.returned_s if command.outcome is Outcome.ACKNOWLEDGED else None
        if returned_s is not None and returned_s < first_answer_s:
            first_answered, first_answer_s = command, returned_s
    yield from reversed(found)


# -- sessions --------------------------------------------------------------------------------------------------------
def _sessions(story: Story) -> Iterator[str]:
    commands, reads = defaultdict[str, list[Operation]](list), defaultdict[str, list[Operation]](list)
    for command in story.commands:
        commands[command.session].append(command)
    for read in story.reads:
        reads[read.session].append(read)
    for session in sorted((commands.keys() | reads.keys()) - {""}):
        numbered = sorted(commands[session], key=lambda command: command.number)
        yield from _session_order(story, session, numbered)
        yield from _session_gap(story, session, numbered)
        yield from _session_reads(story, numbered, reads[session])


def _session_order(story: Story, session: str, numbered: Sequence[Operation]) -> Iterator[str]:
    latest: Operation | None = None  # the furthest in the log of the numbers so far
    for command in filter(story.position_of, numbered):
        if latest is not None and latest.number == command.number:
            yield (
                f"session order: {_told(latest)} and {_told(command)} were both applied to {story.actor}"
                f" as number {command.number} of session {session}"
            )
        elif latest is not None and story.position_of(command) < story.position_of(latest):
            yield (
                f"session order: {_told(command)}, number {command.number} of session {session}, was applied to"
                f" {story.actor} before number {latest.number}, {_told(latest)}"
            )
        if latest is None or story.position_of(command) > story.position_of(latest):
            latest = command


def _session_gap(story: Story, session: str, numbered: Sequence[Operation]) -> Iterator[str]:
    """A number counts as decided when it was applied, rejected, or may have been rejected without its sender hearing.

    Two commands may share a number when the first of them was surely not applied: its sender used the number again.
    """
    top, decided = 0, set[int]()
    for command in numbered:
        rejected = command.outcome is Outcome.REJECTED
        if story.position_of(command) or rejected or (command.needs and command.outcome is Outcome.UNKNOWN):
            decided.add(command.number)
        if story.position_of(command) or (rejected and not story.quarantined):
            top = command.number
    missing = [number for number in range(1, top) if number not in decided]
    if missing:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        named = ", ".join(map(str, missing[:NAMED]))
        yield (
            f"session gap: {story.actor} decided number {top} of session {session},"
            f" but passed over {named}{more} below it"
        )


def _session_reads(story: Story, numbered: Sequence[Operation], reads: Sequence[Operation]) -> Iterator[str]:
    applied = Highest([(command.number, story.position_of(command), command) for command in numbered])
    for read in reads:
        position, command = applied.at_most(read.after)
        if command is not None and len(read.reply) < position:
            yield (
                f"stale session read: {_told(read)} saw {len(read.reply)} entries of {story.actor} and missed"
                f" {_told(command)}, number {command.number} of its session {read.session}"
            )


# -- reads -----------------------------------------------------------------------------------------------------------
def _reads(story: Story, sent: Mapping[str, Operation]) -> Iterator[str]:
    newest: list[Operation | None] = [None]  # of the first n entries of the log the one that was sent last
    for entry in story.applied:
        command = sent.get(entry)
        newest.append(max(filter(None, (newest[-1], command)), key=lambda each: each.invoked_s, default=None))
    for read in story.malformed:
        yield f"wrong reply: {_told(read)} of {story.actor} got {read.reply!r} instead of a list of entries"
    for read in story.reads:
        seen = read.reply
        assert read.returned_s is not None  # it was acknowledged
        if not story.is_prefix(seen):
            yield from _not_a_prefix(story, read, sent)
        elif (last := newest[len(seen)]) is not None and last.invoked_s > read.returned_s:
            yield f"early read: {_told(read)} saw {_told(last)} in {story.actor} before it was sent"
        known, proof = story.known_before(read.invoked_s)
        if read.linearizable and proof is not None and len(seen) < known:
            yield (
                f"stale read: {_told(read)} saw {len(seen)} entries of {story.actor}, which had {known} before"
                f" according to {_told(proof)}"
            )


def _not_a_prefix(story: Story, read: Operation, sent: Mapping[str, Operation]) -> Iterator[str]:
    seen, applied = read.reply, story.applied
    if story.quarantined and seen[: len(applied)] == applied:
        # The log lost its end after it was read; what was read there is gone, but it must have been sent by then.
        invented = [entry for entry in seen[len(applied) :] if not _sent_before(read, sent.get(entry))]
    else:
        invented = [entry for entry in seen if entry not in story.position]
        if not invented:
            at = next(i for i, entry in enumerate(seen) if i >= len(applied) or entry != applied[i])
            instead = repr(applied[at]) if at < len(applied) else "nothing"
            yield f"torn read: {_told(read)} saw {seen[at]!r} at {at + 1} of {story.actor}, whose log has {instead}"
    if invented:
        yield f"invented read: {_told(read)} saw {invented[0]!r} in {story.actor}, which never was applied to it"


def _sent_before(read: Operation, command: Operation | None) -> bool:
    assert read.returned_s is not None  # it was acknowledged
    return command is not None and command.actor == read.actor and command.invoked_s <= read.returned_s


# -- logs and moves --------------------------------------------------------------------------------------------------
def _epochs(epochs: Mapping[str, Sequence[int]]) -> Iterator[str]:
    for actor in sorted(epochs):
        for index, (before, after) in enumerate(pairwise(epochs[actor]), start=2):
            if after < before:
                yield f"epoch fell: message {index} in the log of {actor} has epoch {after}, the one before it {before}"


def _records(records: Sequence[RecordEnd]) -> Iterator[str]:
    for record in records:
        what = f"move {record.id} of {record.unit}"
        if record.status not in TERMINAL:
            yield f"record not over: {what} is still {record.status}"
        elif (record.status == MigrationStatus.COMPLETED) != (record.outcome == "committed"):
            wrote = f"wrote {record.outcome}" if record.outcome else "never named it"
            yield f"record contradicts the map: {what} is {record.status}, but the map {wrote}"


# -- words -----------------------------------------------------------------------------------------------------------
def _told(operation: Operation) -> str:
    """An operation in a message: what, whose, and when, so that it is found in a trace."""
    what = repr(operation.entry) if operation.kind == "command" else f"read {operation.message_id}"
    end = "" if operation.returned_s is None else f"{operation.returned_s:.6f}"
    return f"{what} of {operation.sender} ({operation.invoked_s:.6f}..{end} s)"
