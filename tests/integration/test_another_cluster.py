"""NATS comes back with new storage: whoever belongs to the old cluster ends and says why; started again, it serves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from routing.client import Cluster
from tests.integration.test_healing import IMPATIENT, until
from workflows.local import EmbeddedServers, LocalCluster

REASON = (
    "ferry: this is another cluster than the one that was joined: its NATS storage is new, or the URL leads elsewhere;"
    " start again"
)
END_S = 20.0


async def test_processes_of_a_cluster_whose_storage_is_new_end_and_serve_again_when_started(tmp_path: Path) -> None:
    """Nothing goes on with the old map: a supervisor has all of it back, with the actors that the new storage knows."""
    with LocalCluster(EmbeddedServers(tmp_path), env=IMPATIENT) as processes:
        # given a node and a coordinator that serve an actor
        old = [processes.add_node("a"), processes.add_coordinator("1")]
        assert await until(_fly(processes.servers.nats_url, "first")) == 1
        assert await until(_fly(processes.servers.nats_url, "second")) == 2

        # when NATS is stopped and comes back on its port with an empty folder
        assert processes.servers.nats is not None
        processes.servers.nats.terminate()
        (tmp_path / "nats").rename(tmp_path / "old-nats")
        processes.servers.start_nats()

        # then both end, and their last words say why
        for process in old:
            assert process.wait(END_S) == 1
            assert process.log_tail(1) == REASON
            assert "Traceback" not in process.log_tail()

        # and started again they serve, without what the old storage knew
        for process in old:
            process.start()
        assert await until(_fly(processes.servers.nats_url, "first")) == 1
        processes.check_alive()


def _fly(nats_url: str, flight: str) -> Callable[[], Awaitable[Any]]:
    """One flight, by a client of its own."""

    async def fly() -> Any:
        async with Cluster.connect(nats_url) as client:
            return await client.send_message("aircraft/N1", "fly", {"distance": 100}, message_id=flight, timeout=1.0)

    return fly
