"""One case: a move under load, a fault exactly at its point, and what is left when all has come to rest.

    choose a shard -> load on it -> arm the marker -> ask for the move -> a process stops at the marker
      -> strike -> let the marked process go on -> undo after a while -> rest -> last reads -> judge

The judge is the checker's; nothing here decides what is right, but when a case counts as come to rest.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from routing.address import ActorId
from routing.errors import FerryError, NotApplicable
from tests.checker.check import violations
from tests.checker.history import Evidence, Operation, RecordEnd
from tests.nemesis.cases import Case, Fault, Marker, Party, Strike
from tests.nemesis.fleet import SHARDS, WORKERS, Fleet
from tests.nemesis.load import Load, actors_of
from tests.nemesis.view import LogWatch, View
from workflows.records import Move

REST_S = 60.0  # a case needs the leases, a lost step's six seconds and a replan at most; on a slow machine three times
REACH_S = 30.0
WARM_S = 20.0
READ_S = 10.0
MOVES_TRIED = 3  # a move may be refused before its marker, when the machine is so slow that a handler outlives its time
REST_LOOKS = 3  # in a row, REST_EVERY_S apart, so that a plan that follows is not overlooked
REST_EVERY_S = 0.15
BALANCE_AFTER_S = 3.0  # a leader with nothing to do plans by itself before; else it is asked to


@dataclass(slots=True)
class Tally:
    """What a run has come to, for its last table."""

    cases: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    moves: Counter[str] = field(default_factory=Counter)  # committed, aborted, by the records
    lost_records: int = 0
    workers_ended: int = 0  # by themselves, when Redis died
    commands: Counter[str] = field(default_factory=Counter)
    queries: int = 0
    violations: int = 0

    def count(self, operations: Sequence[Operation], moves: Sequence[Move]) -> None:
        self.commands.update(o.outcome.value for o in operations if o.kind == "command")
        self.queries += sum(o.kind == "query" for o in operations)
        self.moves.update("committed" if move.status == "completed" else "aborted" for move in moves)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How one case went; `found` is empty when every promise was kept."""

    case: Case
    found: Sequence[str]
    ended: str  # the status of the move it was about
    operations: Sequence[Operation]
    took_s: float


@dataclass(slots=True)
class _Scene:
    """The parties of one move."""

    shard: int
    source: str
    destination: str
    actor: ActorId | None = None  # that is moved alone
    move: Move | None = None


