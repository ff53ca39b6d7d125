"""The processes of a simulated cluster: each runs production code, can be killed, stopped, cut off, and comes back."""

from __future__ import annotations

import asyncio
import traceback
from random import Random
from typing import TYPE_CHECKING, Any

from routing.directory import Directory
from routing.errors import FerryError, InvariantViolated, TransientError
from routing.router import Router
from runtime.actor import ActorClasses
from runtime.node import Node
from runtime.testing import MemoryLink
from runtime.testing.process import Process, ProcessState
from runtime.testing.virtual_time import WALL_OFFSET_S
from tests.checker.ledger import Ledger
from tests.simulation.broker import CONCURRENCY
from workflows.context import StepContext
from workflows.coordinator import Coordinator

if TYPE_CHECKING:
    from tests.simulation.world import World

RESTART_S = 0.2  # after a process ended by itself
CLASSES = ActorClasses([Ledger])


class Clock:
    """A machine's two clocks: one never goes back and may jump ahead (a suspended VM), one may be set to anything."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.ahead_s = 0.0
        self.wall_ahead_s = 0.0

    def boottime_s(self) -> float:
        return self._loop.time() + self.ahead_s

    def wall_s(self) -> float:
        return self._loop.time() + WALL_OFFSET_S + self.wall_ahead_s


class Machine:
    """A place where one process after another runs the same program, as under a supervisor."""

    kind = ""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.clock = Clock(world.loop)
        self.lives = 0
        self.wanted = True  # whether it is to run; False: it has left for good
        self.links: list[MemoryLink] = []
        self.process = Process(f"{name}-0")
        self.process.state = ProcessState.DEAD

    @property
    def up(self) -> bool:
        return self.process.state is ProcessState.UP

    @property
    def dead(self) -> bool:
        return self.process.state is ProcessState.DEAD

    def start(self) -> None:
        """Begin a new life, if none is going on."""
        if not self.dead or not self.wanted:
            return
        self.lives += 1
        self.process = Process(f"{self.name}-{self.lives}")
        self.links = []
        self.process.spawn(self._live(self.process))

    def kill(self) -> None:
        if self.dead:
            return
        self.process.kill()
        for link in self.links:
            link.die()

    def stop(self) -> None:
        self.process.stop()

    def resume(self) -> None:
        self.world.loop.resume(self.process)

    def heal(self) -> None:
        """Whatever was done to it is over."""
        self.clock.wall_ahead_s = 0.0
        self.resume()
        for link in self.links:
            link.reconnect()
        self.start()

    def link(self, name: str) -> MemoryLink:
        link = self.world.nats.link(name, self.process)
        self.links.append(link)
        return link

    async def _live(self, process: Process) -> None:
        """Run the program; when it ends, by itself or with an error of the tree, the process ends with it."""
        try:
            await self.run()
        except InvariantViolated as error:
            self.world.problem(f"{process.name} ended with {error!r}")
        except FerryError as error:
            self.world.note(f"{process.name} ended: {error!r}")
        except Exception as error:
            self.world.problem(f"{process.name} ended with {''.join(traceback.format_exception(error))}")
        process.kill()
        for link in self.links:
            link.die()
        self.world.loop.call_later(RESTART_S, self.start, context=self.world.nats.context)

    async def run(self) -> None:
        raise NotImplementedError


class NodeMachine(Machine):
    kind = "node"

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.node: Node | None = None
        self.leaving = asyncio.Event()

    async def run(self) -> None:
        world = self.world
        self.node = None
        node = Node(
            world.settings_of(self.name), link=self.link(self.name), transfer_link=self.link(f"{self.name}-transfer"),
            classes=CLASSES, incarnation=self.process.name, clock=self.clock.boottime_s, wall_clock=self.clock.wall_s,
        )  # fmt: skip
        await node.start()
        self.node = node
        await node.serve(self.leaving)

    def leave(self) -> None:
        """SIGTERM: drain, then end for good."""
        self.wanted = False
        self.leaving.set()


class CoordinatorMachine(Machine):
    kind = "coordinator"

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.coordinator: Coordinator | None = None

    async def run(self) -> None:
        world = self.world
        store: Any = world.shelf
        self.coordinator = Coordinator(
            world.settings, name=self.name, link=self.link(self.name), store=store, launch=world.broker.launch,
            clock=self.clock.boottime_s, wall_clock=self.clock.wall_s,
        )  # fmt: skip
        await self.coordinator.start()
        await self.coordinator.serve(asyncio.Event())


class WorkerMachine(Machine):
    kind = "worker"

    async def run(self) -> None:
        world = self.world
        link = self.link(self.name)
        subjects = world.settings.subjects
        directory = Directory(
            link, subjects, shards_total=world.profile.shards, timeout_s=world.settings.append_timeout_s
        )
        store: Any = world.shelf
        context = StepContext(
            link=link, subjects=subjects, directory=directory, store=store, settings=world.settings,
            wall_clock=self.clock.wall_s,
        )  # fmt: skip
        async with asyncio.TaskGroup() as group:
            for _ in range(CONCURRENCY):
                group.create_task(world.broker.work(context))


class SenderMachine(Machine):
    """A client application. It is never killed, so that every operation has an end that somebody saw."""

    kind = "sender"

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.router: Router | None = None
        self.over = False

    async def run(self) -> None:
        world, link = self.world, self.link(self.name)
        subjects = world.settings.subjects
        directory = Directory(link, subjects, shards_total=world.profile.shards)
        while True:
            try:
                await directory.start()
                break
            except TransientError:
                await asyncio.sleep(0.1)
        self.router = Router(link, directory, subjects, sender=self.name, wall_clock=self.clock.wall_s)
        await world.send_all(self, Random(world.chance.random()))
        self.over = True
        await asyncio.Event().wait()
