"""Your own actor class through moves, crashes and replays, in one call and without a server.

    from runtime.testing import exercise

    def test_aircraft_survives_whatever_happens_to_its_nodes() -> None:
        exercise(Aircraft, [("fly", {"distance": 700}), ("fly", {"distance": -1}), ("totals", {})])

Production nodes run in simulated processes on virtual time. Between the calls, as the seed decides, the actor's shard
is moved, its node killed, an acknowledgement lost, a command sent twice, the actor put to rest and loaded from its log.
Around the calls the live state is compared with what its log says, and each call is put to copies of the actor as well
(runtime/testing/twins.py), so handlers run more often than calls are made.
"""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from routing import control, shard_map
from routing.address import ActorId
from routing.birth import found_or_join
from routing.control import StepRequest
from routing.directory import Directory
from routing.errors import FerryError, HandlerFailed, InvalidInput, Rejected, StateNotPortable
from routing.link import Entry
from routing.router import Router
from routing.settings import Settings
from runtime.actor import Actor, ActorClasses, Handler
from runtime.codec import capture_state, restore_state
from runtime.journal import Record, decode_record
from runtime.live_actor import LiveActor, new_instance, replay
from runtime.memory import Limits, Memory
from runtime.node import Node
from runtime.testing.memory_nats import Fault, Kind, MemoryNats
from runtime.testing.process import Process
from runtime.testing.twins import differing, document
from runtime.testing.virtual_time import VirtualTimeLoop, clock, wall_clock

Call = tuple[str, dict[str, Any]]
Calls = Sequence[Call] | Callable[[random.Random], Iterable[Call]]

UNIT = "shard.0"
NODES = ("a", "b", "c")
STEPS = ("pause", "capture", "serialize", "send", "await_ack", "commit")
CALL_S = 60.0  # of virtual time
OPEN_S = 30.0


class Violation(AssertionError):
    """The class does not keep what an actor has to. The message names the seed that shows it."""


@dataclass(slots=True)
class Exercised:
    """What happened in all runs together."""

    runs: int = 0
    commands: int = 0  # applied
    rejected: int = 0
    failed: int = 0  # raised something else than Rejected; nothing was applied
    queries: int = 0
    moves: int = 0
    crashes: int = 0
    repeated: int = 0
    unacknowledged: int = 0  # appends that landed without their sender learning of it
    replays: int = 0


def exercise(
    actor_class: type[Actor], calls: Calls, *, seeds: Iterable[int] = range(20), others: Iterable[type[Actor]] = (),
    before: type[Actor] | None = None,
) -> Exercised:  # fmt: skip
    """Send `calls` ((command or query, arguments), in order) to one actor, once per seed, and disturb it meanwhile.

    `calls` may be a function that makes them from a random.Random of the seed. `others` are further classes the nodes
    load. `before` is the class as it was: nodes of that one take the first calls, none that it does not have; then they
    are started anew, so `upgrade()` and the old events are put to the test. Raises Violation when

      - live state and replayed state differ: an @event is not deterministic, or a @command changed state itself
      - a @query changed the state
      - state does not survive being captured and restored, or cannot be: it is not JSON-like
      - a call is answered otherwise, emits other events or leaves another state once the actor was moved: it uses a
        private attribute, or the order of a dict's keys, which are not state. A cache that changes nothing is none
      - no command was ever applied: such a run shows nothing
      - state upgraded from `before` is another than its events lead to: an actor may come either way
      - a repeated command got another reply, or was applied twice
      - a class attribute was changed: that is shared by all actors of a process, and is not part of any state

    Raises InvalidInput for a call that the class does not have. Time and random numbers in events show only when they
    give another value a moment later.
    """
    done, refusal = Exercised(), ""
    for seed in seeds:
        rng = random.Random(seed)
        made = list(calls(rng)) if callable(calls) else list(calls)
        shared = _class_attributes(actor_class)
        try:
            stage = _Stage(actor_class, before, others, rng, done)
            _run(stage.run(made))
            _compare("class attributes", _class_attributes(actor_class), shared)
        except (Violation, StateNotPortable) as error:
            raise _violation(actor_class, error, seed) from None
        done.runs += 1
        refusal = refusal or stage.refusal
    if refusal and not done.commands:
        raise _violation(actor_class, f"no command was ever applied; the first was told {refusal}", seed)
    return done