class Nemesis:
    """Runs cases one after another against one fleet."""

    def __init__(self, fleet: Fleet, view: View, tally: Tally) -> None:
        """`tally` is counted on; a run of several fleets passes one to each."""
        self.tally = tally
        self._fleet, self._view = fleet, view

    async def ready(self) -> None:
        """Wait until the fleet serves. Raises TimeoutError saying what is missing."""
        if left := await self.rest(REST_S):
            raise TimeoutError(f"the fleet does not get ready: {'; '.join(left)}")

    async def run(self, case: Case, *, run: str) -> Result:
        """`run` is a name that no other case of this fleet has: actors and entries are called after it."""
        began, began_s = time.time(), time.monotonic()
        scene = self._choose()
        actors = [
            *actors_of(scene.shard, shards=SHARDS, run=run, count=4),
            *actors_of(self._another(scene), shards=SHARDS, run=run, count=1),
        ]
        scene.actor = actors[0] if case.alone else None
        found: list[str] = []
        ended = "never marked"
        async with LogWatch(self._view, actors) as log, Load(self._view.clients, actors, run=run) as load:
            await load.warm(within_s=WARM_S)
            try:
                marked = await self._reach(case.marker, scene)
                await self._strike(case, scene, marked)
            except TimeoutError as error:
                found.append(f"the case itself: {error}")
            finally:
                self._disarm()
                self._fleet.wake_all()  # whoever came to stand at the marker when nobody looked any more
            left = await self.rest(REST_S)
            if scene.actor is not None and not left:
                await self._let_go_back(scene.actor)
                left = await self.rest(REST_S)
            try:
                await load.finish(within_s=REST_S)
            except TimeoutError:
                found.append("a sender waits for ever")
        applied, unreadable = await self.read(actors)
        moves = await self._view.moves_since(began)
        evidence = Evidence(
            applied=applied, epochs=log.epochs(), records=self.record_ends(moves), leftovers=[*left, *unreadable],
        )  # fmt: skip
        found += violations(load.operations, evidence)
        if scene.move is not None:
            ended = next((str(move.status) for move in moves if scene.move.id == move.id), "no record")
            self.tally.lost_records += ended == "no record"
        self.tally.cases += 1
        self.tally.faults.update(f"{strike.fault} {strike.party}" for strike in case.strikes)
        self.tally.count(load.operations, moves)
        self.tally.violations += len(found)
        return Result(
            case=case, found=found, ended=ended, operations=load.operations, took_s=time.monotonic() - began_s
        )

    # -- the move ----------------------------------------------------------------------------------------------------
    def _choose(self) -> _Scene:
        """A shard of the node that has the most, to the one that has the fewest: the map is as balanced after it."""
        by_count = sorted(self._fleet.nodes, key=lambda node: len(self._view.shards_of(node)))
        source, destination = by_count[-1], by_count[0]
        shards = self._view.shards_of(source)
        return _Scene(shards[self.tally.cases % len(shards)], source, destination)

    def _another(self, scene: _Scene) -> int:
        """A shard beside the moved one, at its destination unless that has none yet."""
        return next(iter(self._view.shards_of(scene.destination)), (scene.shard + 1) % SHARDS)

    async def _reach(self, marker: Marker, scene: _Scene) -> str:
        """Move the shard until a process stands at the marker; returns the process' name. Raises TimeoutError."""
        for _ in range(MOVES_TRIED):
            self._look_where(scene)
            candidates = {
                Party.SOURCE: (f"node-{scene.source}",), Party.DESTINATION: (f"node-{scene.destination}",),
                Party.WORKER: WORKERS,
            }[marker.party]  # fmt: skip
            for name in candidates:
                self._fleet.arm(name, marker.armed)
            await self._ask_for_move(scene)
            await self._view.until(
                partial(self._stopped_or_ended, candidates, scene), f"{marker.party} to reach {marker.name}",
                within_s=REACH_S,
            )  # fmt: skip
            standing = self._standing(candidates)
            self._disarm()
            if standing is not None:
                return standing
        raise TimeoutError(f"{MOVES_TRIED} moves ended before {marker.name} at the {marker.party}")

    def _look_where(self, scene: _Scene) -> None:
        """A move that went through without being marked has swapped the parties of the next."""
        if scene.actor is not None:
            there = self._view.session.directory.get_actor_node(scene.actor) == scene.destination
        else:
            there = scene.shard in self._view.shards_of(scene.destination)
        if there:
            scene.source, scene.destination = scene.destination, scene.source

    def _standing(self, candidates: Sequence[str]) -> str | None:
        return next((name for name in candidates if self._fleet.stands_still(name)), None)

    async def _stopped_or_ended(self, candidates: Sequence[str], scene: _Scene) -> bool:
        if self._standing(candidates) is not None:
            return True
        assert scene.move is not None
        return await self._view.ended(scene.move.id) is not None

    async def _ask_for_move(self, scene: _Scene) -> None:
        session = self._view.session

        async def planned() -> Move | None:
            what = {"shard": scene.shard} if scene.actor is None else {"actor": str(scene.actor)}
            asked = {**what, "destination": scene.destination}
            plan = (await session.ask_leader("migrate", asked))["plan"]
            return next(iter(await session.store.moves(plan_id=plan["id"])), None)

        scene.move = await self._view.until(planned, "the leader to take the move", within_s=REACH_S)

    async def _let_go_back(self, actor: ActorId) -> None:
        """Unpin it, if it ever came to be pinned; `rest` then waits until it is back in its shard."""

        async def unpinned() -> bool:
            with suppress(NotApplicable):
                await self._view.session.ask_leader("unpin", {"actor": str(actor)})
            return True

        await self._view.until(unpinned, "the leader to unpin", within_s=REACH_S)

    def _disarm(self) -> None:
        for name in (*(f"node-{node}" for node in self._fleet.nodes), *WORKERS):
            self._fleet.arm(name, "")

    # -- the fault ---------------------------------------------------------------------------------------------------
    async def _strike(self, case: Case, scene: _Scene, marked: str) -> None:
        """All strikes at once, while the marked process stands still; then it goes on, and each is undone in time."""
        names = [await self._process_of(strike.party, scene, marked) for strike in case.strikes]
        held = False
        for strike, name in zip(case.strikes, names, strict=True):
            await self._fleet.strike(name, strike.fault)
            held = held or (name == marked and strike.fault is not Fault.RESTART)
        if not held:
            self._fleet.process(marked).resume()
        async with asyncio.TaskGroup() as group:
            for strike, name in zip(case.strikes, names, strict=True):
                group.create_task(self._undo(strike, name))

    async def _undo(self, strike: Strike, name: str) -> None:
        if strike.fault is not Fault.RESTART:
            await asyncio.sleep(strike.hold_s)  # not a wait for something: how long the fault lasts
        await self._fleet.undo(name, strike.fault)

    async def _process_of(self, party: Party, scene: _Scene, marked: str) -> str:
        match party:
            case Party.SOURCE:
                return f"node-{scene.source}"
            case Party.DESTINATION:
                return f"node-{scene.destination}"
            case Party.WORKER:
                if marked in WORKERS:
                    return marked
                assert scene.move is not None
                move = await self._view.session.store.move(scene.move.id)
                return self._fleet.worker_of(move.task_ids.get(move.step or "", "")) if move else WORKERS[0]
            case Party.COORDINATOR:
                process_id = await self._view.until(self._view.leader, "somebody to lead", within_s=REACH_S)
                return self._fleet.name_of_process(process_id) or "coordinator-1"
            case _:
                return str(party)

    # -- rest --------------------------------------------------------------------------------------------------------
    async def rest(self, within_s: float = REST_S) -> list[str]:
        """Wait until nothing goes on and nothing was left behind; else what it was, in words, at the end."""
        deadline_s = time.monotonic() + within_s
        quiet, unbalanced_since_s = 0, time.monotonic()
        while True:
            self.tally.workers_ended += self._fleet.supervise()
            left = [*self._fleet.not_running(), *await self._view.leftovers(self._fleet.nodes)]
            if not left:
                left = await self._unbalanced()
                if left and time.monotonic() - unbalanced_since_s > BALANCE_AFTER_S:
                    unbalanced_since_s = time.monotonic()
                    await self._balance()
            else:
                unbalanced_since_s = time.monotonic()
            quiet = 0 if left else quiet + 1
            if quiet >= REST_LOOKS or time.monotonic() > deadline_s:
                return left
            await asyncio.sleep(REST_EVERY_S)

    async def _unbalanced(self) -> list[str]:
        try:
            left = int((await self._view.session.ask_leader("plan"))["moves"])
        except FerryError as error:
            return [f"the leader cannot plan: {error}"]
        return [f"the map is not balanced: {left} moves to go"] if left else []

    async def _balance(self) -> None:
        try:
            await self._view.session.ask_leader("rebalance")
        except FerryError:
            return  # asked again if it is still needed

    # -- evidence ----------------------------------------------------------------------------------------------------
    async def read(self, actors: Sequence[ActorId]) -> tuple[dict[str, list[str]], list[str]]:
        """What every actor holds in the end, and what could not be read; every shard is asked something."""
        client = self._view.clients[0]
        asked = [*actors, *(actors_of(shard, shards=SHARDS, run="probe", count=1)[0] for shard in range(SHARDS))]
        reading = (client.send_message(actor, "read", linearizable=True, timeout=READ_S) for actor in asked)
        answers = await asyncio.gather(*reading, return_exceptions=True)
        unreadable = [
            f"{actor} does not answer: {answer}"
            for actor, answer in zip(asked, answers, strict=True)
            if isinstance(answer, BaseException)
        ]
        applied = {str(a): answer for a, answer in zip(actors, answers, strict=False) if isinstance(answer, list)}
        return applied, unreadable

    def record_ends(self, moves: Sequence[Move]) -> list[RecordEnd]:
        """Without those whose end we cannot know: while NATS was away a later move of the same shard ended as well."""
        ends = [self._view.record_end(move) for move in moves]
        latest = {move.unit: move.created_at for move in sorted(moves, key=lambda move: move.created_at)}
        return [
            end
            for end, move in zip(ends, moves, strict=True)
            if end.outcome is not None or move.created_at == latest[move.unit] or end.status != "completed"
        ]
