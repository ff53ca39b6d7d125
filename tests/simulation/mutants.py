"""The rules of the protocol, each switched off in production code: a simulation that does not notice proves nothing.

T1-T15 were first found by a model, S1-S3 by a simulation (docs/protocol.md names them beside the rules). Where another
rule covers for the one that is switched off, so that no promise breaks, the mutant switches off both and says so in
`covered_by`; the cover alone must then survive the same schedules (tests/simulation/__main__.py checks that).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from routing import shard_map
from routing.directory import Directory, MapEntry
from routing.errors import FerryError, InDoubt, NotApplicable, WrongSequence
from routing.link import Appended
from routing.shard_map import Ownership
from runtime import live_actor, rules
from runtime.catch_up import CatchUp
from runtime.handover import Handover
from runtime.host import Host
from runtime.journal import Journal, Kind, Record
from runtime.memory import Memory
from runtime.rules import Admission, Standing, Verdict
from runtime.unit import Unit, UnitState
from tests.simulation.profile import Profile
from workflows import settlement
from workflows.context import StepContext
from workflows.reconciler import Reconciler
from workflows.records import Move
from workflows.settlement import Settlement

Patch = contextlib.AbstractContextManager[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One rule switched off. `profile` is the weather in which its absence shows."""

    name: str
    rule: str
    patches: Callable[[], list[Patch]]
    profile: Profile
    symptom: str = ""  # what the violation has to begin with, where the cover alone shows others
    seed: int = 0  # known to notice it, when last looked
    covered_by: str = ""
    cover: Callable[[], list[Patch]] | None = None  # switches off the covering rule alone

    def notices(self, violations: Sequence[str]) -> str:
        """The first violation that tells of this mutant; empty when none does."""
        return next((violation for violation in violations if violation.startswith(self.symptom)), "")

    def applied(self) -> Patch:
        return _all(self.patches())

    def cover_applied(self) -> Patch:
        assert self.cover is not None
        return _all(self.cover())


