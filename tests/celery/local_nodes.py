"""pytest-celery's broker and worker over local processes: neither a developer's machine nor CI has to have Docker.

pytest-celery asks little of its containers: what docker-py calls `status`, `logs`, `kill` and so on.
`ProcessContainer` offers that over a process of `workflows.local`; on top of it are pytest-celery's own classes.
"""

from __future__ import annotations

import signal as signals
import time
import uuid
from typing import Any, Protocol

from pytest_celery import CeleryTestWorker, CeleryWorkerContainer, RedisContainer

from workflows.local import EmbeddedServers, LocalCluster, LocalProcess

STOP_S = 10.0
READY_S = 45.0


class ProcessContainer:
    """The members of docker-py's Container that pytest-celery uses, for a process that runs already."""

    def __init__(self, process: LocalProcess, *, id: str | None = None) -> None:
        self.process = process
        self.name, self.id = process.name, id or uuid.uuid4().hex
        self.attrs: dict[str, Any] = {  # no network and no ports of its own: nothing there to wait for
            "Config": {"Hostname": "127.0.0.1", "Env": []},
            "HostConfig": {"PortBindings": {}},
            "NetworkSettings": {"Networks": {}, "Ports": {}},
        }

    @property
    def status(self) -> str:
        return "running" if self.process.running else "exited"

    def reload(self) -> None:
        """Docker's client remembers a state and has to be told to look again; `status` here always looks."""

    def logs(self, **_: Any) -> bytes:
        return self.process.log_path.read_bytes()

    def kill(self, signal: str | int | None = None) -> None:
        """As `docker kill`: SIGKILL ends everything in the container, any other signal goes to its main process."""
        number = signals.Signals[signal] if isinstance(signal, str) else signals.Signals(signal or signals.SIGKILL)
        if number is signals.SIGKILL:
            self.process.kill9()
        else:
            self.process.send_signal(number)

    def restart(self, timeout: float = STOP_S) -> None:
        self.process.terminate(timeout)
        self.process.start()


class LocalRedis(RedisContainer):
    """The Redis of embedded servers, which start and stop it."""

    def __init__(self, servers: EmbeddedServers) -> None:
        assert servers.redis is not None
        super().__init__(ProcessContainer(servers.redis))
        self._url = servers.redis_url

    @property
    def url(self) -> str:
        return self._url

    @property
    def host_url(self) -> str:
        return self._url

    @property
    def port(self) -> int:
        return int(self._url.rpartition(":")[2].partition("/")[0])


class LocalWorker(CeleryWorkerContainer):
    """`celery -A workflows worker`, started as a process of a local cluster, which stops it at the latest."""

    @classmethod
    def launch(cls, cluster: LocalCluster, *, failpoints: str = "") -> LocalWorker:
        """Start another worker. Each has a name of its own, the one that pytest-celery asks it by."""
        number = uuid.uuid4().hex
        options = ["--loglevel", cls.log_level(), "-n", f"{cls.worker_name()}@{number[:12]}", "--without-mingle"]
        process = cluster.add_worker(number[:12], env={"FERRY_FAILPOINTS": failpoints}, options=options)
        return cls(ProcessContainer(process, id=number))

    @classmethod
    def worker_name(cls) -> str:
        return "ferry"

    @classmethod
    def worker_queue(cls) -> str:
        from workflows.app import app

        return str(app.conf.task_default_queue)

    def ready(self) -> bool:
        """Look often, where pytest-celery looks once a second. It raises when the worker has ended meanwhile."""
        deadline = time.monotonic() + READY_S
        while self.status == "running" and self.ready_prompt not in self.logs() and time.monotonic() < deadline:
            time.sleep(0.02)
        return bool(super().ready())

    def teardown(self) -> None:
        self._container.process.kill9()


class StartWorker(Protocol):
    """Starts one more worker that arms failpoints, and returns without waiting for it."""

    def __call__(self, failpoints: str = "") -> CeleryTestWorker: ...
