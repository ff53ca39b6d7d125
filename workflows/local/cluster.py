"""A Ferry cluster of real processes on this machine: what `ferry demo` and the integration tests run."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from routing.errors import InvalidInput, Timeout, Unavailable
from workflows.local.probe import free_port
from workflows.local.process import LocalProcess
from workflows.local.servers import EmbeddedServers

_PROJECT = Path(__file__).resolve().parents[2]


class LocalCluster:
    """Nodes, coordinators, workers and Flower over given servers, each an own process; a context manager.

    It owns the servers from its `start` on and stops them last. Logs are under `<data_dir>/logs/<name>.log`.
    `processes` maps names to LocalProcess in the order of starting, for tests to kill, pause and read.
    """

    def __init__(
        self, servers: EmbeddedServers, *, cluster: str = "default", env: Mapping[str, str] | None = None
    ) -> None:
        """`env` is added to the environment of every process; its FERRY_* settings hold for the whole cluster."""
        self.servers = servers
        self.cluster = cluster
        self.processes: dict[str, LocalProcess] = {}
        self._env = dict(env or {})
        self._kinds: dict[str, str] = {}

    def start(self) -> LocalCluster:
        """Start the servers, and no process yet. Raises as EmbeddedServers.start."""
        self.servers.start()
        return self

    def __enter__(self) -> LocalCluster:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def add_node(
        self, node_id: str, actors: str = "examples.flights", *, env: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> LocalProcess:  # fmt: skip
        """Start `ferry node`. `options` are added to its command line, `["--weight", "2"]` for instance."""
        argv = ["-m", "workflows.cli", "node", "--id", node_id, "--actors", actors, *options]
        return self._add("node", f"node-{node_id}", argv, env)

    def add_coordinator(self, name: str = "1", *, env: Mapping[str, str] | None = None) -> LocalProcess:
        """Start `ferry coordinator`; the first leads, further ones stand by."""
        return self._add("coordinator", f"coordinator-{name}", ["-m", "workflows.cli", "coordinator"], env)

    def add_worker(
        self, name: str = "1", *, env: Mapping[str, str] | None = None, options: Sequence[str] = ()
    ) -> LocalProcess:
        """Start a Celery worker `<name>@<host>`; its pool and concurrency come from the app's settings."""
        argv = ["-m", "celery", "-A", "workflows", "worker", "-n", f"{name}@%h", *options]
        return self._add("worker", f"worker-{name}", argv, env)

    def add_flower(self, port: int | None = None, *, env: Mapping[str, str] | None = None) -> LocalProcess:
        """Start Flower on a loopback port, a free one when None; `flower_url` tells it."""
        self._flower_port = port if port is not None else free_port()
        argv = ["-m", "celery", "-A", "workflows", "flower", f"--port={self._flower_port}", "--address=127.0.0.1"]
        return self._add("flower", "flower", argv, env)

    @property
    def flower_url(self) -> str:
        return f"http://127.0.0.1:{self._flower_port}"

    def check_alive(self) -> None:
        """Raises Unavailable, with the end of its log, when a process that nobody stopped has ended."""
        for process in self.processes.values():
            if not process.running:
                raise Unavailable(
                    f"{process.name} ended with status {process.returncode}; look into {process.log_path}. "
                    f"Its last words:\n{process.log_tail()}"
                )

    def remove(self, name: str, *, grace_s: float = 10.0) -> int:
        """Stop one process for good (a node drains itself first), and return its exit status."""
        status = self.processes[name].terminate(grace_s)
        del self.processes[name], self._kinds[name]
        return status

    def stop(self, *, grace_s: float = 10.0) -> None:
        """Stop everything, who asks before who answers, servers last. Idempotent.

        Each kind is told to end all at once and has `grace_s` for it; what is left then is killed, so that this
        returns within five times that.
        """
        for kind in ("flower", "coordinator", "worker", "node"):
            of_kind = [self.processes[name] for name, its_kind in self._kinds.items() if its_kind == kind]
            terminate_all(of_kind, grace_s=grace_s)
        self.processes.clear()
        self._kinds.clear()
        self.servers.stop()

    def environment(self) -> dict[str, str]:
        """The environment in which a command finds this cluster; also for clients started by a test."""
        return {
            **os.environ,
            **self._env,
            "FERRY_NATS_URL": self.servers.nats_url,
            "FERRY_REDIS_URL": self.servers.redis_url,
            "FERRY_DATA_DIR": str(self.servers.data_dir),
            "FERRY_CLUSTER": self.cluster,
            # Actor modules beside the user, and Ferry itself when it runs from a checkout that is not installed.
            "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), str(_PROJECT), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
        }

    def _add(self, kind: str, name: str, argv: Sequence[str], env: Mapping[str, str] | None) -> LocalProcess:
        if name in self.processes:
            raise InvalidInput(f"{name} is in the cluster already: choose another name, or start it again")
        process = LocalProcess(
            name, [sys.executable, *argv], env={**self.environment(), **(env or {})},
            log_path=self.servers.data_dir / "logs" / f"{name}.log",
        ).start()  # fmt: skip
        self.processes[name] = process
        self._kinds[name] = kind
        return process


def terminate_all(processes: Sequence[LocalProcess], *, grace_s: float) -> None:
    """Ask all to end at once, then give them `grace_s` together before the rest is killed."""
    deadline = time.monotonic() + grace_s
    for process in processes:
        process.ask_to_stop()
    for process in processes:
        with suppress(Timeout):  # kill9 is the answer to that
            process.wait(max(0.0, deadline - time.monotonic()))
        process.kill9()
