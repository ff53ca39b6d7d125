"""A small cluster in one process on virtual time: nodes, a client, and the worker's hand on the six steps.

Nobody coordinates: tests assign, lock, abort and fail over by hand, so that each sees exactly the moves it makes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from routing import control
from routing.address import ActorId, shard_of
from routing.birth import found_or_join
from routing.control import StepRequest
from routing.directory import Directory, MapEntry
from routing.envelope import Answer, Command, decode_answer, encode_command
from routing.errors import FerryError, WrongSequence
from routing.link import Appended, Entry, Link, Message
from routing.router import Router
from routing.settings import Settings
from routing.shard_map import abort, assign, failover, lock
from routing.subjects import kv_stream, kv_subject
from runtime.actor import Actor, ActorClasses, Rejected, command, event, query
from runtime.journal import decode_record
from runtime.node import Node
from runtime.testing import Fault, Kind, MemoryLink, MemoryNats
from tests.unit.virtual_time import clock, until, wall_clock

STEPS = ("pause", "capture", "serialize", "send", "await_ack", "commit")
UNIT = "shard.0"
VERB_S = 8.0


class Ledger(Actor):
    """Keeps every entry it was given, in order: nothing lost, doubled or overtaken goes unnoticed."""

    actor_type = "ledger"
    open_gate: asyncio.Event | None = None  # while set to an unset event, `write_slowly` waits for it
    entered = 0

    def __init__(self) -> None:
        self.entries: list[Any] = []
        self.closed = False

    @command
    def write(self, *, entry: Any) -> int:
        if self.closed:
            raise Rejected("the ledger is closed")
        self.emit("written", entry=entry)
        return len(self.entries)

    @command
    async def write_slowly(self, *, entry: Any) -> int:
        type(self).entered += 1
        gate = type(self).open_gate
        if gate is not None:
            await gate.wait()
        self.emit("written", entry=entry)
        return len(self.entries)

    @command
    def close(self) -> bool:
        self.emit("was_closed", closed=True)
        return True

    @command
    def reopen(self) -> bool:
        self.emit("was_closed", closed=False)
        return True

    @command
    def write_and_fail(self, *, entry: Any) -> int:
        self.emit("written", entry=entry)
        raise ZeroDivisionError("a mistake in the actor")

    @command
    def touch(self) -> str:
        return "nothing changed"

    @query
    def read(self) -> list[Any]:
        return self.entries

    @query
    def pop_later(self, *, items: list[Any]) -> Awaitable[list[Any]]:
        """Not `async`, and yet it answers with something to be awaited; and it changes what it was given."""
        items.pop()
        return self._later(items)

    @command
    def write_later(self, *, entry: Any) -> Awaitable[list[Any]]:
        """Not `async`, and yet it answers with something to be awaited, after it has changed the state."""
        type(self).entered += 1
        self.emit("written", entry=entry)
        return self._later(self.entries)

    @command
    def shout(self, *, size_bytes: int) -> str:
        self.emit("written", entry="shouted")
        return "!" * size_bytes

    async def _later(self, items: list[Any]) -> list[Any]:
        return items

    @event
    def written(self, entry: Any) -> None:
        self.entries.append(entry)

    @event
    def was_closed(self, closed: bool) -> None:
        self.closed = closed


@dataclass
class Running:
    """A node in this process: its links can be cut, which is what a SIGSTOP or a kill looks like from outside."""

    node: Node
    link: MemoryLink
    transfer_link: MemoryLink
    task: asyncio.Task[None]
    stopping: asyncio.Event

    def cut(self) -> None:
        self.link.disconnect()
        self.transfer_link.disconnect()

    def heal(self) -> None:
        self.link.reconnect()
        self.transfer_link.reconnect()


class SmallCluster:
    def __init__(self, *, shards: int = 1, latency: Callable[[], float] | None = None, **settings: Any) -> None:
        self.nats = MemoryNats(latency=latency, on_message=self._on_message)
        self.settings = Settings(shards=shards, **settings)
        self.subjects = self.settings.subjects
        self.nodes: dict[str, Running] = {}
        self.everyone: list[Running] = []
        self.messages: list[tuple[Kind, str]] = []
        self.faults: list[tuple[Callable[[Kind, str], bool], Fault, list[int]]] = []
        self.link = self.nats.link("worker")
        self.directory = Directory(self.link, self.subjects, shards_total=shards)
        self.router = Router(self.link, self.directory, self.subjects, sender="worker", wall_clock=wall_clock)

    def _on_message(self, kind: Kind, subject: str) -> Fault:
        self.messages.append((kind, subject))
        for matches, fault, left in self.faults:
            if left[0] > 0 and matches(kind, subject):
                left[0] -= 1
                return fault
        return "deliver"

    def messages_to(self, part: str) -> list[str]:
        """Subjects of the requests so far that have `part` among their tokens."""
        return [subject for kind, subject in self.messages if kind == "request" and part in subject.split(".")]

    def keys_of_shards(self) -> list[str]:
        """A key in each shard, in the order of their numbers."""
        shards = self.settings.shards
        return [
            next(key for key in map(str, range(10_000)) if shard_of(ActorId("ledger", key), shards) == number)
            for number in range(shards)
        ]

    def disturb(self, fault: Fault, kind: Kind, part: str, times: int = 1) -> None:
        """Let `fault` befall the next `times` messages of `kind` with `part` in their subject."""
        self.faults.append((lambda k, s: k == kind and part in s, fault, [times]))

    def disturbed(self) -> bool:
        """Whether every planned fault has happened: without them a test of faults proves nothing."""
        return all(left[0] == 0 for _, _, left in self.faults)

    # ------------------------------------------------------------------------------------------------- nodes

    async def add(
        self,
        name: str,
        *,
        classes: Iterable[type[Actor]] = (Ledger,),
        incarnation: str | None = None,
        wrap: Callable[[MemoryLink], Link] = lambda link: link,
        **settings: Any,
    ) -> Running:
        link, transfer_link = self.nats.link(name), self.nats.link(f"{name}-transfer")
        fields = {name: getattr(self.settings, name) for name in self.settings.__dataclass_fields__}
        node = Node(
            Settings(**{**fields, "node_id": name, **settings}),
            link=wrap(link),
            transfer_link=transfer_link,
            classes=ActorClasses(classes),
            incarnation=incarnation,
            clock=clock,
            wall_clock=wall_clock,
        )
        await node.start()
        stopping = asyncio.Event()
        running = Running(node, link, transfer_link, asyncio.create_task(node.serve(stopping)), stopping)
        self.nodes[name] = running
        self.everyone.append(running)
        return running

    async def restart(self, name: str, **settings: Any) -> Running:
        """kill -9 and start again: nobody gives the lease back, so the new life waits until it has run out."""
        self.nodes[name].cut()
        await asyncio.sleep(self.settings.node_lease_s + 1.5)
        return await self.add(name, **settings)

    # --------------------------------------------------------------------------------------------------- map

    async def assign(self, owner: str, *units: str) -> None:
        for unit in units or (UNIT,):
            await self.directory.transition(unit, None, assign(owner))

    async def lock(self, move: str, destination: str, unit: str = UNIT) -> StepRequest:
        entry = await self.directory.decide(unit, lambda view: lock(view, move=move, destination=destination))
        source = entry.ownership.owner
        return StepRequest(move=move, unit=unit, epoch=entry.ownership.epoch, source=source, destination=destination)

    async def abort(self, move: str, unit: str = UNIT) -> MapEntry:
        return await self.directory.decide(unit, lambda view: abort(view, move=move))

    async def fail_over(self, destination: str, unit: str = UNIT) -> MapEntry:
        return await self.directory.decide(unit, lambda view: failover(view, to=destination))

    async def map(self, unit: str = UNIT) -> Any:
        entry = await self.directory.refresh(unit)
        assert entry is not None
        return entry.ownership

    async def served_by(self, name: str, unit: str = UNIT) -> None:
        """Wait until `name` holds `unit` with its gate open."""
        incarnation = self.nodes[name].node.incarnation

        def bound() -> bool:
            entry = self.directory.get(unit)
            return entry is not None and (entry.ownership.owner, entry.ownership.incarnation) == (name, incarnation)

        await until(bound)
        await until(lambda: self.nodes[name].node.host.serves(unit))

    # ----------------------------------------------------------------------------------------------- moving

    async def step(self, verb: str, request: StepRequest, node: str | None = None) -> dict[str, Any]:
        """One verb, asked for as a worker does: again while the answer is that it goes on."""
        answer: dict[str, Any] = {"pending": True}
        while answer.get("pending"):
            answer = await self.ask(verb, request, node)
        return answer

    async def ask(self, verb: str, request: StepRequest, node: str | None = None) -> dict[str, Any]:
        return await control.ask(self.link, self.subjects, node or request.source, verb, request, timeout_s=VERB_S)

    async def steps(self, request: StepRequest, *, until_verb: str = "commit") -> dict[str, Any]:
        answer: dict[str, Any] = {}
        for verb in STEPS[: STEPS.index(until_verb) + 1]:
            answer = await self.step(verb, request)
        return answer

    async def move(self, move: str, destination: str, unit: str = UNIT) -> dict[str, Any]:
        return await self.steps(await self.lock(move, destination, unit))

    # ---------------------------------------------------------------------------------------------- sending

    async def send(
        self, key: str, name: str, message_id: str | None = None, *, timeout_s: float = 20.0, **arguments: Any
    ) -> Any:
        return await self.router.send_message(
            ActorId("ledger", key), name, arguments, message_id=message_id, timeout_s=timeout_s
        )

    async def post(self, node: str, sent: Command) -> asyncio.Future[Answer]:
        """Put a command on one node's subject, whoever owns the actor; returns where its answer will be."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        inbox = f"_INBOX.post.{len(self.messages)}"

        def answered(message: Message) -> None:
            if not future.done():
                future.set_result(decode_answer(message.payload))

        await self.link.subscribe(inbox, answered)
        await self.link.publish(self.subjects.command(node, "test"), encode_command(sent), reply=inbox)
        return future

    def command(
        self,
        key: str,
        name: str,
        message_id: str,
        *,
        epoch: int = 0,
        hops: int = 0,
        lives_s: float = 30.0,
        **arguments: Any,
    ) -> Command:
        return Command(
            actor=ActorId("ledger", key),
            name=name,
            arguments=arguments,
            message_id=message_id,
            epoch=epoch,
            hops=hops,
            expires_ms=int((wall_clock() + lives_s) * 1000),
        )

    # ---------------------------------------------------------------------------------------------- reading

    def log(self, key: str) -> list[Entry]:
        """What is stored of one actor now, in order."""
        found: list[Entry] = []
        for stream, _ in self.subjects.log_streams():
            found += [entry for entry in self.nats.entries(stream) if entry.subject.endswith(f"={key}")]
        return found

    def kinds(self, key: str) -> list[str]:
        return [decode_record(entry.payload).kind.value for entry in self.log(key)]

    def map_subject(self, unit: str = UNIT) -> str:
        return kv_subject(self.subjects.map_bucket, unit)

    def leases(self) -> list[Entry]:
        return self.nats.entries(kv_stream(self.subjects.lease_bucket))


