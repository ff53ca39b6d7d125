"""LocalCluster's own part: what its processes are told, what their deaths look like, and that all of it ends."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from routing.errors import InvalidInput, Unavailable
from tests.integration.waiting import until
from workflows.local import EmbeddedServers, LocalCluster


def test_a_node_that_dies_is_reported_with_its_last_words(tmp_path: Path) -> None:
    """Tests and the demo ask `check_alive` while they wait, so that a start that failed is not waited for."""
    with LocalCluster(EmbeddedServers(tmp_path)) as cluster:
        node = cluster.add_node("a", options=["--no-such-option"])
        assert until(lambda: not node.running)

        with pytest.raises(Unavailable) as failure:
            cluster.check_alive()

        assert str(failure.value).startswith(f"node-a ended with status {node.returncode}; look into {node.log_path}")
        assert node.log_tail(1) in str(failure.value)
        assert node.log_tail(1) != ""


def test_a_name_is_used_once(tmp_path: Path) -> None:
    """Two processes that share a node id would fence each other off, and share a log."""
    with LocalCluster(EmbeddedServers(tmp_path)) as cluster:
        cluster.add_node("a")

        with pytest.raises(InvalidInput, match="node-a is in the cluster already"):
            cluster.add_node("a")


def test_processes_are_told_where_the_servers_are(tmp_path: Path) -> None:
    """By environment: settings of the cluster win over those of the shell, modules of the current folder import."""
    with LocalCluster(EmbeddedServers(tmp_path), cluster="blue", env={"FERRY_SHARDS": "16"}) as cluster:
        environment = cluster.environment()

    assert environment["FERRY_CLUSTER"] == "blue"
    assert environment["FERRY_SHARDS"] == "16"
    assert environment["FERRY_NATS_URL"] == cluster.servers.nats_url
    assert environment["FERRY_REDIS_URL"] == cluster.servers.redis_url
    assert environment["FERRY_DATA_DIR"] == str(tmp_path)
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == os.getcwd()


def test_a_stop_ends_every_process_and_the_servers(tmp_path: Path) -> None:
    """Whatever state they are in: just started, paused, or ended by themselves."""
    cluster = LocalCluster(EmbeddedServers(tmp_path)).start()
    started = [cluster.add_node("a"), cluster.add_coordinator(), cluster.add_worker(), cluster.add_flower()]
    started[0].pause()

    cluster.stop(grace_s=2.0)
    cluster.stop()

    assert not any(psutil.pid_exists(process.pid) for process in started)
    assert not (tmp_path / "servers.json").exists()
    with EmbeddedServers(tmp_path):
        pass
