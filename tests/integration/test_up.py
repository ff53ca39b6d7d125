"""`run_up`: a Procfile's lines as one cluster that starts, is found, and leaves nothing behind however it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from routing.errors import InvalidInput, Unavailable
from routing.settings import embedded_urls
from tests.integration.waiting import ended, until
from workflows.local.probe import answers, free_port
from workflows.local.servers import nats_environment
from workflows.local.up import cluster_lines, node_name, procfile, run_up

_PROJECT = Path(__file__).parents[2]

# The project's own lines for the servers, and stand-ins for what Ferry runs on them.
LINES = """
nats: exec python -m workflows.supervise --linger 15 -- python -m workflows.local nats
redis: exec python -m workflows.supervise --linger 15 -- python -m workflows.local redis
node_a: exec python -m workflows.supervise --need nats --need redis -- python node.py --id a
"""

# Told to stop, it proves that both servers still answer.
NODE = """
import os, signal, sys
from workflows.local.probe import answers
def drain(number, frame):
    served = answers(os.environ["FERRY_NATS_URL"]) and answers(os.environ["FERRY_REDIS_URL"])
    print(sys.argv[2], "drained" if served else "found no server", flush=True)
    sys.exit(0 if served else 1)
signal.signal(signal.SIGTERM, drain)
print("node", sys.argv[2], "is up", flush=True)
while True: signal.pause()
"""

UP = """
import sys
from pathlib import Path
from workflows.local import up
up.procfile = lambda: Path("Procfile")
sys.exit(up.run_up(int(sys.argv[1]), "data"))
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`run_up` with two stand-in nodes in a process of its own; both nodes are up."""
    (tmp_path / "Procfile").write_text(LINES)
    (tmp_path / "node.py").write_text(NODE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FERRY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", UP, "2"], cwd=tmp_path, env={**environment, "PYTHONPATH": str(_PROJECT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        waited_for = {"node a is up", "node b is up"}
        for line in process.stdout:
            waited_for -= {text for text in waited_for if text in line}
            if not waited_for:
                break
        assert not waited_for, "the cluster did not come up"
        try:
            yield process
        finally:
            process.kill()


def _is_line(process: psutil.Process) -> bool:
    return "workflows.supervise" in process.cmdline()


def _until_said(process: subprocess.Popen[str], text: str) -> str:
    """All it says from now on, up to the line with this text."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if text in line:
            return said
    raise AssertionError(f"it never said {text!r}:\n{said}")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_drains_the_nodes_over_live_servers_and_leaves_nothing(
    cluster: subprocess.Popen[str], tmp_path: Path, stop: signal.Signals
) -> None:
    """Ctrl-C or SIGTERM: exit status 0, nodes drain while the servers still answer, no process is left."""
    family = psutil.Process(cluster.pid).children(recursive=True)
    assert len(family) >= 8  # four lines, each with its command
    urls = embedded_urls(tmp_path / "data")
    assert all(answers(url) for url in urls.values())

    cluster.send_signal(stop)
    output = cluster.communicate(timeout=60)[0]

    assert cluster.returncode == 0, output
    assert "a drained" in output
    assert "b drained" in output
    assert all(until(lambda process=process: ended(process)) for process in family)
    assert embedded_urls(tmp_path / "data") == {}


def test_a_node_that_is_stopped_alone_does_not_take_the_others_with_it(cluster: subprocess.Popen[str]) -> None:
    """SIGTERM to one node's line: it drains and stays away; Ctrl-C still ends the rest with status 0."""
    lines = {
        line.cmdline()[-1]: line for line in psutil.Process(cluster.pid).children(recursive=True) if _is_line(line)
    }

    lines["b"].terminate()

    said = _until_said(cluster, "node_b stopped (rc=0)")
    assert "b drained" in said
    assert "node_a stopped" not in said
    assert lines["a"].is_running()
    cluster.send_signal(signal.SIGINT)
    output = cluster.communicate(timeout=60)[0]
    assert cluster.returncode == 0, output
    assert "a drained" in output


