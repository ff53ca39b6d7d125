"""A worker dies with SIGKILL in the middle of a move. Redis redelivers its task in an hour: others must end the move.

Either the source does, which bears a closed gate only as long as its pause lease; or a coordinator drives the move on
with another worker. Whoever is first, the record says how it ended, and nobody who uses the actors loses a command.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from routing.nats_link import NatsLink
from routing.settings import Settings
from routing.shard_map import Outcome
from routing.subjects import SUSPENDED_KEY, kv_subject
from tests.celery.local_nodes import StartWorker
from tests.celery.scene import SHARD, Scene, until
from workflows import reconciler
from workflows.coordinator import Coordinator
from workflows.records import TERMINAL, MigrationStatus
from workflows.store import RecordStore

REDELIVERY_S = 3_600.0
IMPATIENT = {
    "append_timeout_s": 1.0, "drain_handlers_s": 1.5, "step_timeout_s": 2.0, "pause_lease_s": 3.0, "lock_lease_s": 5.0,
    "visibility_timeout_s": REDELIVERY_S,
}  # fmt: skip
PATIENT = {"pause_lease_s": 50.0, "lock_lease_s": 55.0, "visibility_timeout_s": REDELIVERY_S}


@pytest.fixture(autouse=True)
def reconciling_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that takes a move for stuck after a second, not six."""
    for name, value in {"STUCK_STEPS": 0.2, "EVERY_S": 0.2}.items():
        monkeypatch.setattr(reconciler, name, value)


@asynccontextmanager
async def leading(scene: Scene, settings: Settings) -> AsyncIterator[None]:
    """A coordinator leads. Automatic rebalancing is off, so that it only looks after the moves there are."""
    bucket = scene.context.subjects.map_bucket
    await scene.context.link.append(kv_subject(bucket, SUSPENDED_KEY), b"true", expected=None, timeout_s=5.0)
    leader = Coordinator(
        settings, name="test", link=await NatsLink.connect(settings.nats_url, name="coordinator"),
        store=RecordStore.connect(settings.redis_url, settings.cluster), launch=scene.launch,
    )  # fmt: skip
    await leader.start()
    stopping = asyncio.Event()
    serving = asyncio.create_task(leader.serve(stopping))
    try:
        yield
    finally:
        stopping.set()
        await serving


@pytest.mark.parametrize("times", [IMPATIENT], ids=["impatient"])
@pytest.mark.parametrize("worker_failpoints", ["capture.begin=kill", "await_ack.begin=kill"])
async def test_a_source_that_nobody_drives_on_opens_its_gate_by_itself(scene: Scene, ferry_settings: Settings) -> None:
    """Without any worker or coordinator left, a paused shard is served again after the pause lease."""
    async with scene.traffic() as traffic:
        # given a worker that dies while the shard is paused, and nobody else
        planned = await scene.plan_move()
        await scene.launch(planned)
        await scene.worker_killed()

        # when the pause lease has run out
        async def aborted() -> bool:
            return (await scene.owner()).outcome_of(planned.id) is Outcome.ABORTED

        await until(aborted, "the source to abort the move")

        # then the source serves on, although the record does not know yet
        await traffic.goes_on()
        assert (await scene.record(planned)).status not in TERMINAL

        # and a coordinator writes down how the move has ended
        async with leading(scene, ferry_settings):
            move = await scene.ended(planned)

    assert move.status is MigrationStatus.ROLLED_BACK
    assert move.error is not None
    await scene.assert_kept(move)
    await traffic.check_totals()


@pytest.mark.parametrize("times", [IMPATIENT], ids=["impatient"])
async def test_a_source_whose_lock_no_pause_follows_releases_it_by_itself(
    scene: Scene, ferry_settings: Settings
) -> None:
    """A worker may die between LOCK and asking for the pause: the lock, too, is borne for a pause lease only."""
    async with scene.traffic() as traffic:
        # given a lock in the map, and nobody who follows it
        planned = await scene.plan_move()
        await scene.context.lock(planned)

        # when the lease has run out
        async def aborted() -> bool:
            return (await scene.owner()).outcome_of(planned.id) is Outcome.ABORTED

        await until(aborted, "the source to abort the move")

        # then a coordinator writes it down, and the source has served all the time
        async with leading(scene, ferry_settings):
            move = await scene.ended(planned)
        await traffic.goes_on()

    assert move.status is MigrationStatus.ROLLED_BACK
    await scene.assert_kept(move)
    await traffic.check_totals()


@pytest.mark.parametrize("times", [PATIENT], ids=["patient"])
@pytest.mark.parametrize(
    "worker_failpoints", ["pause.begin=kill", "serialize.begin=kill", "send.end=kill", "delete.begin=kill"]
)
async def test_a_coordinator_drives_on_what_a_killed_worker_has_left(
    scene: Scene, ferry_settings: Settings, start_worker: StartWorker
) -> None:
    """The move goes on from its step with another worker; moves that were waiting in the dead one's queue do, too."""
    async with scene.traffic() as traffic:
        # given several moves, and a worker that dies in one of them
        planned = [await scene.plan_move(shard) for shard in (SHARD, 2, 3)]
        for move in planned:
            await scene.launch(move)
        await scene.worker_killed()

        # when another worker and a coordinator are there
        assert start_worker().ready()
        async with leading(scene, ferry_settings):
            moves = [await scene.ended(move) for move in planned]
        await traffic.goes_on()

    # then every move is complete
    assert [(move.status, move.error) for move in moves] == [(MigrationStatus.COMPLETED, None)] * 3
    for move in moves:
        await scene.assert_moved(move)
    await traffic.check_totals()


async def test_a_move_whose_worker_died_after_the_commit_is_recorded_as_complete(
    scene: Scene, ferry_settings: Settings
) -> None:
    """The map decides, the record reports: a coordinator writes down what the dead worker could not."""
    async with scene.traffic() as traffic:
        # given a shard that the map has given away, which the record does not say yet
        planned = await scene.plan_move()
        await scene.commit_unrecorded(planned)

        # when a coordinator leads
        async with leading(scene, ferry_settings):
            move = await scene.ended(planned)
        await traffic.goes_on()

    # then the record says so
    assert move.status is MigrationStatus.COMPLETED
    await scene.assert_moved(move)
    await traffic.check_totals()