class ForgetfulLink:
    """A link to a JetStream that lost the tail of a log: what comes after `kept` is not there any more."""

    def __init__(self, link: MemoryLink, forgotten: dict[str, int]) -> None:
        self._link = link
        self._forgotten = forgotten

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def _kept(self, subject: str) -> int | None:
        return next((kept for key, kept in self._forgotten.items() if subject.endswith(f"={key}")), None)

    async def last(self, stream: str, subject: str, *, timeout_s: float) -> Entry | None:
        entry, kept = await self._link.last(stream, subject, timeout_s=timeout_s), self._kept(subject)
        if entry is None or kept is None or entry.sequence <= kept:
            return entry
        return (await self._link.read(stream, [kept], timeout_s=timeout_s))[0] if kept else None

    async def read(self, stream: str, sequences: Sequence[int], *, timeout_s: float) -> list[Entry | None]:
        stored = await self._link.read(stream, sequences, timeout_s=timeout_s)
        return [entry if entry is not None and not self._lost(entry) else None for entry in stored]

    def _lost(self, entry: Entry) -> bool:
        kept = self._kept(entry.subject)
        return kept is not None and entry.sequence > kept

    async def append(self, subject: str, payload: bytes, *, expected: int | None, timeout_s: float, **more: Any) -> int:
        kept = self._kept(subject)
        if kept is not None and expected is not None and expected != kept:
            raise WrongSequence(f"{subject} ends at {kept}")
        return await self._link.append(subject, payload, expected=expected, timeout_s=timeout_s, **more)

    def append_then(self, subject: str, payload: bytes, *, expected: int, then: Appended, **how: Any) -> None:
        kept = self._kept(subject)
        if kept is not None and expected != kept:
            then(WrongSequence(f"{subject} ends at {kept}"))
        else:
            self._link.append_then(subject, payload, expected=expected, then=then, **how)


