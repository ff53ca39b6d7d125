"""kill -9 of every kind of process: the cluster heals by itself, nothing acknowledged is lost, and status tells."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from routing import control
from routing.address import ActorId, shard_of
from routing.client import Cluster
from routing.control import COORDINATOR
from routing.errors import FerryError
from routing.settings import Settings
from workflows.context import StepContext, open_context
from workflows.local import EmbeddedServers, LocalCluster
from workflows.records import TERMINAL

SHARDS = 12
WAIT_S = 40.0
IMPATIENT = {
    "FERRY_SHARDS": str(SHARDS), "FERRY_NODE_LEASE_S": "2", "FERRY_LEADER_LEASE_S": "2", "FERRY_APPEND_TIMEOUT_S": "1",
}  # fmt: skip
AIRCRAFT = [ActorId("aircraft", f"N{number}") for number in range(40)]


class Healing:
    """A cluster of real processes, a client, and what the leader is asked."""

    def __init__(self, processes: LocalCluster, settings: Settings, context: StepContext, client: Cluster) -> None:
        self.processes, self.settings, self.context, self.client = processes, settings, context, client
        self.flown = 0

    async def fly_all(self) -> None:
        """One more flight for every aircraft; each answer must be the count so far."""
        self.flown += 1
        answers = await asyncio.gather(
            *(
                self.client.send_message(
                    actor, "fly", {"distance": 100}, message_id=f"{actor.key}-{self.flown}", timeout=WAIT_S
                )
                for actor in AIRCRAFT
            )
        )
        assert answers == [self.flown] * len(AIRCRAFT)

    async def ask_leader(self, verb: str, **asked: Any) -> dict[str, Any]:
        return await control.ask(self.context.link, self.context.subjects, COORDINATOR, verb, asked, timeout_s=5.0)

    async def events(self) -> list[str]:
        """What `ferry status` tells, as a user would ask: a process of its own."""
        asked = [sys.executable, "-m", "workflows.cli", "status", "--json"]
        done = await asyncio.to_thread(
            subprocess.run, asked, env=self.processes.environment(), capture_output=True, text=True, timeout=60
        )
        return [event["what"] for event in json.loads(done.stdout)["events"]]

    def shards_of(self, node: str) -> int:
        entries = self.context.directory.entries().values()
        return sum(e.ownership.owner == node and e.ownership.incarnation is not None for e in entries)


@pytest.fixture
async def healing(tmp_path: Path) -> AsyncIterator[Healing]:
    async with _healing(tmp_path) as cluster:
        yield cluster


@asynccontextmanager
async def _healing(folder: Path) -> AsyncIterator[Healing]:
    with LocalCluster(EmbeddedServers(folder / "servers"), env=IMPATIENT) as processes:
        for node in "abc":
            processes.add_node(node)
        processes.add_coordinator("1")
        processes.add_worker("1")
        settings = Settings(
            nats_url=processes.servers.nats_url, redis_url=processes.servers.redis_url, shards=SHARDS,
            node_lease_s=2, leader_lease_s=2,
        )  # fmt: skip
        context: StepContext = await until(lambda: open_context(settings))
        await context.directory.start()
        try:
            async with Cluster.connect(settings.nats_url) as client:
                cluster = Healing(processes, settings, context, client)
                await until(lambda: true(sum(cluster.shards_of(node) for node in "abc") == SHARDS))
                yield cluster
        finally:
            await context.directory.stop()
            await context.link.close()
            await context.store.close()


async def until(ask: Callable[[], Awaitable[Any]]) -> Any:
    """The first answer that is not None; errors of the tree mean that it is not so far yet."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                answer = await ask()
            except FerryError:
                answer = None
            if answer is not None:
                return answer
            await asyncio.sleep(0.05)


async def true(condition: bool) -> bool | None:
    return True if condition else None


async def test_actors_of_a_killed_node_wake_elsewhere_with_all_they_had_acknowledged(healing: Healing) -> None:
    """kill -9 of a node loses nothing that was answered, and nothing is applied twice by those who ask again."""
    # given actors on every node
    await healing.fly_all()
    assert all(healing.shards_of(node) > 0 for node in "abc")

    # when one node is killed, and everybody goes on sending
    healing.processes.processes["node-b"].kill9()
    await healing.fly_all()

    # then its shards have found new owners, and the status says what happened
    await until(lambda: true(healing.shards_of("b") == 0 and healing.shards_of("a") + healing.shards_of("c") == SHARDS))
    events = await healing.events()
    assert any("node b is gone" in event and "failed over to a, c" in event for event in events), events


async def test_a_standby_leads_when_the_leading_coordinator_is_killed(healing: Healing) -> None:
    """Moves can be asked for again within seconds, of somebody else."""
    # given a leader and a standby
    leader = (await until(lambda: healing.ask_leader("status")))["leader"]
    healing.processes.add_coordinator("2")
    await healing.fly_all()

    # when the leader is killed
    healing.processes.processes["coordinator-1"].kill9()

    # then another leads, says so, and moves a shard
    async def led_by_another() -> str | None:
        answered = (await healing.ask_leader("status"))["leader"]
        return answered if answered != leader else None

    successor = await until(led_by_another)
    shard = shard_of(AIRCRAFT[0], SHARDS)
    here = await healing.client.get_actor_node(AIRCRAFT[0])
    there = "a" if here != "a" else "b"
    plan_id = (await healing.ask_leader("migrate", shard=shard, destination=there))["plan"]["id"]

    async def moved() -> Any:
        moves = await healing.context.store.moves(plan_id=plan_id)
        return moves[0] if moves and moves[0].status in TERMINAL else None

    move = await until(moved)
    assert move.status == "completed", move.error
    assert f"coordinator {successor} leads" in await healing.events()
    await healing.fly_all()


async def test_moves_of_a_killed_worker_end_and_their_actors_are_served(healing: Healing) -> None:
    """With the only worker killed in the middle of a plan, every record still becomes terminal."""
    # given a plan under way: a fourth node has joined, and the worker stands still in the middle of a move
    await healing.fly_all()
    healing.processes.remove("worker-1")
    healing.processes.add_worker("1", env={"FERRY_FAILPOINTS": "capture.begin=stop*1"})
    healing.processes.add_node("d")

    worker = psutil.Process(healing.processes.processes["worker-1"].pid)

    async def stands_still() -> bool | None:
        return True if worker.status() == psutil.STATUS_STOPPED else None

    await until(stands_still)
    assert await healing.context.store.unfinished_moves()
    assert any(entry.ownership.move for entry in healing.context.directory.entries().values())

    # when the worker is killed, and replaced as a supervisor would
    healing.processes.processes["worker-1"].kill9()
    await healing.fly_all()
    healing.processes.add_worker("2")

    # then the plan ends, the new node has its share, and nobody has lost a flight
    async def settled() -> bool | None:
        unfinished = await healing.context.store.unfinished_moves()
        return True if not unfinished and healing.shards_of("d") == SHARDS // 4 else None

    await until(settled)
    await healing.fly_all()


def test_a_worker_never_loads_the_actor_host() -> None:
    """No task imports a module of `runtime`: a worker moves state, it never runs it."""
    program = "import sys, workflows.migration; print([m for m in sys.modules if m.split('.')[0] == 'runtime'])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=dict(os.environ), check=True
    )
    assert done.stdout.strip() == "[]"
