"""The migration chain on a real broker, with real workers and real nodes, all of them local processes.

Fixtures with pytest-celery's names replace what it would start in Docker. Those that a test may give its own value,
by overriding or by parametrizing them: `times`, `source_failpoints`, `destination_failpoints`, `worker_failpoints`.

This folder must stay without `__init__.py`: as a package it would shadow Celery wherever `tests` is on the path.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from pytest_celery import CeleryTestSetup, CeleryTestWorker, RedisTestBroker

from routing.client import Cluster
from routing.settings import Settings
from tests.celery.local_nodes import LocalRedis, LocalWorker, StartWorker
from tests.celery.scene import DESTINATION, SOURCE, Scene, until
from workflows.app import app
from workflows.context import open_context
from workflows.local import EmbeddedServers, LocalCluster

SHARDS = 4


# -- what a test may change ------------------------------------------------------------------------------------------
@pytest.fixture
def times() -> dict[str, float]:
    """Settings of every process of the cluster, by the names of `Settings`."""
    return {}


@pytest.fixture
def source_failpoints() -> str:
    return ""


@pytest.fixture
def destination_failpoints() -> str:
    return ""


@pytest.fixture
def worker_failpoints() -> str:
    return ""


# -- processes -------------------------------------------------------------------------------------------------------
@pytest.fixture
def local_cluster(tmp_path: Path, times: dict[str, float]) -> Iterator[LocalCluster]:
    """NATS and Redis run; whatever the test adds does not outlive it."""
    values = {"shards": SHARDS, "logs": 1, **times}
    servers = EmbeddedServers(tmp_path / "servers", sync_always=False, aof=False)
    with LocalCluster(servers, env={f"FERRY_{name.upper()}": str(value) for name, value in values.items()}) as cluster:
        yield cluster
        for process in cluster.processes.values():
            process.kill9()  # how they drain is not what is tested here


@pytest.fixture
def ferry_settings(local_cluster: LocalCluster, times: dict[str, Any]) -> Settings:
    """What the processes of the cluster read from their environment, for the test's own process."""
    servers = local_cluster.servers
    return Settings(nats_url=servers.nats_url, redis_url=servers.redis_url, shards=SHARDS, logs=1, **times)


@pytest.fixture
def nodes(local_cluster: LocalCluster, source_failpoints: str, destination_failpoints: str) -> None:
    """Source and destination, just started."""
    local_cluster.add_node(SOURCE, env={"FERRY_FAILPOINTS": source_failpoints})
    local_cluster.add_node(DESTINATION, env={"FERRY_FAILPOINTS": destination_failpoints})


# -- pytest-celery ---------------------------------------------------------------------------------------------------
@pytest.fixture
def celery_broker(local_cluster: LocalCluster) -> RedisTestBroker:
    """Without parameters, or every test would run on RabbitMQ as well."""
    broker = RedisTestBroker(LocalRedis(local_cluster.servers))
    assert broker.ready()
    return broker


@pytest.fixture
def celery_backend_cluster() -> None:
    """No result backend: Ferry's results are its records."""


@pytest.fixture
def celery_setup_app(celery_setup_config: dict[str, Any]) -> Iterator[Celery]:
    """Ferry's own app, for this test a client of the test's broker. It has read its settings when it was imported."""
    before = {name: app.conf[name] for name in (*celery_setup_config, "task_default_queue")}
    _point_app_at({**celery_setup_config, "task_default_queue": "ferry-default"})
    yield app
    _point_app_at(before)


def _point_app_at(configuration: dict[str, Any]) -> None:
    """Everything that Celery has derived from the earlier values is dropped: connections, producers, queues."""
    app.pool.force_close_all()
    app._pool = None
    app.__dict__.pop("amqp", None)
    app.conf.update(configuration)


@pytest.fixture
def start_worker(local_cluster: LocalCluster, celery_setup_app: Celery, nodes: None) -> StartWorker:
    """Starts a worker that arms failpoints, and returns without waiting for it."""

    def start(failpoints: str = "") -> CeleryTestWorker:
        return CeleryTestWorker(LocalWorker.launch(local_cluster, failpoints=failpoints), app=celery_setup_app)

    return start


@pytest.fixture
def celery_worker(start_worker: StartWorker, worker_failpoints: str) -> Iterator[CeleryTestWorker]:
    worker = start_worker(worker_failpoints)
    yield worker
    worker.teardown()


# -- what a test sees ------------------------------------------------------------------------------------------------
@pytest.fixture
async def scene(celery_setup: CeleryTestSetup, ferry_settings: Settings) -> AsyncIterator[Scene]:
    """Nodes and worker serve, and the source owns every shard."""
    assert celery_setup.ready(docker=True)
    context = await until(lambda: open_context(ferry_settings, name="test"), "a node to found the cluster")
    try:
        async with Cluster.connect(ferry_settings.nats_url) as client:
            scene = Scene(context, client, celery_setup.worker)
            for node in (SOURCE, DESTINATION):
                await until(partial(scene.node, node), f"node {node}")
            await scene.take_ownership()
            yield scene
    finally:
        await context.link.close()
        await context.store.close()
