"""One schedule: a cluster of production code on virtual time, rough weather for a while, then peace and a verdict.

boot      coordinators, nodes, workers, senders; every shard gets an owner
rough     senders send, an operator moves shards, faults begin and end (tests/simulation/weather.py)
peace     everything is healed; within bounded virtual time nothing may be under way any more
verdict   every actor is read once more, then `tests.checker.check.violations` judges the history
"""

from __future__ import annotations

import asyncio
import gc
import traceback
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any
from unittest import mock

from routing import control
from routing.address import ActorId, shard_of
from routing.control import COORDINATOR
from routing.envelope import Answer
from routing.errors import FerryError, OutOfOrder, Quarantined, Rejected
from routing.settings import Settings
from routing.subjects import actor_of_key, shard_key
from runtime.delivery import Delivery
from runtime.mailbox import Mailboxes
from runtime.testing import MemoryNats
from runtime.testing.virtual_time import VirtualTimeLoop
from runtime.unit import Unit
from tests.checker.check import violations
from tests.checker.history import Evidence, Operation, Outcome, RecordEnd
from tests.simulation import rest
from tests.simulation.broker import Broker
from tests.simulation.chronicle import Chronicle
from tests.simulation.machines import CoordinatorMachine, Machine, NodeMachine, SenderMachine, WorkerMachine
from tests.simulation.profile import Profile, draw
from tests.simulation.senders import Application
from tests.simulation.shelf import Shelf
from tests.simulation.weather import Weather

BOOT_S = 30.0
PEACE_S = 90.0  # of virtual time until nothing is under way: re-planning alone may back off for some seconds
POLL_S = 0.1
LAST_READ_S = 10.0


@dataclass(slots=True, kw_only=True)
class Result:
    """What one schedule came to."""

    seed: int
    violations: list[str]
    digest: str
    virtual_s: float
    callbacks: int
    faults: Counter[str] = field(default_factory=Counter)
    moves: Counter[str] = field(default_factory=Counter)
    commands: Counter[str] = field(default_factory=Counter)
    quarantined: int = 0
    lines: list[str] = field(default_factory=list)