@contextlib.contextmanager
def _all(patches: list[Patch]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


# -- weather -----------------------------------------------------------------------------------------------------------
_NODES_FAIL = Profile(
    shards=2, actors=2, commands=12, rough_s=7.0, fault_every_s=0.5, faults={"kill": 3, "stop": 3, "partition": 2},
    victims={"node": 1}, slow_handlers=0.3, move_every_s=2.0, lost=0.01, lost_answer=0.02, late=0.02, sessions=0.0,
)  # fmt: skip
_NETWORK_FAILS = Profile(
    shards=2, actors=2, commands=14, lost=0.02, lost_answer=0.06, late=0.06, doubled=0.06, late_s=1.5, sessions=0.0,
    fault_every_s=3.0,
)  # fmt: skip
_ONE_SHARD = Profile(
    shards=1, actors=1, commands=3, rough_s=7.0, move_every_s=0.1, fault_every_s=0.4, faults={"kill": 1, "redis": 1},
    victims={"worker": 1}, tasks_late=0.1, lost_answer=0.05,
)  # fmt: skip
_LAGGING = Profile(
    shards=1, actors=1, senders=4, commands=20, rough_s=9.0, fault_every_s=0.8,
    faults={"stop": 3, "partition": 1, "cut": 1}, victims={"node": 1}, slow_handlers=0.2, move_every_s=1.0,
    sessions=0.0, lagging=0.3, lag_s=5.0, laggards=("node", "sender"),
)  # fmt: skip
_COMMIT_LATE = Profile(
    shards=1, actors=2, senders=5, commands=40, rough_s=12.0, fault_every_s=float("inf"), astray=0.7, lagging=0.2,
    lag_s=3.0, laggards=("sender",), move_every_s=0.4, sessions=0.0,
)  # fmt: skip
_SKIPPED = Profile(
    shards=1, actors=4, nodes=3, senders=4, commands=20, rough_s=8.0, fault_every_s=0.25, faults={"lease": 1},
    move_every_s=10.0, sessions=0.0, lagging=0.3, lag_s=3.0,
    laggards=("node",),
)  # fmt: skip
_DEPOSED = Profile(
    shards=1, actors=1, commands=2, workers=3, rough_s=14.0, stale_by_at_least=3, move_every_s=0.3,
    fault_every_s=float("inf"), ambush=0.4, more={"task_time_limit_s": 4.2, "visibility_timeout_s": 4.5},
)  # fmt: skip
_TASKS_FAIL = Profile(
    shards=3, tasks_lost=0.15, tasks_doubled=0.2, tasks_late=0.2, move_every_s=0.3, fault_every_s=0.6,
    faults={"kill": 1, "stop": 1}, victims={"worker": 1}, commands=4, rough_s=6.0,
)  # fmt: skip
_PINS = Profile(
    shards=1, actors=2, senders=4, commands=25, rough_s=8.0, move_every_s=0.1, pins=0.8, slow_handlers=0.4,
    fault_every_s=1.5, faults={"kill": 1, "stop": 2, "partition": 1}, victims={"node": 1}, late=0.02,
)  # fmt: skip
_IN_PIECES = replace(_NETWORK_FAILS, snapshot_every=4, snapshot_piece_bytes=100, lost=0.06)
_MOVES = Profile(shards=2, actors=2, commands=14, move_every_s=0.12, sessions=1.0, fault_every_s=2.0, late=0.03)


# -- what is switched off ----------------------------------------------------------------------------------------------
def _t1() -> list[Patch]:
    return [mock.patch.object(rules, "must_claim", return_value=False)]


def _t2() -> list[Patch]:
    real = rules.compare

    def compare(**values: int) -> Standing:
        return real(**{**values, "tail_epoch": 0})

    return [mock.patch.object(rules, "compare", compare)]


def _t3() -> list[Patch]:
    def replay(instance: Any, memory: Memory, record: Record) -> None:
        for name, values in record.events:
            instance.apply(name, values)

    return [
        mock.patch.object(live_actor, "replay", replay),
        mock.patch.object(Memory, "from_document", lambda document, limits: Memory(limits)),
    ]


def _t4() -> list[Patch]:
    real = Journal.append

    async def append(self: Journal, actor: Any, record: Record, *, after: int) -> int:
        try:
            return await real(self, actor, record, after=after)
        except (WrongSequence, InDoubt):
            if record.kind is not Kind.COMMAND:
                raise
            tail = await self.tail(actor)
            return await real(self, actor, record, after=tail[0] if tail else 0)

    at_once, again = Journal.append_then, set()

    def append_then(self: Journal, actor: Any, record: Record, *, after: int, then: Appended) -> None:
        async def send_again() -> None:
            try:
                then(await append(self, actor, record, after=after))
            except FerryError as error:
                then(error)

        def ended(outcome: int | FerryError) -> None:
            if isinstance(outcome, WrongSequence | InDoubt):
                again.add(asyncio.ensure_future(send_again()))
            else:
                then(outcome)

        at_once(self, actor, record, after=after, then=ended)

    return [mock.patch.object(Journal, "append", append), mock.patch.object(Journal, "append_then", append_then)]


def _t5() -> list[Patch]:
    async def write_commit(self: Any, request: Any, heir: str) -> None:
        entry = await self._directory.refresh(request.unit)
        after = shard_map.commit(entry.ownership, move=request.move, incarnation=self._host.incarnation, heir=heir)
        self._directory._adopt(request.unit, MapEntry(after, entry.revision + 1))

    return [mock.patch.object(Handover, "_write_commit", write_commit)]


def _no_reconciler() -> Patch:
    real = Reconciler._drive_on

    async def drive_on(self: Reconciler, move: Move, *, locked: bool) -> None:
        if not locked:
            await real(self, move, locked=locked)

    return mock.patch.object(Reconciler, "_drive_on", drive_on)


def _overdue(*, paused: bool, locked: bool) -> Patch:
    real = rules.overdue

    def overdue(**values: Any) -> str | None:
        if not paused:
            values["paused"] = None
        if not locked:
            values["locked"] = None
        return real(**values)

    return mock.patch.object(rules, "overdue", overdue)


def _t6() -> list[Patch]:
    return [_overdue(paused=False, locked=True), _no_reconciler()]


def _t7() -> list[Patch]:
    real = rules.judge

    def judge(view: Ownership, *, incarnation: str, **values: Any) -> Verdict:
        return real(view, incarnation=view.incarnation or incarnation, **values)

    def taking_over(self: Host, view: Ownership) -> Ownership | None:
        if view.incarnation is None:
            return shard_map.bind(view, node=self.node_id, incarnation=self.incarnation)
        return None

    return [mock.patch.object(rules, "judge", judge), mock.patch.object(Host, "_taking_over", taking_over)]


def _t8() -> list[Patch]:
    async def lock(self: StepContext, move: Move) -> MapEntry:
        entry = await self.directory.refresh(move.unit)
        if entry is None:
            raise NotApplicable("no owner")
        if entry.ownership.move == move.id:
            return entry
        if entry.revision != move.lock_revision or entry.ownership.outcome_of(move.id) is not None:
            raise NotApplicable("changed hands")
        locked = shard_map.lock(entry.ownership, move=move.id, destination=move.destination)
        return await self.directory.transition(move.unit, entry, locked)

    return [mock.patch.object(StepContext, "lock", lock)]


def _no_sender_gate() -> list[Patch]:
    real = rules.admit

    def admit(number: int, *, last: int | None, opened: int, floor: int) -> Admission:
        verdict = real(number, last=last, opened=opened, floor=floor)
        return Admission.NEXT if verdict is Admission.GAP else verdict

    return [mock.patch.object(rules, "admit", admit)]


def _rejections_not_logged() -> list[Patch]:
    stored = live_actor.LiveActor.stored
    append, append_then = Journal.append, Journal.append_then

    async def appending(self: Journal, actor: Any, record: Record, *, after: int) -> int:
        if record.kind is Kind.REJECTION:
            return after
        return await append(self, actor, record, after=after)

    def appending_then(self: Journal, actor: Any, record: Record, *, after: int, then: Appended) -> None:
        if record.kind is Kind.REJECTION:
            then(after)
        else:
            append_then(self, actor, record, after=after, then=then)

    def remembering(self: Any, record: Record, version: int) -> None:
        if record.kind is not Kind.REJECTION:
            stored(self, record, version)

    return [
        mock.patch.object(Journal, "append", appending),
        mock.patch.object(Journal, "append_then", appending_then),
        mock.patch.object(live_actor.LiveActor, "stored", remembering),
    ]


def _t13() -> list[Patch]:
    def overdue(**values: Any) -> str | None:
        return None

    real = Host.tick

    async def tick(self: Any) -> None:
        now_s = self._clock()
        for unit in list(self.units.values()):
            if unit.pause is not None and now_s > unit.pause.lease_until_s and unit.ownership is not None:
                self._resume(unit, unit.ownership)
        await real(self)

    return [mock.patch.object(Host, "tick", tick), _overdue(paused=False, locked=True), *_t2()]


def _stale_resume() -> list[Patch]:
    """What comes back is taken for what was never away: its actors are kept, no claim is due."""

    real = rules.judge

    def judge(view: Ownership, **values: Any) -> Verdict:
        verdict = real(view, **values)
        return Verdict.RESUME if verdict is Verdict.RELOAD else verdict

    def begin_anew(self: Any, held: Unit, view: Ownership) -> Unit:
        if view.incarnation == self.incarnation:
            return held
        held.state, held.pause = UnitState.OPENING, None
        self._spawn(self._opening(held))
        return held

    return [mock.patch.object(rules, "judge", judge), mock.patch.object(Host, "_begin_anew", begin_anew)]


def _no_second_look() -> Patch:
    async def look_again(self: CatchUp, unit: Unit, live: Any) -> None:
        return None

    return mock.patch.object(CatchUp, "look_again", look_again)


def _t14() -> list[Patch]:
    return [*_stale_resume(), *_t1()]


def _t15() -> list[Patch]:
    return [*_stale_resume(), *_t1(), _no_second_look()]


def _t16() -> list[Patch]:
    real = Journal.append

    async def append(self: Journal, actor: Any, record: Record, *, after: int) -> int:
        if record.pieces:
            await self.forget(actor, before=record.pieces[0])
        return await real(self, actor, record, after=after)

    return [mock.patch.object(Journal, "append", append)]


def _s1() -> list[Patch]:
    return [_overdue(paused=True, locked=False), _no_reconciler()]


def _settling(wrong: Settlement) -> Patch:
    real = settlement.settlement

    def settle(*arguments: Any, **values: Any) -> Settlement:
        verdict = real(*arguments, **values)
        return Settlement.ABORTED if verdict is wrong else verdict

    return mock.patch.object(settlement, "settlement", settle)


def _s2() -> list[Patch]:
    return [_settling(Settlement.FENCE), _overdue(paused=True, locked=False)]


def _s3() -> list[Patch]:
    return [_settling(Settlement.REREAD)]


def _p2() -> list[Patch]:
    real = shard_map.take_back

    def take_back(shard: Ownership, actor: str, own: Ownership, *, incarnation: str) -> Ownership:
        return replace(real(shard, actor, own, incarnation=incarnation), epoch=shard.epoch, fence=shard.fence)

    return [mock.patch.object(shard_map, "take_back", take_back), _unchecked()]


def _unchecked() -> Patch:
    return mock.patch.object(shard_map, "check", return_value=None)


def _p3() -> list[Patch]:
    return [mock.patch.object(Directory, "counts", return_value=True)]


def _p4() -> list[Patch]:
    return [mock.patch.object(Host, "_let_go", return_value=None)]


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        name="T1", seed=692, rule="after FAILOVER and BOOT an actor is claimed first", patches=_t1, profile=_NODES_FAIL
    ),
    Mutant(name="T2", seed=49, rule="a higher epoch in the log fences", patches=_t2, profile=_LAGGING),
    Mutant(name="T3", seed=1, rule="what was answered derives from the log", patches=_t3, profile=_NODES_FAIL),
    Mutant(
        name="T4",
        seed=0,
        rule="a failed append is decided again, never sent again",
        patches=_t4,
        profile=_NETWORK_FAILS,
    ),
    Mutant(name="T5", rule="COMMIT is written to the map", patches=_t5, profile=_MOVES),
    Mutant(
        name="T6",
        seed=1,
        rule="a pause whose lease ran out is aborted by its source",
        patches=_t6,
        profile=_TASKS_FAIL,
        covered_by="the reconciler ends moves that do not advance",
        cover=lambda: [_no_reconciler()],
    ),
    Mutant(name="T7", seed=2, rule="a restarted owner takes its units back by BOOT", patches=_t7, profile=_NODES_FAIL),
    Mutant(name="T8", seed=53, rule="LOCK finalises the previous move's record", patches=_t8, profile=_ONE_SHARD),
    Mutant(name="T9", seed=1, rule="exactly the next number of a session", patches=_no_sender_gate, profile=_MOVES),
    Mutant(
        name="T10",
        rule="the same, with buffers that overflow",
        patches=_no_sender_gate,
        profile=replace(_MOVES, buffer_messages=1, mailbox_messages=2),
    ),
    Mutant(
        name="T11",
        seed=4,
        rule="a rejection is logged: a late duplicate finds it",
        patches=_rejections_not_logged,
        profile=replace(_NETWORK_FAILS, conditional=0.6, actors=1, shards=1, doubled=0.15),
    ),
    Mutant(
        name="T12",
        seed=6,
        rule="a rejection is logged: a zombie cannot reject",
        patches=_rejections_not_logged,
        profile=replace(_SKIPPED, conditional=0.6, laggards=("node", "sender")),
    ),
    Mutant(
        name="T13",
        seed=3,
        rule="a source leaves its pause through the map, never by a timer",
        patches=_t13,
        profile=_COMMIT_LATE,
        covered_by="T2: the log's epoch fences who goes on",
        cover=_t2,
    ),
    Mutant(
        name="T14",
        seed=34,
        rule="a unit that may have been another's is begun anew",
        patches=_t14,
        profile=_SKIPPED,
        symptom="stale owner",
        covered_by="T1: the claim is refused and the log read",
        cover=_t1,
    ),
    Mutant(
        name="T15",
        seed=0,
        rule="a gap is answered only after a look at the log's end",
        patches=_t15,
        profile=replace(_SKIPPED, sessions=1.0),
        symptom="stale owner",
        covered_by="T14, T1",
        cover=lambda: [*_t1(), _no_second_look()],
    ),
    Mutant(
        name="T16",
        seed=5,
        rule="a snapshot is stored before what it replaces is removed",
        patches=_t16,
        profile=_IN_PIECES,
    ),
    Mutant(
        name="S1",
        seed=202,
        rule="a lock that no pause follows is aborted by its source",
        patches=_s1,
        profile=replace(_TASKS_FAIL, tasks_lost=0.3, lost=0.1, lost_answer=0.1),
        covered_by="the reconciler ends moves that do not advance",
        cover=lambda: [_no_reconciler()],
    ),
    Mutant(
        name="S2",
        seed=39,
        rule="a LOCK still in flight is fenced before a record ends",
        patches=_s2,
        profile=replace(_TASKS_FAIL, late=0.1, cancel=0.5),
        covered_by="S1: the source aborts a lock that no pause follows",
        cover=lambda: [_overdue(paused=True, locked=False)],
    ),
    Mutant(
        name="S3",
        seed=1,
        rule="a map read before the plan tells nothing",
        patches=_s3,
        profile=_DEPOSED,
    ),
    Mutant(name="P2", seed=3, rule="a shard takes an actor back above both keys, fenced", patches=_p2, profile=_PINS),
    Mutant(
        name="P3", seed=130, rule="an actor's own key counts only while its shard says so", patches=_p3, profile=_PINS
    ),
    Mutant(name="P4", seed=114, rule="a shard lets go of an actor that is set apart", patches=_p4, profile=_PINS),
)
