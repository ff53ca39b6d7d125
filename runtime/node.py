"""One node: connects, takes its lease, serves commands and moves, drains, leaves.

    start: link -> cluster's birth document -> lease -> map -> subscriptions
    drain: announce "draining" -> the coordinator moves every shard away -> "drained"
    stop:  let running handlers finish -> give the lease back -> disconnect

A kill -9 at any point loses nothing: every acknowledged command is in the journal, every unit is in the map.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import structlog

from routing import control
from routing.birth import found_or_join
from routing.control import InventoryRequest, read_inventory_request, read_migration_request, read_step_request
from routing.directory import Directory
from routing.envelope import Answer, decode_command, encode_answer
from routing.errors import FerryError, Incompatible, InvalidInput, TransientError
from routing.failpoints import Failpoints
from routing.lease import Lease, boottime_s
from routing.link import Link, Message, Subscription
from routing.membership import Membership, NodeState
from routing.router import Router
from routing.settings import Settings
from routing.subjects import Subjects, node_key
from runtime.actor import ActorClasses
from runtime.arrivals import StagedActors
from runtime.catch_up import CatchUp
from runtime.delivery import Delivery
from runtime.handover import Handover
from runtime.host import Host
from runtime.journal import Journal
from runtime.mailbox import Mailboxes
from runtime.reception import Reception
from runtime.snapshots import Snapshots

log = structlog.get_logger("ferry.node")

TICK_S = 0.2
STOP_S = 5.0  # handlers still running after this are abandoned; their commands were not acknowledged


class Node:
    """A node process without its process: give it links and a clock, and it runs on any event loop."""

    def __init__(
        self, settings: Settings, *, link: Link, transfer_link: Link, classes: ActorClasses, weight: float = 1.0,
        role: str = "", incarnation: str | None = None, clock: Callable[[], float] = boottime_s,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        if not settings.node_id:
            raise InvalidInput("a node needs an id: give --id or set FERRY_NODE_ID")
        if not 0 < weight < math.inf:
            raise InvalidInput(f"weight {weight:g} of node {settings.node_id}: must be finite and greater than 0")
        self.id, self.incarnation = settings.node_id, incarnation or uuid.uuid4().hex
        self.state = NodeState.UP
        self._settings, self._link, self._transfer_link, self._classes = settings, link, transfer_link, classes
        self._weight, self._role, self._clock, self._wall_clock = weight, role, clock, wall_clock
        self._failpoints = Failpoints.from_environment()
        self._tasks: set[asyncio.Task[None]] = set()
        self._subscriptions: list[Subscription] = []
        self._failed: asyncio.Future[Any] | None = None
        self._loop: asyncio.AbstractEventLoop
        self.host: Host
        self.router: Router

    # -- life ----------------------------------------------------------------------------------------------------------
    async def start(self) -> None:
        """Raises Incompatible, Unavailable, Timeout; InvalidInput when the id is in use by a living node."""
        settings = self._settings
        self._loop = asyncio.get_running_loop()
        self._failed = self._loop.create_future()
        born = await found_or_join(self._link, settings)
        subjects = self._subjects = Subjects(settings.cluster, born.logs)
        self._lease = Lease(
            self._link, subjects.lease_bucket, node_key(self.id), incarnation=self.incarnation,
            ttl_s=settings.node_lease_s, clock=self._clock,
        )  # fmt: skip
        await self._take_lease()
        counters: Counter[str] = Counter()
        self._directory = Directory(
            self._link, subjects, shards_total=born.shards, timeout_s=settings.append_timeout_s, counters=counters
        )
        self._membership = Membership(
            self._link, subjects, node_lease_s=settings.node_lease_s, clock=self._clock, counters=counters
        )
        journal = Journal(self._link, subjects, shards_total=born.shards, append_timeout_s=settings.append_timeout_s)
        self._arrivals = StagedActors(classes=self._classes, settings=settings, clock=self._clock)
        catch_up = CatchUp(
            journal=journal, classes=self._classes, settings=settings, incarnation=self.incarnation, counters=counters
        )
        snapshots = Snapshots(journal=journal, settings=settings, incarnation=self.incarnation, counters=counters)
        mailboxes = Mailboxes(
            journal=journal, catch_up=catch_up, snapshots=snapshots, classes=self._classes, settings=settings,
            incarnation=self.incarnation, may_serve=self._lease.is_trusted, spawn=self.spawn,
        )  # fmt: skip
        self.host = Host(
            node_id=self.id, incarnation=self.incarnation, link=self._link, directory=self._directory,
            subjects=subjects, settings=settings, mailboxes=mailboxes, arrivals=self._arrivals, spawn=self.spawn,
            may_serve=self._lease.is_trusted,
            clock=self._clock, wall_clock=self._wall_clock, counters=counters,
        )  # fmt: skip
        self._handover = Handover(
            host=self.host, mailboxes=mailboxes, catch_up=catch_up, link=self._link, transfer_link=self._transfer_link,
            directory=self._directory, subjects=subjects, settings=settings, clock=self._clock,
            failpoints=self._failpoints, spawn=self.spawn,
        )  # fmt: skip
        self._reception = Reception(
            host=self.host, catch_up=catch_up, arrivals=self._arrivals, directory=self._directory, settings=settings,
            clock=self._clock, failpoints=self._failpoints,
        )  # fmt: skip
        self.router = Router(
            self._link, self._directory, subjects, sender=self.id, local=self.host, wall_clock=self._wall_clock,
            max_command_bytes=settings.max_command_bytes,
        )  # fmt: skip
        self._verbs = self._control_verbs()
        await self._subscribe(subjects)
        await self._directory.start()
        await self._membership.start()
        self.spawn(self._keep_lease())
        self.spawn(self._keep_ticking())
        log.info("node up", node=self.id, incarnation=self.incarnation, actors=self._classes.types)

    async def _take_lease(self) -> None:
        """An earlier life of this node may still hold the lease; it runs out unless that life is not over.

        A stream that another node has just made may not answer yet: its replicas elect their leader first.
        """
        deadline_s = self._clock() + self._settings.node_lease_s + 2
        first: int | None = None
        while True:
            try:
                if await self._lease.hold(self._lease_document()):
                    return
                holder, sequence = await self._lease.holder()
            except TransientError as error:
                if self._clock() > deadline_s:
                    raise
                log.info("lease not taken yet", node=self.id, error=str(error))
            else:
                if holder is None:  # it has just run out: the mark of its end is newer, but nobody's renewal
                    continue
                first = first if first is not None else sequence
                if sequence != first or self._clock() > deadline_s:
                    raise InvalidInput(f"node id {self.id!r} is in use by a living node: choose another --id")
            await asyncio.sleep(TICK_S)

    async def _subscribe(self, subjects: Subjects) -> None:
        self._subscriptions = [
            await self._link.subscribe(subjects.command(self.id, "*"), self._on_command),
            await self._link.subscribe(subjects.control(self.id, "*"), self._on_control),
            await self._transfer_link.subscribe(subjects.transfer(self.id, "*"), self._on_chunk),
        ]

    async def serve(self, stopping: asyncio.Event) -> None:
        """Run until `stopping` is set, then drain and stop. Raises what made the node unable to go on."""
        assert self._failed is not None
        waiting: asyncio.Future[Any] = asyncio.ensure_future(stopping.wait())
        try:
            await asyncio.wait([waiting, self._failed], return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                self._failed.result()
            await self.drain()
        finally:
            waiting.cancel()
            await self.stop()

    async def drain(self) -> bool:
        """Give every unit away. True when nothing is left; False when nobody could take it, or time ran out."""
        await self._become(NodeState.DRAINING)
        deadline_s = self._clock() + self._settings.drain_timeout_s
        led_at_s = self._clock()
        while self._owned() and self._clock() < deadline_s:
            others = [m for m in self._membership.alive().values() if m.id != self.id and m.takes_shards]
            if self._membership.leader is not None:
                led_at_s = self._clock()
            if not others or self._clock() - led_at_s > self._settings.leader_lease_s:  # a standby may take the lead
                log.warning("stopping with units left: nobody takes them now", node=self.id, units=self._owned())
                return False
            await asyncio.sleep(TICK_S / 2)
        return not self._owned()

    async def stop(self) -> None:
        """Stop serving, give the lease back, disconnect. Idempotent."""
        for subscription in [*self._subscriptions, self._directory, self._membership]:
            try:
                await subscription.stop()
            except TransientError as error:
                log.warning("not unsubscribed", error=str(error))
        self._subscriptions = []
        running = [unit for unit in self.host.units.values() if unit.running]
        await asyncio.gather(*(unit.quiet(STOP_S) for unit in running), return_exceptions=True)
        await self._end_tasks()
        try:
            await self._lease.release()  # after the task that renews it has ended
        except TransientError as error:
            log.warning("lease not released: it runs out by itself", error=str(error))
        await self._transfer_link.close()
        await self._link.close()
        await self._end_tasks()  # of those who were told then that their append is in doubt
        log.info("node stopped", node=self.id)

    async def _end_tasks(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _owned(self) -> int:
        """How many units this node owns: shards, and actors with a key of their own."""
        return sum(1 for entry in self._directory.entries().values() if entry.ownership.owner == self.id)

    async def _become(self, state: NodeState) -> None:
        self.state = state
        try:
            await self._lease.hold(self._lease_document())
        except TransientError as error:
            log.warning("state not announced yet", state=state, error=str(error))

    # -- what runs all the time --------------------------------------------------------------------------------------
    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a task of this node. A bug in one ends the node, loudly; an error of the tree is logged."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or task.exception() is None:
            return
        log.critical("node cannot go on", node=self.id, exc_info=task.exception())
        if self._failed is not None and not self._failed.done():
            self._failed.set_exception(task.exception() or FerryError("unknown"))

    async def _keep_lease(self) -> None:
        pause_s = self._lease.renew_every_s
        while True:
            await asyncio.sleep(pause_s)
            try:
                if not await self._lease.hold(self._lease_document()):
                    raise Incompatible(f"node id {self.id!r} was taken by another process: stop one of the two")
                pause_s = self._lease.renew_every_s
            except TransientError as error:
                pause_s = TICK_S
                log.warning("lease not renewed", node=self.id, trusted=self._lease.is_trusted(), error=str(error))

    async def _keep_ticking(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            await self.host.tick()
            self._arrivals.forget_silent()
            self._handover.forget_resolved()
            if self.state is NodeState.DRAINING and not self._owned():
                await self._become(NodeState.DRAINED)

    def _lease_document(self) -> dict[str, Any]:
        types = self._classes.types
        return {
            "state": self.state, "weight": self._weight, "role": self._role, "types": types,
            "schemas": {name: self._classes.get(name).schema_version for name in types},
            "host": socket.gethostname(), "pid": os.getpid(), "version": ferry_version(),
        }  # fmt: skip

    # -- what arrives ------------------------------------------------------------------------------------------------
    def _on_command(self, message: Message) -> None:
        try:
            command = decode_command(message.payload, max_bytes=self._settings.max_command_bytes)
        except InvalidInput as error:
            self.host.counters["malformed"] += 1
            log.warning("command refused", subject=message.subject, error=str(error))
            if message.reply:
                self.spawn(self._reply(message.reply, encode_answer(Answer(error=error))))
            return
        self.host.deliver(Delivery(command, len(message.payload), message.subject, message.reply))

    def _on_control(self, message: Message) -> None:
        self.spawn(self._control(message.subject.rpartition(".")[2], message))

    async def _control(self, verb: str, message: Message) -> None:
        try:
            if verb not in self._verbs:
                raise InvalidInput(f"verb {verb!r} is unknown here: upgrade this node")
            read, run = self._verbs[verb]
            self._failpoints.hit(verb)
            result: dict[str, Any] | Exception = await run(read(message.payload or b"{}"))
        except FerryError as error:
            if type(error) is InvalidInput:  # its subclasses are about what is installed, not about the message
                self.host.counters["malformed"] += 1
            log.info("refused", verb=verb, error=str(error))
            result = error
        if message.reply:
            await self._reply(message.reply, control.encode_result(result))

    def _on_chunk(self, message: Message) -> None:
        result: dict[str, Any] | Exception = {}
        try:
            self._arrivals.receive(message.payload)
        except FerryError as error:
            if type(error) is InvalidInput:
                self.host.counters["malformed"] += 1
            log.info("chunk refused", subject=message.subject, error=str(error))
            result = error
        if message.reply:
            self.spawn(self._reply(message.reply, control.encode_result(result), link=self._transfer_link))

    async def _reply(self, reply: str, payload: bytes, *, link: Link | None = None) -> None:
        try:
            await (link or self._link).publish(reply, payload)
        except FerryError as error:
            log.warning("answer not sent", error=str(error))  # whoever asked asks again

    def _control_verbs(self) -> dict[str, tuple[Any, Callable[[Any], Coroutine[Any, Any, dict[str, Any]]]]]:
        leaving = ("precopy", "pause", "prepare", "capture", "serialize", "send", "await_ack", "commit", "resume")
        arriving = ("verify", "verify_ahead", "activate")
        return {
            **{verb: (read_step_request, getattr(self._handover, verb)) for verb in leaving},
            **{verb: (read_step_request, getattr(self._reception, verb)) for verb in arriving},
            **dict.fromkeys(
                ("stage", "stage_ahead"), (read_migration_request, self._reception.handle_migration_request)
            ),
            "drain": (control.decode, self._drain_asked),
            "inventory": (read_inventory_request, self._inventory),
            "status": (control.decode, self._status),
        }

    async def _drain_asked(self, _: Any) -> dict[str, Any]:
        if self.state is NodeState.UP:
            await self._become(NodeState.DRAINING)
        return {"state": self.state, "shards": self._owned()}

    async def _inventory(self, asked: InventoryRequest) -> dict[str, Any]:
        """A page of the live actors: `control.Inventory`."""
        page = self.host.inventory(asked.after, asked.skip)
        following = None if page.following is None else {"after": page.following[0], "skip": page.following[1]}
        return {"units": page.units, "next": following}

    async def _status(self, _: Any) -> dict[str, Any]:
        return {
            "id": self.id, "incarnation": self.incarnation, "state": self.state,
            "shards": sum(1 for entry in self._directory.shards().values() if entry.ownership.owner == self.id),
            "actors": self.host.actors_total(), "staged": len(self._arrivals),
            "paused": sorted(unit.name for unit in self.host.units.values() if unit.pause is not None),
            "counters": dict(self.host.counters), "serving": self._lease.is_trusted(),
        }  # fmt: skip


def ferry_version() -> str:
    try:
        return version("actor-ferry")
    except PackageNotFoundError:
        return "0+source"