class World:
    def __init__(self, seed: int, profile: Profile | None = None, *, keep_lines: bool = False) -> None:
        self.seed = seed
        self.chance = Random(seed)
        self.profile = profile if profile is not None else draw(self.chance)
        self.settings = self.profile.settings()
        self.loop = VirtualTimeLoop()
        self.chronicle = Chronicle(keep_lines=keep_lines)
        self.weather = Weather(self, Random(self.chance.random()))
        self.chronicle.on_commit = self.weather.ambush
        self.nats = MemoryNats(
            latency=self.weather.latency_s, on_message=self.weather.fate,
            on_append=lambda entry: self.chronicle.on_append(self.loop.time(), entry),
            watch_lag=self.weather.watch_lag_s,
        )  # fmt: skip
        self.shelf = Shelf(Random(self.chance.random()))
        self.broker = Broker(Random(self.chance.random()), visibility_timeout_s=self.settings.visibility_timeout_s)
        self.actors = [ActorId("ledger", f"k{n}") for n in range(self.profile.actors)]
        self.operations: list[Operation] = []
        self.quarantined: set[str] = set()
        self.problems: list[str] = []
        self.machines: list[Machine] = []
        self.nodes: list[NodeMachine] = []
        self.coordinators: list[CoordinatorMachine] = []
        self.senders: list[SenderMachine] = []
        self.applications: list[Application] = []
        self.ended: list[RecordEnd] = []  # of every move, at the moment when nothing was under way
        self.asking = 0  # operators that wait for an answer
        self._joined = 0

    # -- what its parts ask ------------------------------------------------------------------------------------------
    def now_s(self) -> float:
        """Virtual time, a little later at each reading, so that what happened one after the other can be told."""
        return self.loop.time() + self.loop.callbacks * 1e-9

    def note(self, what: str) -> None:
        self.chronicle.note(self.loop.time(), what)

    def problem(self, what: str) -> None:
        self.problems.append(what)
        self.note(what)

    def kind_of(self, link: str) -> str:
        """Of the machine that a link belongs to; empty for the operator's."""
        return next((one.kind for one in self.machines if one.name == link), "")

    def begin(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something of the simulation itself; a mistake in it is a problem of the run."""
        task = self.loop.create_task(coroutine)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.problem(f"the simulation itself failed: {''.join(traceback.format_exception(error))}")

    def settings_of(self, node: str) -> Settings:
        return replace(self.settings, node_id=node)

    def any_actor(self, chance: Random) -> ActorId:
        return chance.choice(self.actors)

    def entries_of(self, actor: ActorId) -> list[str]:
        log = self.chronicle.logs.get(str(actor))
        return log.entries if log is not None else []

    async def send_all(self, machine: SenderMachine, chance: Random) -> None:
        application = Application(self, machine, chance)
        self.applications.append(application)
        await application.run()

    # -- joins and drains --------------------------------------------------------------------------------------------
    def join(self) -> bool:
        if self._joined >= 2:
            return False
        self._joined += 1
        machine = self._add(NodeMachine(self, f"j{self._joined}"))
        self.note(f"join {machine.name}")
        machine.start()
        return True

    def drain(self) -> bool:
        staying = [node for node in self.nodes if node.wanted]
        if len(staying) < 3:
            return False
        machine = self.chance.choice(staying)
        self.note(f"drain {machine.name}")
        machine.leave()
        return True

    def _add(self, machine: Any) -> Any:
        self.machines.append(machine)
        for kind, group in (
            (NodeMachine, self.nodes), (CoordinatorMachine, self.coordinators), (SenderMachine, self.senders),
        ):  # fmt: skip
            if isinstance(machine, kind):
                group.append(machine)
        return machine

    # -- a schedule --------------------------------------------------------------------------------------------------
    def run(self) -> Result:
        """Play the whole schedule on a loop of its own, and judge it."""
        answer, chronicle = Mailboxes._answer, self.chronicle

        def answering(mailboxes: Mailboxes, unit: Unit, delivery: Delivery, given: Answer) -> None:
            actor, error = delivery.command.actor, given.error
            live = unit.actors.get(actor)
            if live is not None and (error is None or isinstance(error, Rejected | OutOfOrder)):
                what = type(error).__name__ if error is not None else "a value"
                chronicle.on_answer(str(actor), unit.name, unit.epoch, mailboxes._incarnation, live.version, what)
            answer(mailboxes, unit, delivery, given)

        with (
            mock.patch.object(uuid, "uuid4", _uuids(Random(self.chance.random()))),
            mock.patch.object(Mailboxes, "_answer", answering),
        ):
            asyncio.set_event_loop(None)
            try:
                self.loop.run_until_complete(self._play())
                found = self._judge()
            finally:
                self.loop.bury()
                self.loop.close()
        return found

    async def _play(self) -> None:
        await self._boot()
        profile, weather = self.profile, self.weather
        weather.rough = True
        self.shelf.trouble = (profile.lost + profile.lost_answer) / 2
        self.broker.lost, self.broker.doubled, self.broker.late = (
            profile.tasks_lost, profile.tasks_doubled, profile.tasks_late
        )  # fmt: skip
        blowing = self.begin(weather.blow())
        operating = self.begin(self._operate())
        await asyncio.sleep(profile.rough_s)
        blowing.cancel()
        await self._heal()
        operating.cancel()
        await self._come_to_rest()
        self.ended = self._records()
        for application in self.applications:
            await application.last_word()
        if profile.truncated and not self.problems:
            await rest.lose_the_end_of_a_log(self)
        await self._read_all()

    async def _boot(self) -> None:
        for n in range(2):
            self._add(CoordinatorMachine(self, f"c{n}"))
        for n in range(self.profile.nodes):
            self._add(NodeMachine(self, "abcdefgh"[n]))
        for n in range(self.profile.workers):
            self._add(WorkerMachine(self, f"w{n}"))
        for machine in self.machines:
            machine.start()
        deadline_s = self.loop.time() + BOOT_S
        while not self._serving():
            if self.loop.time() > deadline_s:
                raise AssertionError("the cluster did not come up")
            await asyncio.sleep(POLL_S)
        for n in range(self.profile.senders):
            self._add(SenderMachine(self, f"s{n}")).start()

    def counts(self, unit: str) -> bool:
        """Whether a key of the map says who owns a unit: an actor's own does while its shard names it apart."""
        actor = actor_of_key(unit)
        if actor is None:
            return True
        shard = self.chronicle.map[shard_key(shard_of(actor, self.profile.shards))]
        return shard.apart_at(str(actor)) == self.chronicle.map[unit].taken_out

    def _serving(self) -> bool:
        owned = self.chronicle.map
        return len(owned) == self.profile.shards and all(view.incarnation for view in owned.values())

    async def _operate(self) -> None:
        """An operator who moves shards about, and sometimes thinks better of it."""
        chance, link = Random(self.chance.random()), self.nats.link("operator")
        while True:
            await asyncio.sleep(chance.expovariate(1 / self.profile.move_every_s))
            self.begin(self._move(chance, link))

    async def _move(self, chance: Random, link: Any) -> None:
        nodes = [node.name for node in self.nodes if node.wanted]
        verb, asked = "migrate", {"destination": chance.choice(nodes)}
        if self.profile.pins and chance.random() < self.profile.pins:
            verb = chance.choice(("migrate", "migrate", "unpin"))
            asked["actor"] = str(self.any_actor(chance))
        else:
            asked["shard"] = chance.randrange(self.profile.shards)
        subjects = self.settings.subjects
        self.asking += 1
        try:
            answer = await control.ask(link, subjects, COORDINATOR, verb, asked, timeout_s=1.0)
            if answer["plan"] is None:
                return
            if chance.random() < self.profile.cancel:
                await asyncio.sleep(chance.uniform(0, 0.05))
                await control.ask(link, subjects, COORDINATOR, "cancel", {"plan": answer["plan"]["id"]}, timeout_s=1.0)
        except FerryError:
            return
        finally:
            self.asking -= 1

    async def _heal(self) -> None:
        self.note("everything is healed")
        self.weather.heal()
        self.shelf.trouble, self.shelf.away = 0.0, False
        self.broker.lost = self.broker.doubled = self.broker.late = 0.0
        for machine in self.machines:
            machine.heal()

    async def _come_to_rest(self) -> None:
        deadline_s = self.loop.time() + PEACE_S
        while left := rest.under_way(self):
            if self.loop.time() > deadline_s:
                self.problems += [f"still under way after {PEACE_S:g} s of peace: {what}" for what in left]
                return
            await asyncio.sleep(POLL_S)
        self.note("all is at rest")

    def _records(self) -> list[RecordEnd]:
        outcomes = self.chronicle.outcomes
        return [
            RecordEnd(
                id=move.id, unit=move.unit, status=move.status.value,
                outcome=outcomes[move.id].value if move.id in outcomes else None,
            )
            for _, move in sorted(self.shelf.moves_by_id.items())
        ]  # fmt: skip

    async def _read_all(self) -> None:
        """What every actor says in the end is a read like any other, and must miss nothing."""
        router = self.senders[0].router
        assert router is not None
        for actor in self.actors:
            if str(actor) in self.quarantined:
                continue
            invoked_s, reply, outcome = self.now_s(), None, Outcome.ACKNOWLEDGED
            try:
                reply = await router.send_message(
                    actor, "read", linearizable=True, timeout_s=LAST_READ_S, message_id="last"
                )
            except Quarantined:
                outcome = Outcome.UNKNOWN
                self.problem(f"{actor} is quarantined, although its log lost nothing")
            except FerryError as error:
                outcome = Outcome.UNKNOWN
                self.problem(f"{actor} cannot be read in the end: {error!r}")
            self.operations.append(
                Operation(
                    message_id=f"last-{actor}", actor=str(actor), sender="last", kind="query", invoked_s=invoked_s,
                    returned_s=self.now_s(), outcome=outcome, reply=reply, linearizable=True,
                )
            )  # fmt: skip

    # -- the verdict -------------------------------------------------------------------------------------------------
    def _judge(self) -> Result:
        chronicle = self.chronicle
        evidence = Evidence(
            applied={actor: log.entries for actor, log in chronicle.logs.items()},
            epochs={actor: log.epochs for actor, log in chronicle.logs.items()},
            records=self.ended,
            quarantined=sorted(self.quarantined),
        )
        found = [*self.problems, *chronicle.problems, *violations(self.operations, evidence)]
        found += [
            f"unnoticed error: {problem['message']} {problem.get('exception')!r}" for problem in self.loop.problems
        ]
        faults = Counter(self.weather.faults)
        faults["task lost, doubled or late"] += self.broker.faults
        faults["save lost or unanswered"] += self.shelf.faults
        ended = Counter("committed" if one.outcome == "committed" else "aborted" for one in self.ended)
        ended["of one actor"] = sum(actor_of_key(one.unit) is not None for one in self.ended)
        told = Counter(one.outcome.value for one in self.operations if one.kind == "command")
        return Result(
            seed=self.seed, violations=found, digest=chronicle.digest, virtual_s=self.loop.time() - 1000.0,
            callbacks=self.loop.callbacks, faults=+faults, moves=+ended, commands=told,
            quarantined=len(self.quarantined), lines=list(chronicle.lines or []),
        )  # fmt: skip


def _uuids(numbers: Random) -> Callable[[], uuid.UUID]:
    def uuid4() -> uuid.UUID:
        return uuid.UUID(int=numbers.getrandbits(128), version=4)

    return uuid4


def play(seed: int, profile: Profile | None = None, *, keep_lines: bool = False) -> Result:
    """Play one schedule and clear up after it.

    The garbage collector waits meanwhile: it would run `finally` blocks of killed processes. What those had begun and
    never awaited is no mistake, so nobody is warned of it.
    """
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            result = World(seed, profile, keep_lines=keep_lines).run()
            gc.collect()
            return result
    finally:
        gc.enable()
