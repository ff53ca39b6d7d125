"""One line of a Procfile under `workflows.supervise`: waiting, signals, crashes, lingering, and who dies with whom."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from routing.errors import InvalidInput
from tests.integration.waiting import ended, until
from workflows.local.probe import answers
from workflows.supervise import main, parse

_PROJECT = Path(__file__).parents[2]

# A command with a child in its session, as a Celery worker has; both write down each SIGTERM they get.
FAMILY = """
import os, signal, sys, time
def note(who):
    def handler(number, frame):
        with open(who, "a") as log: log.write("term ")
        if who == "parent": sys.exit(7)
    return handler
child = os.fork()
signal.signal(signal.SIGTERM, note("parent" if child else "child"))
if child: print(os.getpid(), child, flush=True)
while True: signal.pause()
"""

STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"

# Told to stop, it says so and then waits for leave, as a node that drains.
DRAINING = """
import pathlib, signal, sys, time
def drain(number, frame):
    pathlib.Path("draining").touch()
    while not pathlib.Path("leave").exists(): time.sleep(0.02)
    sys.exit(0)
signal.signal(signal.SIGTERM, drain)
print("up", flush=True)
while True: signal.pause()
"""


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[Lines]:
    with Lines(tmp_path).closing() as lines:
        yield lines


def test_a_signal_to_the_group_reaches_the_command_alone_and_once(lines: Lines, tmp_path: Path) -> None:
    """honcho signals whole groups: the command gets one SIGTERM, its children none, and all end."""
    line = lines.start([], sys.executable, "-c", FAMILY)
    command, child = (psutil.Process(int(word)) for word in lines.says(line).split())

    os.killpg(line.pid, signal.SIGTERM)

    assert line.wait(20) == 7
    assert (tmp_path / "parent").read_text() == "term "
    assert not (tmp_path / "child").exists()
    assert until(lambda: ended(command) and ended(child))


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 5", 5), ("kill -KILL $$", 137)])
def test_the_exit_status_is_the_commands(lines: Lines, script: str, status: int) -> None:
    """Death by signal n is 128 + n, as a shell has it."""
    assert lines.start([], "sh", "-c", script).wait(20) == status


def test_sigint_arrives_as_sigint(lines: Lines) -> None:
    """Ctrl-C on a line of its own means to the command what it always means."""
    line = lines.start([], "sh", "-c", "trap 'exit 9' INT; echo up; while :; do sleep 0.02; done")
    assert lines.says(line) == "up"

    line.send_signal(signal.SIGINT)

    assert line.wait(20) == 9


def test_a_crash_is_restarted_a_bounded_number_of_times(lines: Lines, tmp_path: Path) -> None:
    """`--restart 1`: two runs, then the command's status."""
    line = lines.start(["--restart", "1"], "sh", "-c", "echo run >> runs; exit 4")

    assert line.wait(20) == 4
    assert (tmp_path / "runs").read_text().split() == ["run", "run"]


def test_wrong_usage_is_not_tried_again(lines: Lines, tmp_path: Path) -> None:
    """Status 2, and one line saying so: nothing gets better by itself."""
    line = lines.start(["--restart", "5"], "sh", "-c", "echo run >> runs; exit 2")

    assert line.wait(20) == 2
    assert (tmp_path / "runs").read_text().split() == ["run"]
    assert line.stderr is not None
    assert line.stderr.read() == "supervise: sh ended with 2, wrong usage: not started again\n"


def test_a_command_that_somebody_else_stopped_comes_back(lines: Lines, tmp_path: Path) -> None:
    """SIGTERM to the command itself, as after `ferry drain`: it ends with 0 and is started again; SIGTERM to the line
    ends both.
    """
    (tmp_path / "leave").touch()
    line = lines.start(["--restart", "1"], sys.executable, "-c", DRAINING)
    assert lines.says(line) == "up"
    (first,) = psutil.Process(line.pid).children()

    first.terminate()

    assert lines.says(line) == "up"
    line.terminate()
    assert line.wait(20) == 0
    assert line.stderr is not None
    assert f"was stopped, starting it again (to end it, stop process {line.pid})" in line.stderr.read()


def test_a_stop_is_no_crash(lines: Lines, tmp_path: Path) -> None:
    """A command that ends badly after SIGTERM is not started again."""
    line = lines.start(
        ["--restart", "5"], "sh", "-c", "trap 'exit 3' TERM; echo run | tee -a runs; while :; do sleep 0.02; done"
    )
    assert lines.says(line) == "run"

    line.terminate()

    assert line.wait(20) == 3
    assert (tmp_path / "runs").read_text().split() == ["run"]