def _violation(actor_class: type[Actor], what: object, seed: int) -> Violation:
    return Violation(f"{actor_class.__name__}: {what} (repeat with seeds=[{seed}])")


def _run(main: Coroutine[Any, Any, None]) -> None:
    loop = VirtualTimeLoop()
    try:
        loop.run_until_complete(main)
    finally:
        loop.bury()
        loop.close()


class _Stage:
    """One run: three nodes, one shard, one actor, and the hand that moves and kills."""

    def __init__(
        self, actor_class: type[Actor], before: type[Actor] | None, others: Iterable[type[Actor]], rng: random.Random,
        done: Exercised,
    ) -> None:  # fmt: skip
        self._rng, self._done = rng, done
        self._class, self._others, self._renewed = before or actor_class, tuple(others), actor_class
        self._classes = ActorClasses([self._class, *self._others])
        self._actor = ActorId(actor_class.actor_type, "exercised")
        self._settings = Settings(shards=1, logs=1, snapshot_every=rng.choice((2, 5, 32)))
        self._nats = MemoryNats(
            latency=lambda: rng.uniform(0.0001, 0.001), on_message=self._fate, on_append=self._landed
        )
        self._link = self._nats.link("exercise")
        self._subjects = self._settings.subjects
        self._directory = Directory(self._link, self._subjects, shards_total=1)
        self._router = Router(self._link, self._directory, self._subjects, sender="exercise", wall_clock=wall_clock)
        self._nodes: dict[str, tuple[Node, Process]] = {}
        self._lives = 0
        self._shadow, self._memory = self._new_shadow(), Memory(Limits.of(self._settings))
        self._records: list[Record] = []
        self.refusal = ""  # what the first command that was not applied was told
        self._events: list[str] = []  # of the latest record, for messages
        self._applied: dict[str, int] = {}  # message id -> how often
        self._lose_next = False

    async def run(self, calls: Sequence[Call]) -> None:
        await found_or_join(self._link, self._settings)
        await self._directory.start()
        for name in NODES:
            await self._start(name)
        await self._directory.transition(UNIT, None, shard_map.assign(NODES[0]))
        await self._open()
        renew_at = self._rng.randint(0, len(calls))
        for number, (name, arguments) in enumerate(calls):
            if self._class is not self._renewed and (number >= renew_at or not self._has(name)):
                await self._renew()
            await self._disturb()
            await self._call(f"m-{number}", name, arguments)
            if self._rng.random() < 0.3:
                await self._look(f"after {name!r}")
        if self._class is not self._renewed:
            await self._renew()
        await self._crash()
        await self._look("after the last crash")
        doubled = sorted(message_id for message_id, times in self._applied.items() if times > 1)
        if doubled:
            raise Violation(f"applied twice: {', '.join(doubled)}")

    # -- nodes -------------------------------------------------------------------------------------------------------
    async def _start(self, name: str) -> None:
        self._lives += 1
        process = Process(f"{name}-{self._lives}")
        fields = {field: getattr(self._settings, field) for field in Settings.__dataclass_fields__}
        node = Node(
            Settings(**{**fields, "node_id": name}), classes=self._classes, incarnation=process.name,
            link=self._nats.link(name, process), transfer_link=self._nats.link(f"{name}-transfer", process),
            clock=clock, wall_clock=wall_clock,
        )  # fmt: skip
        await process.spawn(node.start())
        self._nodes[name] = (node, process)

    async def _restart(self, *names: str) -> None:
        """kill -9, and a next life when the lease has run out."""
        for name in names:
            self._nodes[name][1].kill()
        await asyncio.sleep(self._settings.node_lease_s + 1)
        for name in names:
            await self._start(name)

    def _owner(self) -> str:
        entry = self._directory.get(UNIT)
        assert entry is not None
        return entry.ownership.owner

    async def _open(self) -> None:
        """Wait until the owner in the map serves."""
        deadline_s = clock() + OPEN_S
        while True:
            entry = await self._directory.refresh(UNIT)
            assert entry is not None
            node, _ = self._nodes[entry.ownership.owner]
            unit = node.host.units.get(UNIT)
            bound = entry.ownership.incarnation == node.incarnation
            if bound and unit is not None and unit.held is not None and unit.pause is None:
                return
            if clock() > deadline_s:
                raise Violation(f"node {node.id} did not take the actor over within {OPEN_S:g} s: see its log")
            await asyncio.sleep(0.05)

    def _live(self) -> LiveActor | None:
        node, _ = self._nodes[self._owner()]
        unit = node.host.units.get(UNIT)
        return unit.actors.get(self._actor) if unit is not None else None

    def _new_shadow(self) -> Actor:
        shadow = new_instance(self._class)
        shadow._actor_id = self._actor
        return shadow

    # -- a newer class -----------------------------------------------------------------------------------------------
    def _has(self, name: str) -> bool:
        handler = self._class.handlers.get(name)
        return handler is not None and handler.kind != "event"

    async def _renew(self) -> None:
        """Start all nodes anew with the newer class, the owner last: it has moved the actor away, or leaves its log."""
        older = capture_state(self._shadow)
        version, self._class = self._class.schema_version, self._renewed
        self._classes = ActorClasses([self._class, *self._others])
        self._shadow, self._memory = self._new_shadow(), Memory(Limits.of(self._settings))
        for record in self._records:
            replay(self._shadow, self._memory, record)
        upgraded = capture_state(restore_state(self._class, older, version))
        told = f"state upgraded from version {version} differs from what its events lead to"
        _compare(told, document(upgraded), document(capture_state(self._shadow)))
        owner = self._owner()
        await self._restart(*(name for name in NODES if name != owner))
        if self._rng.random() < 0.5:
            await self._move()
        await self._restart(owner)
        await self._open()

    # -- what happens to it ------------------------------------------------------------------------------------------
    async def _disturb(self) -> None:
        what = self._rng.random()
        if what < 0.2:
            await self._move()
        elif what < 0.3:
            await self._crash()
        elif what < 0.4:
            self._lose_next = True
        elif what < 0.5:
            self._rest()

    async def _move(self) -> None:
        destination = self._rng.choice([name for name in NODES if name != self._owner()])
        move = f"move-{self._lives}-{self._done.moves}"
        locked = await self._directory.decide(
            UNIT, lambda view: shard_map.lock(view, move=move, destination=destination)
        )
        view = locked.ownership
        request = StepRequest(move=move, unit=UNIT, epoch=view.epoch, source=view.owner, destination=destination)
        try:
            for verb in STEPS:
                await control.ask(self._link, self._subjects, view.owner, verb, request, timeout_s=CALL_S)
        except FerryError as error:
            raise Violation(f"cannot be moved: {error}") from error
        self._done.moves += 1
        await self._open()

    async def _crash(self) -> None:
        """Kill the owner; another node gets the shard, or the same one in its next life."""
        name = self._owner()
        self._done.crashes += 1
        await self._restart(name)
        if self._rng.random() < 0.5:
            heir = self._rng.choice([other for other in NODES if other != name])
            await self._directory.decide(UNIT, lambda view: shard_map.failover(view, to=heir))
        await self._open()

    def _rest(self) -> None:
        node, _ = self._nodes[self._owner()]
        node.host.units[UNIT].actors.clear()

    def _fate(self, kind: Kind, subject: str) -> Fault:
        if self._lose_next and kind == "append" and ".ev." in subject:
            self._lose_next = False
            self._done.unacknowledged += 1
            return "drop_reply"
        return "deliver"

    # -- calls -------------------------------------------------------------------------------------------------------
    async def _call(self, message_id: str, name: str, arguments: dict[str, Any]) -> None:
        handler = self._classes.handler(self._actor.actor_type, name)
        query = handler.kind == "query"
        before = await self._look(f"before {name!r}")
        await self._compare_twins(handler, arguments, before)
        answer = await self._answer(message_id, name, arguments)
        if query:
            self._done.queries += 1
            _compare(f"query {name!r} changed the state", document(await self._state()), document(before))
        elif self._rng.random() < 0.3:
            self._done.repeated += 1
            _compare(
                f"{name!r} sent again was answered otherwise", await self._answer(message_id, name, arguments), answer
            )

    async def _compare_twins(self, handler: Handler, arguments: dict[str, Any], state: bytes) -> None:
        """Put a call to copies of an actor that was never moved, and of the live one: it may know more than its log."""
        live = self._live()
        for instance in (self._shadow, live.instance if live is not None and not live.dirty else None):
            if instance is None:
                continue
            found = await differing(instance, state, handler, arguments, timeout_s=CALL_S)
            if found is not None:
                _compare(f"{handler.name!r} uses what is not in the state: after a move", *found)

    async def _answer(self, message_id: str, name: str, arguments: dict[str, Any]) -> Any:
        try:
            return await self._router.send_message(
                self._actor, name, arguments, message_id=message_id, timeout_s=CALL_S
            )
        except (Rejected, HandlerFailed) as error:
            if f" raised {StateNotPortable.__name__}: " in str(error):
                raise Violation(str(error)) from error
            self.refusal = self.refusal or f"{type(error).__name__}: {error}"
            return f"{type(error).__name__}: {error}"
        except InvalidInput:
            raise
        except FerryError as error:
            raise Violation(f"{name!r} was never answered: {error}") from error

    # -- the log -----------------------------------------------------------------------------------------------------
    def _landed(self, entry: Entry) -> None:
        """Follow the log with an instance of our own, as a node would that loads the actor."""
        if not entry.subject.endswith(f".{self._actor.token}"):
            return
        record = decode_record(entry.payload)
        replay(self._shadow, self._memory, record)
        self._records.append(record)
        self._events = [name for name, _ in record.events] or self._events
        match record.kind.value:
            case "command" | "rejection":
                self._applied[record.message_id] = self._applied.get(record.message_id, 0) + 1
                refused = (record.error or {}).get("kind")
                self._done.commands += refused is None
                self._done.rejected += refused == Rejected.__name__
                self._done.failed += refused not in (None, Rejected.__name__)

    async def _look(self, when: str) -> bytes:
        """The live state, after comparing it with its own restored copy and with the replayed one.

        In this order: a state that does not survive a move differs from the replayed one after it as well.
        """
        state = await self._state()
        restored = capture_state(restore_state(self._class, state, self._class.schema_version))
        _compare(f"{when}, restored state differs from captured state", document(restored), document(state))
        replayed = capture_state(self._shadow)
        self._done.replays += 1
        told = f"{when}, live state differs from replayed state (latest events: {', '.join(self._events) or 'none'})"
        _compare(told, document(state), document(replayed))
        return state

    async def _state(self) -> bytes:
        """What the owner would capture now; of an actor at rest, what the log says."""
        live = self._live()
        if live is None or live.instance is None or live.dirty:
            return capture_state(self._shadow)
        return capture_state(live.instance)


def _class_attributes(actor_class: type[Actor]) -> dict[str, Any]:
    return {
        name: copy.deepcopy(value)
        for name, value in vars(actor_class).items()
        if not name.startswith("_") and isinstance(value, (list, dict, set, int, float, str, bytes, type(None)))
    }


def _compare(what: str, found: Any, expected: Any) -> None:
    """Raises Violation naming the first differing attributes."""
    if found == expected:
        return
    if isinstance(found, dict) and isinstance(expected, dict):
        names = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
        differing = "; ".join(
            f"{name} is {found.get(name)!r:.80}, not {expected.get(name)!r:.80}" for name in names[:3]
        )
        raise Violation(f"{what}: {differing}")
    raise Violation(f"{what}: {found!r:.80}, not {expected!r:.80}")