@contextlib.asynccontextmanager
async def cluster(
    *names: str, owner: str | None = None, shards: int = 1, **settings: Any
) -> AsyncIterator[SmallCluster]:
    """Nodes `names`, every shard assigned to `owner` (the first), bound and open. All of it ends with the block."""
    Ledger.open_gate, Ledger.entered = None, 0
    small = SmallCluster(shards=shards, **settings)
    try:
        await found_or_join(small.link, small.settings)
        await small.directory.start()
        for name in names:
            await small.add(name)
        if names:
            units = [f"shard.{number}" for number in range(shards)]
            await small.assign(owner or names[0], *units)
            for unit in units:
                await small.served_by(owner or names[0], unit)
        yield small
        await small.directory.stop()
    finally:
        if Ledger.open_gate is not None:
            Ledger.open_gate.set()
        for running in small.everyone:
            running.task.cancel()
        ended = await asyncio.gather(*(running.task for running in small.everyone), return_exceptions=True)
        for running in small.everyone:
            await running.node.stop()
        gc.collect()
    for error in ended:
        # A node may be told to go; it may not have died of anything else than what the test did to it.
        assert not isinstance(error, BaseException) or isinstance(error, asyncio.CancelledError | FerryError), error


async def answered(future: asyncio.Future[Answer], within_s: float = 40.0) -> Answer:
    async with asyncio.timeout(within_s):
        return await future


async def posted(small: SmallCluster, entries: list[int]) -> list[asyncio.Future[Answer]]:
    """Writes that come one right behind the other; what will be answered to each."""
    return [await small.post("a", small.command("k", "write", f"m-{entry}", entry=entry)) for entry in entries]
