"""`ferry up`: the Procfile's lines as one local cluster, until Ctrl-C."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import threading
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TextIO

from routing.errors import InvalidInput
from routing.nats_url import LAST_PORT
from routing.settings import Settings, variables
from workflows.local.actor_modules import check_actor_modules
from workflows.local.claim import Claim, make_data_folder
from workflows.local.probe import free_port, port_is_free
from workflows.local.ready import EXAMPLE, say_when_ready
from workflows.local.servers import announce, check_port, withdraw

# honcho kills what is left this long after the first line has stopped. Nodes take up to 10 s to stop and the servers
# wait for them, so less would cut them off; much more would keep a user waiting for a line that hangs.
_KILL_AFTER_S = 25
_NODE_LINE = re.compile(r"node[_-].*")
_MOST_NODES = 100


def run_up(
    nodes: int = 3, data_dir: str | Path = ".ferry", *, nats_url: str | None = None, redis_url: str | None = None,
    actors: Sequence[str] = (), cluster: str | None = None, flower_port: int | None = None,
) -> int:  # fmt: skip
    """Run the cluster in the foreground and return its exit status: 0 after Ctrl-C or SIGTERM, 1 when a line failed.

    A URL, given here or in FERRY_NATS_URL or FERRY_REDIS_URL, names a server that runs already; without one an
    embedded server is started, on its usual port when that is free. FERRY_ variables of `.env` are in the environment
    of every line. Ctrl-C drains and stops everything within about half a minute. Killed with SIGKILL, the lines notice
    within a second and stop by themselves.

    Must be called on the main thread, where signals arrive. Raises InvalidInput for a bad number of nodes, for actor
    modules that no node could load, for what is no port, and when the data folder cannot be used, or another live
    process uses it; Unavailable when Flower's port is in use. Nothing was started then.
    """
    if not 1 <= nodes <= _MOST_NODES:
        raise InvalidInput(f"--nodes {nodes}: use 1 to {_MOST_NODES}")
    given = variables()
    modules = actors or [name.strip() for name in given.get("FERRY_ACTORS", "").split(",") if name.strip()]
    if modules:
        check_actor_modules(modules)
    folder = Path(data_dir).resolve()
    nats_url = nats_url or given.get("FERRY_NATS_URL")
    redis_url = redis_url or given.get("FERRY_REDIS_URL")
    embedded = {name for name, url in (("nats", nats_url), ("redis", redis_url)) if not url}
    for server in sorted(embedded):
        Claim(folder, server).release()  # the server takes it; here only to fail early, and with a clear reason
    make_data_folder(folder)

    nats_url = nats_url or f"nats://127.0.0.1:{_port_near(4222)}"
    redis_url = redis_url or f"redis://127.0.0.1:{_port_near(6379)}/0"
    flower_port = flower_port or _flower_port(given.get("FERRY_FLOWER_PORT", ""))
    env = {
        **os.environ,
        **given,
        "FERRY_NATS_URL": nats_url,
        "FERRY_REDIS_URL": redis_url,
        "FERRY_DATA_DIR": str(folder),
        "FERRY_FLOWER_PORT": str(flower_port),
        "FERRY_EXTERNAL": "0",  # lines of servers that others run are left out below
        "FERRY_OWNER_PID": str(os.getpid()),  # workflows.supervise stops its line when this process is gone
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
    }
    if modules:
        env["FERRY_ACTORS"] = ",".join(modules)
    if cluster:
        env["FERRY_CLUSTER"] = cluster
    lines = {
        name: command
        for name, command in cluster_lines(procfile().read_text(), nodes).items()
        if name in embedded or name not in ("nats", "redis")
    }

    announce(folder, nats_url=nats_url, redis_url=redis_url)
    try:
        print(f"NATS    {nats_url}\nRedis   {redis_url}\nFlower  http://127.0.0.1:{flower_port}/", flush=True)
        print(f"Files   {folder}\nCtrl-C stops all of it.", flush=True)
        settings = Settings.load(nats_url=nats_url, redis_url=redis_url, cluster=cluster, actors=modules or [EXAMPLE])
        return _run(lines, env, partial(say_when_ready, settings, nodes=nodes, flower_port=flower_port))
    finally:
        withdraw(folder)


def procfile() -> Path:
    """The Procfile: inside an installed package, or at the root of a checkout. Raises InvalidInput without one."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package, package.parent):
        if (folder / "Procfile").is_file():
            return folder / "Procfile"
    raise InvalidInput(f"no Procfile in {package} nor beside it: install actor-ferry again")


