"""Everything that was ever stored, in order: logs that snapshots roll up later, and each value of the map."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from routing import shard_map
from routing.address import ActorId
from routing.documents import decode_ownership
from routing.errors import InvariantViolated
from routing.link import Entry
from routing.shard_map import Outcome, Ownership
from routing.subjects import actor_key, actor_of_key, shard_of_key
from runtime.journal import Kind, Record, decode_record


@dataclass(slots=True)
class ActorLog:
    """One actor's log as it was written: every record with its sequence, also those that were rolled up since."""

    unit: str = ""
    records: list[tuple[int, Record]] = field(default_factory=list)
    entries: list[str] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)

    def lost(self, sequence: int) -> None:
        """The server does not have this record any more; with a snapshot goes all that it had replaced."""
        index = next(index for index, (number, _) in enumerate(self.records) if number == sequence)
        replaced = self.records[index][1].kind is Kind.SNAPSHOT
        self.records = self.records[index + 1 :] if replaced else self.records[:index] + self.records[index + 1 :]
        self.entries = [entry for _, record in self.records for entry in written(record)]
        self.epochs = [record.epoch for _, record in self.records]


class Chronicle:
    """Told of every append by the server. `trace` is a digest of all of it, so that two runs can be compared."""

    def __init__(self, *, keep_lines: bool = False) -> None:
        self.logs: dict[str, ActorLog] = {}
        self.map: dict[str, Ownership] = {}
        self.outcomes: dict[str, Outcome] = {}  # move -> how the map says it ended
        self.locked: dict[str, None] = {}  # moves that ever held a lock
        self.served: dict[str, tuple[int, str]] = {}  # actor -> the highest epoch that answered for it, and whose
        self.begins: dict[str, int] = {}  # actor -> end of its log when its present owner became that
        self.on_commit: Callable[[Ownership], None] = lambda before: None  # told what COMMIT has just replaced
        self.problems: list[str] = []
        self.lines: list[str] | None = [] if keep_lines else None
        self._digest = hashlib.blake2b(digest_size=16)

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    def note(self, now_s: float, what: str) -> None:
        self._digest.update(f"{now_s:.9f} {what}\n".encode())
        if self.lines is not None:
            self.lines.append(f"{now_s:12.6f}  {what}")

    def on_append(self, now_s: float, entry: Entry) -> None:
        subject = entry.subject
        if "-leases." in subject:  # its payload names this very process and machine
            self.note(now_s, f"{entry.sequence} {subject} {'removed' if entry.removed else 'held'}")
            return
        self.note(now_s, f"{entry.sequence} {subject} {entry.payload.decode(errors='replace')[:400]}")
        if ".ev." in subject:
            self._on_record(subject, entry)
        elif (unit := unit_in(subject)) and not entry.removed:
            self._on_map(unit, decode_ownership(entry.payload))

    def on_answer(self, actor: str, unit: str, epoch: int, incarnation: str, version: int, told: str) -> None:
        """An owner, standing at `version` of an actor's log, has told somebody something about the actor.

        So nothing older may be stored from here on; and the owner by the map knows at least what was stored before the
        map made it the owner, whatever it is asked.
        """
        view, begins = self.map[unit], self.begins.get(actor, 0)
        if (view.epoch, view.incarnation) == (epoch, incarnation) and version < begins:
            self.problems.append(
                f"stale owner: {incarnation} told {told} of {actor} at version {version} of its log, which was at"
                f" {begins} when its epoch {epoch} began"
            )
        if told in ("a value", "Rejected") and epoch > self.served.get(actor, (0, ""))[0]:
            self.served[actor] = epoch, incarnation

    def _on_record(self, subject: str, entry: Entry) -> None:
        record = decode_record(entry.payload)
        actor = subject.rpartition(".")[2].replace("=", "/")
        epoch, incarnation = self.served.get(actor, (0, ""))
        if record.kind in (Kind.COMMAND, Kind.REJECTION) and record.epoch < epoch and record.incarnation != incarnation:
            self.problems.append(
                f"zombie: {record.incarnation} stored a {record.kind} of {actor} at epoch {record.epoch}, after"
                f" {incarnation} had answered at epoch {epoch}"
            )
        log = self.logs.setdefault(actor, ActorLog())
        log.unit = f"shard.{subject.split('.')[4]}"
        log.records.append((entry.sequence, record))
        log.epochs.append(record.epoch)
        log.entries += written(record)

    def _on_map(self, unit: str, after: Ownership) -> None:
        before = self.map.get(unit)
        try:
            shard_map.check(before, after)
        except InvariantViolated as error:
            self.problems.append(f"map of {unit}: {error}")
        self.map[unit] = after
        if before is not None and after.owner != before.owner:
            own = {actor for actor in self.logs if unit == actor_key(ActorId.parse(actor))}
            self._begin(own or {actor for actor, log in self.logs.items() if log.unit == unit} - {*dict(after.apart)})
        elif before is not None and before.apart != after.apart:
            self._begin({*dict(before.apart)} ^ {*dict(after.apart)})
        if after.move is not None:
            self.locked[after.move] = None
        if after.last is not None:
            if after.last.outcome is Outcome.COMMITTED and after.last.move not in self.outcomes and before is not None:
                self.on_commit(before)
            known = self.outcomes.setdefault(after.last.move, after.last.outcome)
            if known is not after.last.outcome:
                self.problems.append(f"map of {unit}: move {after.last.move} was {known}, then {after.last.outcome}")

    def _begin(self, actors: set[str]) -> None:
        """The map gives these actors to somebody, who must know all of their logs up to now."""
        known = ((actor, self.logs.get(actor)) for actor in sorted(actors))
        self.begins.update({actor: log.records[-1][0] for actor, log in known if log is not None and log.records})


def unit_in(subject: str) -> str:
    """The unit that a subject of the map is about; empty for all others."""
    _, _, key = subject.partition("-map.")
    return key if shard_of_key(key) is not None or actor_of_key(key) is not None else ""


def written(record: Record) -> list[str]:
    """The entries that a record adds to its ledger."""
    if record.kind is not Kind.COMMAND:
        return []
    return [values["entry"] for name, values in record.events if name == "written"]
