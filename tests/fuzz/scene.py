"""A whole cluster that stays up over many examples: two nodes, a leading coordinator and a client, on virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

from routing.control import COORDINATOR, ask
from routing.link import Message
from runtime.testing import MemoryLink
from runtime.testing.virtual_time import VirtualTimeLoop
from tests.unit.cluster import SmallCluster, cluster
from tests.unit.office import coordinator
from tests.unit.virtual_time import until
from workflows.coordinator import Coordinator

T = TypeVar("T")
SHARDS = 2


class Scene:
    """Every example ends with `assert_serving`: all subscriptions alive, nobody died, nothing rose to the loop."""

    def __enter__(self) -> Self:
        self._runner = asyncio.Runner(loop_factory=VirtualTimeLoop)
        self._runner.__enter__()
        self._cluster = cluster("a", "b", shards=SHARDS)
        self.small: SmallCluster
        self.coordinator: Coordinator
        self.run(self._start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.run(self._end())
        finally:
            self._runner.__exit__(kind, error, trace)

    def run(self, act: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(act)

    async def _start(self) -> None:
        self.small = await self._cluster.__aenter__()
        self.coordinator, self._leading, self._stopping = await coordinator(self.small)
        await until(lambda: self.coordinator.leading)
        await self.ask(COORDINATOR, "suspend")  # nobody runs the steps of moves here
        assert await self.small.send("k", "write", entry="first") == 1

    async def _end(self) -> None:
        self._stopping.set()
        await self._leading
        await self._cluster.__aexit__(None, None, None)

    @property
    def link(self) -> MemoryLink:
        return self.small.link

    async def ask(self, node: str, verb: str, message: Any = None) -> dict[str, Any]:
        return await ask(self.link, self.small.subjects, node, verb, message, timeout_s=2.0)

    def malformed(self) -> dict[str, int]:
        """How many refusals each process has counted so far."""
        counters = {name: running.node.host.counters for name, running in self.small.nodes.items()}
        return {name: found["malformed"] for name, found in (counters | {"c": self.coordinator.counters}).items()}

    async def post(self, subject: str, payload: bytes) -> Message | None:
        """Publish as a request would, and wait a moment for the answer; None when there was none."""
        answers: list[Message] = []
        inbox = "_INBOX.fuzz"
        listening = await self.link.subscribe(inbox, answers.append)
        await self.link.publish(subject, payload, reply=inbox)
        await self.settled()
        await listening.stop()
        return answers[0] if answers else None

    async def settled(self) -> None:
        """Everything that is under way has arrived: messages take no time here, steps on the loop they do."""
        await asyncio.sleep(0.02)

    async def assert_serving(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        assert loop.problems == []
        assert await self.small.send("k", "read") == ["first"]
        for name, running in self.small.nodes.items():
            assert not running.task.done()
            assert (running.link.handler_errors, running.transfer_link.handler_errors) == (0, 0)
            assert (await self.ask(name, "status"))["serving"]
        assert not self._leading.done()
        assert (await self.ask(COORDINATOR, "status"))["leader"] == "c"
        assert self.link.handler_errors == 0
