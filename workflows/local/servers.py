"""NATS and Redis as children of this process, on files in one folder: what runs when no URL names other servers.

    <data_dir>/servers.json   {"pid", "nats_url", "redis_url"} while they run; how other commands find them
    <data_dir>/nats/          the JetStream store          <data_dir>/nats.log    <data_dir>/nats.lock
    <data_dir>/redis/         the append-only file         <data_dir>/redis.log   <data_dir>/redis.lock

What a crash leaves behind: kill -9 of the owner takes the servers with it (on Linux), and loses nothing they had
acknowledged: NATS has synced it, Redis has handed it to the kernel. `servers.json` then names a dead process, which
readers see and the next start overwrites. Only a power cut loses up to a second of Redis: records and queued steps,
which the reconciler makes up from the map.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from routing.errors import NotApplicable, Unavailable
from workflows.local.binaries import nats_server_binary, redis_server_binary
from workflows.local.claim import Claim
from workflows.local.probe import free_port, port_is_free, redis_process_id
from workflows.local.process import LocalProcess

MAX_PAYLOAD_BYTES = 8 * 2**20  # the most nats-server advises; a command with its events and its reply must fit
MAX_CONSUMERS = 100_000  # every router watches the map with one; the server's own default of 1,000 a stream is too few

SMALL_MACHINE = 2  # cores

_PORT_TRIES = 5  # a free port can be taken between our look and Redis' bind, hardly five times in a row
_LOOK_EVERY_S = 0.01
_STOP_GRACE_S = 10.0


class EmbeddedServers:
    """The two servers, started and stopped together; a context manager.

    Invariants: (1) `servers.json` exists only while both are meant to run, and names this process; (2) a data folder
    has at most one pair of servers (see Claim); (3) neither outlives this process (see LocalProcess). Checked in
    tests/integration/test_embedded_servers.py.

    After `start`, `nats` and `redis` are the processes, to be killed or paused by tests; `start_nats` and
    `start_redis` bring one back on its old port with its data.
    """

    def __init__(
        self, data_dir: str | Path, *, sync_always: bool = True, aof: bool = True,
        nats_port: int | None = None, redis_port: int | None = None, start_timeout_s: float = 30.0,
    ) -> None:  # fmt: skip
        """Ports that are None are chosen free. `sync_always`: NATS syncs to disk before it acknowledges, else every
        two minutes. `aof`: Redis keeps its data, else it starts empty. The deadline includes loading the data.
        """
        self.data_dir = Path(data_dir).resolve()
        self.nats: LocalProcess | None = None
        self.redis: LocalProcess | None = None
        self._sync_always = sync_always
        self._aof = aof
        self._nats_port = nats_port
        self._redis_port = redis_port
        self._start_timeout_s = start_timeout_s
        self._claims: dict[str, Claim] = {}

    def start(self) -> EmbeddedServers:
        """Start both and return when both answer.

        Raises InvalidInput when the folder cannot be used, or another live process uses it, Incompatible when a server
        is not installed, Unavailable with the end of its log when one dies or stays silent; then nothing runs.
        """
        if self._claims:
            raise NotApplicable(f"the servers of {self.data_dir} already run: stop them first")
        try:
            for server in ("nats", "redis"):
                self._claims[server] = Claim(self.data_dir, server)
            self.start_nats()
            self.start_redis()
            announce(self.data_dir, nats_url=self.nats_url, redis_url=self.redis_url)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop both within a bound, keep their data, free the folder. Idempotent; safe after a failed start."""
        if len(self._claims) == 2:
            withdraw(self.data_dir)
        for server in (self.redis, self.nats):
            if server is not None:
                server.terminate(_STOP_GRACE_S)
        for claim in self._claims.values():
            claim.release()
        self._claims = {}

    def __enter__(self) -> EmbeddedServers:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def nats_url(self) -> str:
        return f"nats://127.0.0.1:{self._nats_port}"

    @property
    def redis_url(self) -> str:
        return f"redis://127.0.0.1:{self._redis_port}/0"

    def start_nats(self) -> None:
        """Start NATS, on the port it had before if it had one. Raises as `start`."""
        if self._nats_port is not None:
            check_port("NATS", self._nats_port, "FERRY_NATS_URL")
        argv = nats_argv(self.data_dir, port=self._nats_port, sync_always=self._sync_always)
        server = LocalProcess(
            "nats-server", argv, env=nats_environment(sync_always=self._sync_always),
            log_path=self.data_dir / "nats.log", pass_fds=[self._claims["nats"].descriptor],
        ).start()  # fmt: skip
        self.nats = server

        def listening() -> bool:
            port = _reported_port(self.data_dir, server.pid)  # once: it may appear between two looks
            if port is not None:
                self._nats_port = port
            return port is not None

        self._await(server, listening)

    def start_redis(self) -> None:
        """Start Redis, on the port it had before if it had one. Raises as `start`."""
        if self._redis_port is not None:
            check_port("Redis", self._redis_port, "FERRY_REDIS_URL")
            self._start_redis_on(self._redis_port)
            return
        # Redis cannot choose a port by itself.
        for tries_left in reversed(range(_PORT_TRIES)):
            port = free_port()
            try:
                self._start_redis_on(port)
            except Unavailable:
                if tries_left == 0 or port_is_free(port):  # the port was not the trouble
                    raise
            else:
                self._redis_port = port
                return

    def _start_redis_on(self, port: int) -> None:
        server = LocalProcess(
            "redis-server", redis_argv(self.data_dir, port=port, aof=self._aof),
            log_path=self.data_dir / "redis.log", pass_fds=[self._claims["redis"].descriptor],
        ).start()  # fmt: skip
        self.redis = server
        # Its own process id, because a stranger on the same port answers just as well while ours is still failing.
        self._await(server, lambda: redis_process_id(port) == server.pid)

    def _await(self, server: LocalProcess, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while not ready():
            if not server.running:
                raise Unavailable(_failure(server, f"ended with status {server.returncode} at its start"))
            if time.monotonic() > deadline:
                server.kill9()
                raise Unavailable(_failure(server, f"was not ready after {self._start_timeout_s:g} s"))
            time.sleep(_LOOK_EVERY_S)


def nats_argv(data_dir: Path, *, port: int | None, sync_always: bool) -> list[str]:
    """The command line of an embedded NATS; writes its configuration file. Raises Incompatible, OSError."""
    ports_dir = data_dir / "nats" / "ports"
    ports_dir.mkdir(parents=True, exist_ok=True)
    for stale in ports_dir.glob("*.ports"):  # of servers killed; a process id may come back
        stale.unlink(missing_ok=True)
    config = data_dir / "nats" / "server.conf"
    config.write_text(
        "\n".join(
            [
                "# Written at every start of Ferry's embedded NATS; changes here are lost.",
                f'listen: "127.0.0.1:{-1 if port is None else port}"',
                "server_name: ferry-embedded",
                f"max_payload: {MAX_PAYLOAD_BYTES}",
                f"ports_file_dir: {_quoted(ports_dir)}",
                "jetstream {",
                f"  store_dir: {_quoted(data_dir / 'nats')}",
                *(["  sync_interval: always"] if sync_always else []),
                f"  limits {{ default_max_consumers: {MAX_CONSUMERS} }}",
                "}",
                "",
            ]
        )
    )
    return [str(nats_server_binary()), "-c", str(config)]


def nats_environment(*, sync_always: bool) -> dict[str, str]:
    """On a small machine an embedded NATS that syncs each write works on one core at a time, unless you say otherwise.

    With two it hands the little it has to do from one thread to the other, and every hand-over takes the cores from the
    nodes and the worker beside it: docs/decisions/0012-one-core-for-the-embedded-nats.md.
    """
    alone = sync_always and (os.cpu_count() or 1) <= SMALL_MACHINE
    return {**({"GOMAXPROCS": "1"} if alone else {}), **os.environ}


def redis_argv(data_dir: Path, *, port: int, aof: bool = True) -> list[str]:
    """The command line of an embedded Redis or Valkey; makes its folder. Raises Incompatible, OSError.

    `noeviction`, because evicting a key would lose a task or a record without a word.
    """
    folder = data_dir / "redis"
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "--port": str(port), "--bind": "127.0.0.1", "--dir": str(folder), "--save": "", "--daemonize": "no",
        "--appendonly": "yes" if aof else "no", "--appendfsync": "everysec", "--maxmemory-policy": "noeviction",
    }  # fmt: skip
    return [str(redis_server_binary()), *(word for option in options.items() for word in option)]