def test_a_need_that_stays_unmet_is_one_clear_line(lines: Lines, tmp_path: Path) -> None:
    """After `--timeout` the line gives up with status 3, names the need, and never runs the command."""
    url = f"nats://127.0.0.1:{_free_port()}"

    line = lines.start(["--need", url, "--timeout", "0.3"], "touch", "ran")

    assert line.wait(20) == 3
    assert line.stderr is not None
    assert line.stderr.read() == f"supervise: {url} not ready after 0.3 s, so touch is not started\n"
    assert not (tmp_path / "ran").exists()


def test_a_server_that_still_loads_is_waited_for(lines: Lines, tmp_path: Path) -> None:
    """Redis answers PING with -LOADING at first: the command runs only once it says +PONG."""
    with _server([b"-LOADING Redis is loading the dataset in memory\r\n", b"+PONG\r\n"]) as (port, asked):
        line = lines.start(["--need", f"redis://127.0.0.1:{port}"], "touch", "ran")

        assert line.wait(20) == 0
        assert len(asked) == 2
        assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("scheme", "answer", "ready"),
    [
        ("nats", b'INFO {"server_id": "x"}\r\n', True),
        ("nats", b"HTTP/1.0 400 Bad Request\r\n\r\n", False),
        ("redis", b"+PONG\r\n", True),
        ("redis", b"-NOAUTH Authentication required.\r\n", True),
        ("redis", b"-ERR unknown command\r\n", False),
        ("http", b"HTTP/1.1 200 OK\r\n\r\n", True),
        ("http", b"HTTP/1.1 503 Service Unavailable\r\n\r\n", False),
        ("http", b"", False),
    ],
)
def test_an_answer_is_ready_only_when_it_says_so(scheme: str, answer: bytes, ready: bool) -> None:
    """An open port proves nothing; each kind of server has its own word for ready."""
    with _server([answer]) as (port, _):
        assert answers(f"{scheme}://127.0.0.1:{port}") is ready


def test_one_server_of_a_list_is_enough() -> None:
    """A NATS URL may name a whole cluster, of which some may be down."""
    with _server([b"INFO {}\r\n"]) as (port, _):
        assert answers(f"nats://127.0.0.1:{_free_port()},nats://127.0.0.1:{port}")


def test_a_stop_while_waiting_is_obeyed(lines: Lines, tmp_path: Path) -> None:
    """SIGTERM before the needs are met ends the line with 143; the command never runs."""
    with _server([], then=b"-LOADING\r\n") as (port, asked):
        line = lines.start(["--need", f"redis://127.0.0.1:{port}"], "touch", "ran")
        assert until(lambda: len(asked) > 0)

        line.terminate()

        assert line.wait(20) == 143
        assert not (tmp_path / "ran").exists()


def test_the_configured_servers_can_be_needed_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`--need nats --need redis` reads FERRY_NATS_URL and FERRY_REDIS_URL."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FERRY_NATS_URL", "nats://10.0.0.1:4333")
    monkeypatch.setenv("FERRY_REDIS_URL", "redis://10.0.0.2:6333/1")

    options = parse(["--need", "nats", "--need", "redis", "--", "true"])

    assert options.needs == ("nats://10.0.0.1:4333", "redis://10.0.0.2:6333/1")


def test_a_need_of_an_unknown_kind_is_refused() -> None:
    """A typing error must not wait out the whole timeout."""
    with pytest.raises(InvalidInput, match="reddis"):
        parse(["--need", "reddis://127.0.0.1:1", "--", "true"])


def test_a_command_that_does_not_exist_is_one_clear_line(lines: Lines) -> None:
    """Status 127 as in a shell, no traceback, no restarts."""
    line = lines.start(["--restart", "5"], "no-such-program")

    assert line.wait(20) == 127
    assert line.stderr is not None
    assert line.stderr.read() == "supervise: no-such-program is no program: correct the line\n"