def cluster_lines(text: str, nodes: int) -> dict[str, str]:
    """Name and command of each line of a Procfile, its node lines replaced by `nodes` lines like the first of them."""
    from honcho.environ import parse_procfile

    written: dict[str, str] = dict(parse_procfile(text).processes)
    node_lines = [command for name, command in written.items() if _NODE_LINE.fullmatch(name)]
    if not node_lines:
        raise InvalidInput("the Procfile has no line node_a: add one that runs `ferry node --id a`")
    lines: dict[str, str] = {}
    for name, command in written.items():
        if not _NODE_LINE.fullmatch(name):
            lines[name] = command
        elif command == node_lines[0]:
            for node_id in map(node_name, range(nodes)):
                lines[f"node_{node_id}"] = re.sub(r"--id \S+", f"--id {node_id}", command)
    return lines


def node_name(index: int) -> str:
    """a, b, ... z, then n26, n27, ...: short names to type, in the order of starting."""
    return chr(ord("a") + index) if index < 26 else f"n{index}"


def _run(lines: dict[str, str], env: dict[str, str], watch: Callable[..., None]) -> int:
    """Run the lines. `watch(say=, stopping=)` runs beside them, on a thread, once all have started."""
    # Imported here: honcho is needed for nothing else, and this module by every `ferry` command.
    import honcho.manager
    import honcho.printer

    class PatientManager(honcho.manager.Manager):
        """honcho's, with two differences.

        A signal that comes before every line has started is obeyed once they have: without that it stumbles over the
        lines without a process id, and leaves the others running. A node that was stopped by somebody else and ended
        well stays away, and the others go on; any other line that ends takes all with it.
        """

        _asked_to_stop = False
        _watching = False

        def terminate(self) -> None:
            self._asked_to_stop = True
            if super()._all_started():
                super().terminate()

        def _all_started(self) -> bool:
            started = bool(super()._all_started())
            if started and self._asked_to_stop:
                super().terminate()  # does nothing the second time
            elif started and not self._watching:
                self._watching = True
                watcher.start()  # now that nothing is forked any more
            return started

        def _any_stopped(self) -> bool:
            ended = {name: line["returncode"] for name, line in self._processes.items() if "returncode" in line}
            if self._asked_to_stop or any(code or not _NODE_LINE.fullmatch(name) for name, code in ended.items()):
                return bool(ended)
            self.returncode = None  # honcho takes that of whoever ends first for the end of all
            return False

    honcho.manager.KILL_WAIT = _KILL_AFTER_S
    manager = PatientManager(honcho.printer.Printer(output=_Reader(sys.stdout)))
    for name, command in lines.items():
        manager.add_process(name, command, env=env)

    def say(text: str) -> None:
        name = honcho.manager.SYSTEM_PRINTER_NAME
        manager.events.put(honcho.printer.Message("line", text, datetime.now(), name, None))

    stopping = threading.Event()
    watcher = threading.Thread(target=watch, kwargs={"say": say, "stopping": stopping}, daemon=True)
    try:
        manager.loop()
    finally:
        stopping.set()
    stopped_on_request = manager.returncode in {signal["rc"] for signal in honcho.manager.SIGNALS.values()}
    return 0 if stopped_on_request or not manager.returncode else 1


class _Reader:
    """Standard output whose reader may go away: Ctrl-C also ends the `tee` behind a pipe while we have yet to stop."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        self._unless_gone(lambda: self._stream.write(text))

    def flush(self) -> None:
        self._unless_gone(self._stream.flush)

    def isatty(self) -> bool:
        return self._stream.isatty()

    @property
    def encoding(self) -> str:
        return self._stream.encoding

    def _unless_gone(self, act: Callable[[], object]) -> None:
        try:
            act()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def _flower_port(given: str) -> int:
    """Raises InvalidInput when what is given is no port, Unavailable when it is in use."""
    if not given:
        return _port_near(5555)
    if not (given.isascii() and given.isdigit() and 1 <= int(given) <= LAST_PORT):
        raise InvalidInput(f"FERRY_FLOWER_PORT={given}: must be a port, 1 to {LAST_PORT}")
    check_port("Flower", int(given), "FERRY_FLOWER_PORT")
    return int(given)


def _port_near(usual: int) -> int:
    return usual if port_is_free(usual) else free_port()