def test_a_server_that_ends_takes_all_with_it(cluster: subprocess.Popen[str]) -> None:
    """Only nodes may stay away; the status is 1 then, whatever it ended with."""
    (server,) = (one for one in psutil.Process(cluster.pid).children(recursive=True) if one.name() == "nats-server")

    server.kill()

    output = cluster.communicate(timeout=60)[0]
    assert cluster.returncode == 1, output
    assert "a found no server" in output


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ("examples.flights,nomodule", "nomodule: cannot be imported"),
        ("json", "json: defines no Actor"),
        ("broken", "RuntimeError while it was imported: no licence found"),
    ],
)
def test_actor_modules_that_no_node_could_load_are_refused_before_anything_starts(
    tmp_path: Path, modules: str, said: str
) -> None:
    """One line and exit code 2, as any wrong usage."""
    (tmp_path / "broken.py").write_text("raise RuntimeError('no licence\\nfound')")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FERRY_")}

    ended = subprocess.run(
        [sys.executable, "-m", "workflows.cli", "up"], cwd=tmp_path, timeout=60, capture_output=True, text=True,
        check=False, env={**environment, "FERRY_ACTORS": modules, "PYTHONPATH": str(_PROJECT)},
    )  # fmt: skip

    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"ferry: FERRY_ACTORS={modules}: ")
    assert ended.stderr.count("\n") == 1
    assert said in ended.stderr
    assert not (tmp_path / ".ferry").exists()


