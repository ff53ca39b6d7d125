"""One actor's part of a run, arranged so that each check is one pass or one look-up."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

from tests.checker.history import Operation, Outcome


class Story:
    """What was asked of one actor, and what became of it."""

    def __init__(self, actor: str, operations: Sequence[Operation], applied: Sequence[str], quarantined: bool) -> None:
        self.actor = actor
        self.applied = list(applied)
        self.quarantined = quarantined
        self.commands = [operation for operation in operations if operation.kind == "command"]
        answered = [each for each in operations if each.kind == "query" and each.outcome is Outcome.ACKNOWLEDGED]
        self.reads = [read for read in answered if _is_entries(read.reply)]
        self.malformed = [read for read in answered if not _is_entries(read.reply)]
        self.position: dict[str, int] = {}  # of each entry, from 1 up; a doubled one counts where it came first
        for position, entry in enumerate(self.applied, start=1):
            self.position.setdefault(entry, position)
        self._proofs = self._collect_proofs()

    def position_of(self, command: Operation) -> int:
        """Where the command was applied; 0: nowhere."""
        return self.position.get(command.entry, 0)

    def in_order(self) -> list[Operation]:
        """The applied commands in the order of the log."""
        return sorted(filter(self.position_of, self.commands), key=self.position_of)

    def is_prefix(self, seen: Sequence[str]) -> bool:
        return self.applied[: len(seen)] == seen

    def known_before(self, at_s: float) -> tuple[int, Operation | None]:
        """How far the log was known to reach before `at_s`, and who proves it: what returned by then had seen it."""
        return self._proofs.at_most(at_s, strictly=True)

    def _collect_proofs(self) -> Highest:
        proofs = [
            (command.returned_s, self.position_of(command), command)
            for command in self.commands
            if command.outcome is Outcome.ACKNOWLEDGED and command.returned_s is not None
        ]
        proofs += [
            (read.returned_s, len(read.reply), read)
            for read in self.reads
            if read.returned_s is not None and self.is_prefix(read.reply)
        ]
        return Highest(proofs)


class Highest:
    """The highest position, and whose it is, among those of a key up to a given one."""

    def __init__(self, keyed: Sequence[tuple[float, int, Operation]]) -> None:
        by_key = sorted(keyed, key=lambda each: each[0])
        self._keys = [key for key, _, _ in by_key]
        none: tuple[int, Operation | None] = (0, None)
        self._highest = list(
            accumulate(
                ((position, operation) for _, position, operation in by_key),
                lambda highest, each: each if each[0] > highest[0] else highest,
                initial=none,
            )
        )

    def at_most(self, key: float, *, strictly: bool = False) -> tuple[int, Operation | None]:
        """(0, None) when there is none."""
        return self._highest[(bisect_left if strictly else bisect_right)(self._keys, key)]


def _is_entries(reply: object) -> bool:
    return isinstance(reply, list) and all(isinstance(entry, str) for entry in reply)
