"""Correct runs by chance: a few actors that answer as the protocol promises, under senders that often do not hear it.

Each operation is invoked, decided and answered at moments of their own, so all orders that the promises allow occur:
an answer may be lost, a command may be applied long after its sender gave up, or never.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

from tests.checker.history import Evidence, Operation, Outcome, RecordEnd

SENDERS = ("c1", "c2", "c3")
ACTORS = ("ledger/k1", "ledger/k2")
SESSIONS = ("", "s1", "s2")
ENDS = (
    RecordEnd(id="", unit="shard.0", status="completed", outcome="committed"),
    RecordEnd(id="", unit="shard.0", status="rolled_back", outcome="aborted"),
    RecordEnd(id="", unit="shard.0", status="failed", outcome="aborted"),
    RecordEnd(id="", unit="shard.0", status="cancelled", outcome=None),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a checker is given."""

    operations: Sequence[Operation]
    evidence: Evidence


@dataclass
class _Open:
    """An operation under way: it has no answer, or the actor has not decided it, or both."""

    operation: Operation
    decided: bool = False
    returned: bool = False


@dataclass
class _Session:
    """One session of one actor."""

    sent: int = 0
    decided: int = 0
    position: int = 0  # of the latest entry it applied


@dataclass
class RandomRun:
    random: Random
    now_s: float = 0.0
    opened: list[_Open] = field(default_factory=list)
    done: list[_Open] = field(default_factory=list)
    applied: dict[str, list[str]] = field(default_factory=lambda: {actor: [] for actor in ACTORS})
    sessions: dict[tuple[str, str], _Session] = field(default_factory=dict)

    def play(self, steps: int) -> Run:
        for _ in range(steps):
            self.now_s += self.random.choice([0.0, 0.0, 0.0, 1.0])  # a coarse clock: much happens in one instant
            self.random.choice([self._invoke, self._decide, self._answer])()
        operations = [_as_heard(each.operation) for each in (*self.done, *self.opened)]
        self.random.shuffle(operations)
        return Run(operations=operations, evidence=self._evidence())

    def _invoke(self) -> None:
        actor, session = self.random.choice(ACTORS), self.random.choice(SESSIONS)
        numbers = self.sessions.setdefault((session, actor), _Session())
        name = f"x{len(self.done) + len(self.opened)}"
        operation = Operation(
            message_id=name, actor=actor, sender=session or self.random.choice(SENDERS), kind="query",
            invoked_s=self.now_s, returned_s=None, outcome=Outcome.UNKNOWN, session=session,
            after=numbers.sent if session else 0, linearizable=self.random.random() < 0.5,
        )  # fmt: skip
        if self.random.random() < 0.6:
            numbers.sent += 1
            operation = replace(
                operation, kind="command", entry=name, needs=self._need(actor), after=0, linearizable=False,
                number=numbers.sent if session else 0,
            )  # fmt: skip
        self.opened.append(_Open(operation))

    def _need(self, actor: str) -> str:
        """Now and then an entry that was applied, one that is on its way, or one that will never be."""
        under_way = [each.operation.entry for each in self.opened if each.operation.actor == actor]
        return self.random.choice(["", "", "", "nothing like it", *under_way[-1:], *self.applied[actor][-2:]])

    def _decide(self) -> None:
        """Let the actor decide one operation: a command in its session's order, a query on a state it may see."""
        ready = [each for each in self.opened if not each.decided and self._may_decide(each.operation)]
        if not ready:
            return
        chosen = self.random.choice(ready)
        chosen.decided = True
        operation, entries = chosen.operation, self.applied[chosen.operation.actor]
        session = self.sessions[operation.session, operation.actor]
        if operation.kind == "query":
            seen = len(entries)
            if not operation.linearizable:
                seen = self.random.randint(session.position if operation.session else 0, seen)
            chosen.operation = replace(operation, reply=entries[:seen])
        else:
            session.decided = operation.number
            if not operation.needs or operation.needs in entries:
                entries.append(operation.entry)
                session.position = len(entries)
                chosen.operation = replace(operation, reply=len(entries))
        self._close(chosen)

    def _may_decide(self, operation: Operation) -> bool:
        decided = self.sessions[operation.session, operation.actor].decided
        if operation.kind == "query" or not operation.session:
            return not operation.session or operation.after <= decided
        return operation.number == decided + 1

    def _answer(self) -> None:
        """Tell a sender how it went, or that nobody knows."""
        waiting = [each for each in self.opened if not each.returned]
        if not waiting:
            return
        chosen = self.random.choice(waiting)
        chosen.returned = True
        operation = chosen.operation
        session = self.sessions[operation.session, operation.actor]
        outcome = Outcome.UNKNOWN
        if chosen.decided and self.random.random() < 0.8:
            outcome = Outcome.REJECTED if operation.reply is None else Outcome.ACKNOWLEDGED
        elif not chosen.decided and operation.number in (0, session.sent) and self.random.random() < 0.5:
            outcome = Outcome.NOT_APPLIED  # surely: it is never decided, and a session uses its number again
            session.sent -= operation.number > 0
            chosen.decided = True
        chosen.operation = replace(operation, returned_s=self.now_s, outcome=outcome)
        self._close(chosen)

    def _close(self, chosen: _Open) -> None:
        if chosen.decided and chosen.returned:
            self.opened.remove(chosen)
            self.done.append(chosen)

    def _evidence(self) -> Evidence:
        return Evidence(
            applied={actor: list(entries) for actor, entries in self.applied.items()},
            epochs={actor: sorted(self.random.choices(range(9), k=9)) for actor in ACTORS},
            records=[replace(record, id=f"m{i}") for i, record in enumerate(self.random.choices(ENDS, k=4))],
        )


def _as_heard(operation: Operation) -> Operation:
    """Without the reply that the actor gave, unless it reached the sender."""
    return operation if operation.outcome is Outcome.ACKNOWLEDGED else replace(operation, reply=None)
