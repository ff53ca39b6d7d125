"""The real processes of a nemesis run: stopped at their failpoints, killed, frozen, and started again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import suppress

import psutil

from routing.errors import Timeout
from routing.settings import Settings
from tests.nemesis.cases import Fault
from workflows.local import EmbeddedServers, LocalCluster, LocalProcess

SHARDS = 10  # 4, 3 and 3 on three nodes: a move from the fullest leaves the map balanced, and no plan follows
NODES = ("a", "b", "c")
COORDINATORS = ("coordinator-1", "coordinator-2")
WORKERS = ("worker-1", "worker-2")
STOP_S = 30.0  # a node drains first, for at most FERRY_DRAIN_TIMEOUT_S

# About as short as the order of times allows (routing/settings.py). A pause outlives 1.2 step timeouts, after which a
# reconciler sends a step again: so a lost step is driven on by another worker, and not rolled back.
IMPATIENT = {
    "FERRY_SHARDS": str(SHARDS),
    "FERRY_NODE_LEASE_S": "2",
    "FERRY_LEADER_LEASE_S": "2",
    "FERRY_APPEND_TIMEOUT_S": "1",
    "FERRY_DRAIN_HANDLERS_S": "1.5",
    "FERRY_STEP_TIMEOUT_S": "2.5",
    "FERRY_PAUSE_LEASE_S": "6",
    "FERRY_LOCK_LEASE_S": "8",
    "FERRY_TASK_TIME_LIMIT_S": "10",
    "FERRY_VISIBILITY_TIMEOUT_S": "12",
    "FERRY_DEBOUNCE_S": "0.2",
    "FERRY_DRAIN_TIMEOUT_S": "15",
    "FERRY_DEDUP_WINDOW": "4096",  # senders ask again under one id for as long as a case lasts
}


class Fleet:
    """Three nodes, two coordinators and two workers over NATS and Redis, all real processes; a context manager.

    Names are those of LocalCluster (`node-a`, `worker-1`), and `nats` and `redis`. Nothing outlives this process.
    """

    def __init__(self, servers: EmbeddedServers, *, env: Mapping[str, str] = IMPATIENT) -> None:
        """The servers are started and stopped with it; all files are in their folder."""
        self.servers = servers
        self.cluster = LocalCluster(servers, env=env)
        self.nodes: list[str] = []
        self._points = servers.data_dir / "failpoints"
        self._env = env

    def __enter__(self) -> Fleet:
        self.cluster.start()
        try:
            self._points.mkdir(parents=True)
            for node in NODES:
                self.add_node(node)
            for name in COORDINATORS:
                self.cluster.add_coordinator(name.removeprefix("coordinator-"))
            for name in WORKERS:
                self.cluster.add_worker(
                    name.removeprefix("worker-"), env=self._failpoints(name),
                    options=["--loglevel", "INFO", "--without-mingle"],
                )  # fmt: skip
        except BaseException:
            self.cluster.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """All at once, and hard: there is nothing to lose, and some may be frozen."""
        for process in self.cluster.processes.values():
            process.kill9()
        self.cluster.stop()

    def add_node(self, node: str, *, armed: str = "") -> None:
        """Start a node; `armed` is what its failpoint file says from the start on."""
        name = f"node-{node}"
        env = self._failpoints(name)
        self.arm(name, armed)
        self.cluster.add_node(node, "tests.checker.ledger", env=env)
        self.nodes.append(node)

    def remove_node(self, node: str) -> None:
        """Forget a node that has ended."""
        self.cluster.remove(f"node-{node}")
        self.nodes.remove(node)

    @property
    def settings(self) -> Settings:
        """What the processes were told, for connections of our own."""
        return Settings(
            nats_url=self.servers.nats_url, redis_url=self.servers.redis_url, shards=SHARDS,
            append_timeout_s=float(self._env["FERRY_APPEND_TIMEOUT_S"]),
            node_lease_s=float(self._env["FERRY_NODE_LEASE_S"]),
        )  # fmt: skip

    def process(self, name: str) -> LocalProcess:
        server = {"nats": self.servers.nats, "redis": self.servers.redis}.get(name)
        return server if server is not None else self.cluster.processes[name]

    def name_of_process(self, process_id: int) -> str | None:
        return next((name for name, p in self.cluster.processes.items() if p.pid == process_id), None)

    def supervise(self) -> int:
        """Start workers again that have ended by themselves, as operators are told to have done; returns how many.

        Celery's does when Redis dies while it has a task in hand: acknowledging it, kombu stumbles over the connection
        that it has just given up ("'NoneType' object has no attribute 'hostname'").
        """
        return self._start_ended(WORKERS)

    def mend(self) -> None:
        """Start again whatever has ended, so that a run can go on after what it has found."""
        self._start_ended(self.cluster.processes)

    def _start_ended(self, names: Iterable[str]) -> int:
        ended = [self.process(name) for name in names if not self.process(name).running]
        for process in ended:
            process.start()
        return len(ended)

    def not_running(self) -> list[str]:
        """Processes that ended though nobody ended them, in words."""
        names = [*self.cluster.processes, "nats", "redis"]
        processes = {name: self.process(name) for name in names}
        return [f"{name} ended with status {p.returncode}" for name, p in processes.items() if not p.running]

    # -- failpoints --------------------------------------------------------------------------------------------------
    def _failpoints(self, name: str) -> dict[str, str]:
        (self._points / name).write_text("")
        return {"FERRY_FAILPOINTS": f"@{self._points / name}"}

    def arm(self, name: str, specification: str) -> None:
        """Have a process do something at a point, or with "" nothing more. It holds from the next point it passes."""
        draft = self._points / f".{name}"
        draft.write_text(specification)
        draft.replace(self._points / name)  # a process reads the one or the other, never half of it

    def stands_still(self, name: str) -> bool:
        """Whether the process has stopped itself, or was stopped."""
        try:
            return bool(psutil.Process(self.process(name).pid).status() == psutil.STATUS_STOPPED)
        except psutil.NoSuchProcess:
            return False

    def wake_all(self) -> None:
        """Let go on whatever stands still."""
        for name, process in self.cluster.processes.items():
            if self.stands_still(name):
                process.resume()

    def worker_of(self, task_id: str) -> str:
        """The worker that was the latest to receive a task, by the workers' own logs."""
        wanted = f"[{task_id}] received"
        for name in WORKERS:
            if wanted in self.process(name).log_path.read_text(errors="replace"):
                return name
        return WORKERS[0]

    # -- faults ------------------------------------------------------------------------------------------------------
    async def strike(self, name: str, fault: Fault) -> None:
        """Begin a fault; a process that stands at its failpoint ends, stays or goes on as the fault has it."""
        process = self.process(name)
        match fault:
            case Fault.KILL:
                await asyncio.to_thread(process.kill9)
            case Fault.STOP:
                process.pause()
            case Fault.RESTART:
                process.ask_to_stop()

    async def undo(self, name: str, fault: Fault) -> None:
        """End a fault: the process runs again when this returns."""
        process = self.process(name)
        if fault is Fault.STOP:
            process.resume()
            return
        if fault is Fault.RESTART:
            # Only waits: asked a second time, a process stops at once, without draining.
            with suppress(Timeout):
                await asyncio.to_thread(process.wait, STOP_S)
            await asyncio.to_thread(process.kill9)
        if name == "nats":
            await asyncio.to_thread(self.servers.start_nats)
        elif name == "redis":
            await asyncio.to_thread(self.servers.start_redis)
        else:
            process.start()