def announce(data_dir: Path, *, nats_url: str, redis_url: str) -> None:
    """Tell other commands where this process' servers are (`routing.settings.embedded_urls` reads it)."""
    document = {"pid": os.getpid(), "nats_url": nats_url, "redis_url": redis_url}
    draft = data_dir / f"servers.json.{os.getpid()}"
    draft.write_text(json.dumps(document) + "\n")
    draft.replace(data_dir / "servers.json")  # readers see all of it or nothing


def withdraw(data_dir: Path) -> None:
    """Undo `announce`. Only the claim's holder may call it, so what is removed is its own or a dead process'."""
    (data_dir / "servers.json").unlink(missing_ok=True)


def _reported_port(data_dir: Path, process_id: int) -> int | None:
    """The port NATS says it listens on. It writes the file after the bind, so a stranger's port is never taken."""
    report = data_dir / "nats" / "ports" / f"nats-server_{process_id}.ports"
    with suppress(OSError, ValueError, KeyError, IndexError):  # not there yet, or half written: look again
        return int(str(json.loads(report.read_text())["nats"][0]).rpartition(":")[2])
    return None


def check_port(server: str, port: int, variable: str) -> None:
    """Raises Unavailable when the port is in use."""
    if not port_is_free(port):
        raise Unavailable(
            f"port {port} is in use, so {server} cannot start on it: stop what listens there, or set {variable}"
        )


def _failure(server: LocalProcess, what: str) -> str:
    return f"{server.name} {what}; look into {server.log_path}. Its last words:\n{server.log_tail()}"


def _quoted(path: Path) -> str:
    """A path as a NATS configuration string, whatever characters it has."""
    return json.dumps(str(path), ensure_ascii=False)