@pytest.mark.parametrize("servers", ["embedded", "given"])
@pytest.mark.parametrize("inside", ["", "inside"])
def test_a_data_folder_that_is_none_is_refused(
    tmp_path: Path, servers: str, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a file, or in one; also when no server of ours would write there."""
    (tmp_path / "data").write_text("")
    if servers == "given":
        monkeypatch.setenv("FERRY_NATS_URL", f"nats://127.0.0.1:{free_port()}")
        monkeypatch.setenv("FERRY_REDIS_URL", f"redis://127.0.0.1:{free_port()}")

    with pytest.raises(InvalidInput, match="it is no folder, or is not in one"):
        run_up(1, tmp_path / "data" / inside)


TOLD = "$FERRY_ACTORS $FERRY_NATS_URL $FERRY_REDIS_URL $FERRY_FLOWER_PORT $FERRY_LOG_LEVEL $FERRY_CLUSTER"


def test_what_the_env_file_says_holds_for_every_line_unless_the_environment_says_otherwise(tmp_path: Path) -> None:
    """Servers that run already, actors, Flower's port, and what is no setting; no embedded server is started."""
    nats, redis, flower = (free_port() for _ in range(3))
    (tmp_path / "shop.py").write_text(
        "import os\nfrom examples.flights import Aircraft\nassert os.environ['FERRY_LOG_LEVEL'] == 'error'\n"
    )
    (tmp_path / "Procfile").write_text(f"nats: false\nredis: false\nnode_a: sleep 60\nshow: echo {TOLD}\n")
    (tmp_path / ".env").write_text(
        f"FERRY_NATS_URL=nats://127.0.0.1:{nats}\nFERRY_REDIS_URL=redis://127.0.0.1:{redis}/1\nFERRY_ACTORS=shop\n"
        f"FERRY_FLOWER_PORT={flower}\nFERRY_LOG_LEVEL=error\nFERRY_CLUSTER=of-file\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FERRY_")}

    ended = subprocess.run(
        [sys.executable, "-c", UP, "1"], cwd=tmp_path, timeout=60, capture_output=True, text=True, check=False,
        env={**environment, "FERRY_CLUSTER": "of-environment", "PYTHONPATH": str(_PROJECT)},
    )  # fmt: skip

    told = f"shop nats://127.0.0.1:{nats} redis://127.0.0.1:{redis}/1 {flower} error of-environment"
    assert told in ended.stdout
    assert f"http://127.0.0.1:{flower}/" in ended.stdout
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("port", ["0", "65536", "flower", "-1"])
def test_what_is_no_port_for_flower_is_refused(tmp_path: Path, port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is started."""
    monkeypatch.setattr("workflows.local.up.procfile", lambda: tmp_path / "none")
    monkeypatch.setenv("FERRY_FLOWER_PORT", port)

    with pytest.raises(InvalidInput, match=f"FERRY_FLOWER_PORT={port}: must be a port"):
        run_up(1, tmp_path / "data")


def test_a_port_for_flower_that_is_in_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower alone could not start, and would take all others with it."""
    monkeypatch.setattr("workflows.local.up.procfile", lambda: tmp_path / "none")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("FERRY_FLOWER_PORT", str(port))

        with pytest.raises(Unavailable, match=f"port {port} is in use, so Flower"):
            run_up(1, tmp_path / "data")


def test_it_says_once_that_it_is_ready_and_what_to_try(tmp_path: Path) -> None:
    """The project's own lines: what it names works at once, and none of Celery's or Flower's greetings hide it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FERRY_")}
    with subprocess.Popen(
        [sys.executable, "-m", "workflows.cli", "up", "--nodes", "2"], cwd=tmp_path, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
        env={**environment, "FERRY_SHARDS": "8", "PYTHONPATH": str(_PROJECT)},
    ) as process:  # fmt: skip
        try:
            said = _until_said(process, "ready: 2 nodes, 8 shards. Try: ferry send aircraft/N14228 fly distance=1400")
            url = said.rpartition("moves: ")[2].strip()
            with urllib.request.urlopen(url, timeout=10) as page:
                assert page.status == 200
            process.send_signal(signal.SIGINT)
            said += process.communicate(timeout=60)[0]
        finally:
            process.kill()

    assert process.returncode == 0, said
    assert said.count("ready: ") == 1
    for noise in ("superuser privileges", "[queues]", "Registered tasks", "Inspect method"):
        assert noise not in said


def test_nothing_outlives_a_cluster_killed_with_sigkill(cluster: subprocess.Popen[str]) -> None:
    """kill -9 of `ferry up`: every line notices and stops by itself."""
    family = psutil.Process(cluster.pid).children(recursive=True)

    cluster.kill()

    assert all(until(lambda process=process: ended(process), within_s=40) for process in family)


def test_the_line_of_nats_starts_it_as_the_embedded_one(cluster: subprocess.Popen[str]) -> None:
    """It takes as few cores as the server of a test or a benchmark: see nats_environment."""
    (server,) = (one for one in psutil.Process(cluster.pid).children(recursive=True) if one.name() == "nats-server")

    started_with = server.environ().get("GOMAXPROCS")

    assert started_with == nats_environment(sync_always=True).get("GOMAXPROCS")


def test_a_second_cluster_on_the_same_folder_is_refused(cluster: subprocess.Popen[str], tmp_path: Path) -> None:
    """The refusal names the process, and the first cluster stays announced."""
    announced = json.loads((tmp_path / "data" / "servers.json").read_text())

    with pytest.raises(InvalidInput, match="is in use: its nats server belongs to process"):
        run_up(1, tmp_path / "data")

    assert json.loads((tmp_path / "data" / "servers.json").read_text()) == announced


def test_the_procfile_of_the_project_gives_any_number_of_nodes() -> None:
    """Node lines are made from the first one, each with its own id; the others stay as written."""
    text = procfile().read_text()

    lines = cluster_lines(text, 30)

    nodes = {name: command for name, command in lines.items() if name.startswith("node_")}
    assert len(nodes) == 30
    assert all(f"--id {name.removeprefix('node_')} " in command for name, command in nodes.items())
    assert {"nats", "redis", "coordinator", "worker", "flower"} == set(lines) - set(nodes)
    assert all(f"{name}: {command}" in text for name, command in lines.items() if name not in nodes)
    assert [node_name(index) for index in (0, 25, 26)] == ["a", "z", "n26"]


def test_every_line_of_the_procfile_execs() -> None:
    """foreman signals only the process it started: a shell in between would keep the signal."""
    lines = cluster_lines(procfile().read_text(), 3)

    assert all(command.startswith("exec python -m workflows.supervise ") for command in lines.values())


@pytest.mark.parametrize("nodes", [0, -1, 101])
def test_an_absurd_number_of_nodes_is_refused(tmp_path: Path, nodes: int) -> None:
    """Before anything is started or written."""
    with pytest.raises(InvalidInput, match=f"--nodes {nodes}"):
        run_up(nodes, tmp_path / "data")

    assert not (tmp_path / "data").exists()