def test_a_data_folder_that_is_none_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Wrong usage, so nobody tries again."""
    (tmp_path / "data").write_text("")
    monkeypatch.setenv("FERRY_DATA_DIR", str(tmp_path / "data"))

    assert main(["--linger", "1", "--", "true"]) == 2

    said = capfd.readouterr().err
    assert said.startswith(f"supervise: data folder {tmp_path / 'data'} cannot be used")
    assert said.count("\n") == 1


def test_a_command_that_will_not_stop_is_killed(lines: Lines) -> None:
    """`--grace` bounds stopping, whatever the command does."""
    line = lines.start(["--grace", "0.2"], sys.executable, "-c", STUBBORN)
    assert lines.says(line) == "up"

    line.terminate()

    assert line.wait(20) == 137


def test_the_command_dies_with_a_killed_line(lines: Lines) -> None:
    """kill -9 of the line, honcho's last resort, leaves no command behind (Linux)."""
    line = lines.start([], sys.executable, "-c", STUBBORN)
    assert lines.says(line) == "up"
    (command,) = psutil.Process(line.pid).children()

    line.kill()

    assert until(lambda: ended(command))


def test_the_line_stops_when_its_owner_is_gone(lines: Lines) -> None:
    """kill -9 of `ferry up` cannot signal anybody: its lines notice by themselves, and stop as if told to."""
    owner = subprocess.Popen(["sleep", "600"])
    line = lines.start(
        [], "sh", "-c", "trap 'exit 6' TERM; echo up; while :; do sleep 0.02; done", FERRY_OWNER_PID=str(owner.pid)
    )
    assert lines.says(line) == "up"

    owner.kill()
    owner.wait(10)

    assert line.wait(20) == 6


def test_a_server_lingers_until_its_last_user_has_left(lines: Lines, tmp_path: Path) -> None:
    """All are told to stop at once; the server serves on while a user drains, and no longer than that."""
    server = lines.start(["--linger", "100"], "sh", "-c", "trap 'exit 0' TERM; echo up; while :; do sleep 0.02; done")
    with _server([], then=b"+PONG\r\n") as (port, _):
        user = lines.start(["--need", f"redis://127.0.0.1:{port}"], sys.executable, "-c", DRAINING)
        assert [lines.says(server), lines.says(user)] == ["up", "up"]

        server.terminate()
        user.terminate()
        assert until((tmp_path / "draining").exists)
        assert not until(lambda: server.poll() is not None, within_s=0.5)

        (tmp_path / "leave").touch()

        assert user.wait(20) == 0
        assert server.wait(20) == 0


def test_lingering_is_bounded(lines: Lines) -> None:
    """A user that never leaves cannot keep the server for longer than `--linger`."""
    with _server([], then=b"+PONG\r\n") as (port, _):
        user = lines.start(["--need", f"redis://127.0.0.1:{port}"], sys.executable, "-c", STUBBORN)
        server = lines.start(
            ["--linger", "0.3"], "sh", "-c", "trap 'exit 0' TERM; echo up; while :; do sleep 0.02; done"
        )
        assert [lines.says(server), lines.says(user)] == ["up", "up"]

        server.terminate()

        assert server.wait(20) == 0
        assert user.poll() is None


class Lines:
    """Starts lines in a folder of their own, each leading a process group as under honcho, and cleans up."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[subprocess.Popen[str]] = []

    def start(self, options: list[str], *command: str, **env: str) -> subprocess.Popen[str]:
        line = subprocess.Popen(
            [sys.executable, "-m", "workflows.supervise", *options, "--", *command],
            cwd=self._folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(_PROJECT), "FERRY_DATA_DIR": str(self._folder), **env},
        )  # fmt: skip
        self._started.append(line)
        return line

    def says(self, line: subprocess.Popen[str]) -> str:
        """The next line of the command's output; pytest's timeout bounds the wait."""
        assert line.stdout is not None
        return line.stdout.readline().strip()

    @contextmanager
    def closing(self) -> Iterator[Lines]:
        try:
            yield self
        finally:
            for line in self._started:
                with line:  # closes its pipes
                    line.kill()  # and with it, its command


@contextmanager
def _server(first: list[bytes], *, then: bytes = b"") -> Iterator[tuple[int, list[str]]]:
    """Gives each connection the next answer and hangs up. Its port, and a list that grows with each connection."""
    asked: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            pending = list(first)
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:  # the test is over
                    return
                with connection:
                    answer = pending.pop(0) if pending else then
                    asked.append("asked")
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(4096):  # a reset could overtake the answer
                        pass

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        try:
            yield listener.getsockname()[1], asked
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            server.join(10)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
