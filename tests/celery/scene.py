"""What a test of the migration chain sees: two nodes, the map, the records, and a client of the actors."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from pytest_celery import CeleryTestWorker

from routing import control, shard_map
from routing.address import ActorId
from routing.client import Cluster
from routing.envelope import Answer, Command, decode_answer, encode_command
from routing.errors import TransientError
from routing.shard_map import LastMove, Outcome, Ownership
from routing.subjects import shard_key
from tests.celery.traffic import Traffic
from workflows import migration
from workflows.context import StepContext
from workflows.records import STEPS, TERMINAL, MigrationPlan, MigrationStatus, Move

T = TypeVar("T")

SOURCE, DESTINATION = "a", "b"
SHARD = 1
WAIT_S = 45.0  # until a condition that comes true within a second or two on an idle machine
LOOK_EVERY_S = 0.02


@dataclass(slots=True)
class Scene:
    """A cluster whose source owns every shard. It has no coordinator: nothing moves that a test did not launch."""

    context: StepContext
    client: Cluster
    worker: CeleryTestWorker

    # -- moving ------------------------------------------------------------------------------------------------------
    async def take_ownership(self) -> None:
        """Give every shard to the source and wait until it serves them, as a coordinator does at a cluster's birth."""
        directory = self.context.directory
        for shard in range(directory.shards_total):
            await directory.transition(shard_key(shard), None, shard_map.assign(SOURCE))
        for shard in range(directory.shards_total):
            await until(partial(self._is_bound, shard), f"{SOURCE} to take shard {shard}")

    async def _is_bound(self, shard: int) -> bool:
        return (await self.owner(shard)).incarnation is not None

    async def plan_move(self, shard: int = SHARD) -> Move:
        """The record of a move that is ready to be launched: what the coordinator stores before it sends a chain."""
        entry = await self.context.directory.refresh(shard_key(shard))
        assert entry is not None
        now = time.time()
        plan = MigrationPlan(id=f"p{uuid.uuid4().hex[:12]}", reason="test", created_at=now, started_at=now)
        move = Move(
            id=f"m{uuid.uuid4().hex[:12]}", plan_id=plan.id, unit=shard_key(shard), shard=shard, source=SOURCE,
            destination=DESTINATION, created_at=now,
        )  # fmt: skip
        [stored] = await self.context.store.create_plan(plan, [move], {})
        task_ids = {step: str(uuid.uuid4()) for step in STEPS}
        return await self.context.store.save(
            replace(stored, lock_revision=entry.revision, started_at=now, step_at=now, task_ids=task_ids)
        )

    async def launch(self, move: Move) -> None:
        """Send the chain to the workers. In a thread, because Celery's client blocks."""
        await asyncio.to_thread(migration.launch, move)

    async def ask_once(self, actor: ActorId, number: int) -> Answer:
        """Send one flight to the source as a single message, and wait for whoever answers it. No client asks again."""
        expires_ms = int((time.time() + WAIT_S) * 1000)
        command = Command(
            actor=actor, name="fly", arguments={"distance": 1}, message_id=f"once-{number}", expires_ms=expires_ms
        )
        subject = self.context.subjects.command(SOURCE, "test")
        return decode_answer(await self.context.link.request(subject, encode_command(command), timeout_s=WAIT_S))

    async def commit_unrecorded(self, planned: Move) -> None:
        """Take a move as far as a worker does that dies right after COMMIT: the map has it, the record does not."""
        for step in migration.CHAIN[:-2]:  # the task of the next one would have COMMIT asked for
            await migration.driver.take(step, self.context, planned.id, 0)

        async def all_taken_ahead() -> Move | None:
            move = await self.record(planned)
            return move if move.status is MigrationStatus.ACKED else None

        acked = await until(all_taken_ahead, "all steps up to COMMIT to be taken ahead")
        await self.context.ask(planned.source, "commit", acked)
        assert (await self.owner(planned.shard)).outcome_of(planned.id) is Outcome.COMMITTED
        assert (await self.record(planned)).status is MigrationStatus.ACKED

    async def succeeded(self, task_id: str, *, times: int = 1) -> None:
        """Wait until the worker has run a task this often without an error."""

        async def enough() -> bool:
            return bool(self.worker.logs().count(f"[{task_id}] succeeded") >= times)

        await until(enough, f"task {task_id} to succeed {times} times")

    async def worker_killed(self) -> None:
        async def exited() -> bool:
            return bool(self.worker.container.status == "exited")

        await until(exited, "the worker to be killed")

    # -- looking -----------------------------------------------------------------------------------------------------
    def traffic(self, shard: int = SHARD) -> Traffic:
        return Traffic(self.client, shard=shard, shards_total=self.context.directory.shards_total)

    async def record(self, move: Move) -> Move:
        stored = await self.context.store.move(move.id)
        assert stored is not None
        return stored

    async def ended(self, move: Move) -> Move:
        """The move's record once it is terminal."""

        async def terminal() -> Move | None:
            stored = await self.record(move)
            return stored if stored.status in TERMINAL else None

        return await until(terminal, f"move {move.id} to end")

    async def history(self, move: Move) -> list[MigrationStatus]:
        """Every status that the move's audit trail says it has reached, oldest first."""
        events = await self.context.store.audit(limit=1_000)
        return [event.after for event in reversed(events) if event.move_id == move.id]

    async def owner(self, shard: int = SHARD) -> Ownership:
        """What the map says of a shard now."""
        entry = await self.context.directory.refresh(shard_key(shard))
        assert entry is not None
        return entry.ownership

    async def node(self, node: str) -> dict[str, Any]:
        """What a node says of itself: `shards`, `paused`, `staged` and so on."""
        return await control.ask(self.context.link, self.context.subjects, node, "status", timeout_s=5.0)

    async def at_rest(self) -> None:
        """Wait until nothing is paused at the source and nothing staged at the destination."""

        async def resting() -> bool:
            nodes = [await self.node(SOURCE), await self.node(DESTINATION)]
            return not any(node["paused"] or node["staged"] for node in nodes)

        await until(resting, "gates to open and staged state to be dropped")

    async def assert_moved(self, move: Move) -> None:
        """The map, both nodes and the client agree that the destination has the shard."""
        ownership = await self.owner(move.shard)
        assert (ownership.owner, ownership.move) == (DESTINATION, None)
        assert ownership.last == LastMove(move=move.id, outcome=Outcome.COMMITTED, epoch=ownership.epoch)
        assert await self.client.get_actor_node(self.traffic(move.shard).aircraft[0]) == DESTINATION
        await self.at_rest()

    async def assert_kept(self, move: Move) -> None:
        """The map, both nodes and the client agree that the source has kept the shard."""
        ownership = await self.owner(move.shard)
        assert (ownership.owner, ownership.move) == (SOURCE, None)
        assert ownership.last == LastMove(move=move.id, outcome=Outcome.ABORTED, epoch=ownership.epoch)
        assert await self.client.get_actor_node(self.traffic(move.shard).aircraft[0]) == SOURCE
        await self.at_rest()


async def until(ask: Callable[[], Awaitable[T | None]], what: str, *, within_s: float = WAIT_S) -> T:
    """Ask until the answer is true, and return it. Fails naming `what` when it does not come in time."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            answer = await ask()
        except TransientError:
            answer = None  # whoever was asked is not there yet, or busy
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {within_s:g} s for {what}")
        await asyncio.sleep(LOOK_EVERY_S)
