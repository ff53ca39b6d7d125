"""One line of a Procfile made robust: `python -m workflows.supervise [options] -- command arguments...`

    --need URL     wait until it answers: redis://, nats://, http://; or `nats`, `redis` for the configured server
    --timeout S    give up waiting after this long (30)
    --restart N    start the command again when it ends by itself, at most N times in a row (0); wrong usage is final
    --grace S      kill the command this long after it was told to stop (10)
    --linger S     told to stop, go on serving until no line that needs a server is left, at most this long (0)

Why it exists: honcho and foreman start every line at once, stop all when one ends, signal whole process groups (which
kills a Celery worker's children in the middle of a task), and leave everything running when they are killed
themselves. So each line waits for what it needs, keeps its command in a session of its own, passes SIGTERM and SIGINT
on to the command alone, and stops it when the one who started us is gone. With --restart a command that somebody else
stopped comes back, so that a node can be drained, stopped and had again; to keep it away, stop its line.

Exit status: the command's own (128 + n when signal n ended it); 2 wrong usage, 3 a need not met in time, 126 or 127
when the command cannot be run, 128 + n when signal n stopped us before the command ran.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from routing.errors import FerryError
from workflows.local.claim import make_data_folder
from workflows.local.probe import address_of, answers
from workflows.local.process import process_exists, spawn

TICK_S = 0.2  # how late an owner's death, a deadline or the last user's leaving may be noticed
STEADY_S = 10.0  # after so long a run the restarts count anew: twice a node's lease, so it had been up
RESTART_AFTER_S = 1.0  # a command that dies at once must not eat a core; its server may need a moment, too

_PASSED_ON = (signal.SIGTERM, signal.SIGINT)
_WRONG_USAGE, _TIMED_OUT, _CANNOT_RUN, _NOT_FOUND = 2, 3, 126, 127


def main(arguments: list[str] | None = None) -> int:
    """Parse, run the line, and return the exit status."""
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        with Signals() as signals:
            return Line(options, signals).run()
    except FerryError as error:
        return _complain(str(error), _WRONG_USAGE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says; `needs` are URLs by now."""

    needs: tuple[str, ...]
    timeout_s: float
    restarts: int
    grace_s: float
    linger_s: float
    command: tuple[str, ...]


class Line:
    """Runs one command. Every state ends: waiting by `timeout_s`, stopping by `linger_s` + `grace_s`."""

    def __init__(self, options: Options, signals: Signals) -> None:
        self._options = options
        self._signals = signals
        self._name = os.path.basename(options.command[0])
        self._users = Users() if options.needs or options.linger_s else None
        self._parent = os.getppid()
        self._owner = int(os.environ.get("FERRY_OWNER_PID") or 0)  # who started the one who started us
        self._stop_signal: int | None = None

    def run(self) -> int:
        if self._users is not None and self._options.needs:
            self._users.join()
        status = self._await_needs()
        restarts_left = self._options.restarts
        while status is None:
            started_at = time.monotonic()
            try:
                command = spawn(self._options.command)
            except FileNotFoundError:
                return _complain(f"{self._options.command[0]} is no program: correct the line", _NOT_FOUND)
            except OSError as error:
                return _complain(f"{self._options.command[0]} cannot be run: {error}", _CANNOT_RUN)
            status = self._attend(command)
            if time.monotonic() - started_at > STEADY_S:
                restarts_left = self._options.restarts
            if self._stop_signal is not None or restarts_left == 0:
                break
            if status == _WRONG_USAGE:
                _complain(f"{self._name} ended with {status}, wrong usage: not started again", status)
                break
            restarts_left -= 1
            if status == 0:
                _complain(
                    f"{self._name} was stopped, starting it again (to end it, stop process {os.getpid()})", status
                )
            else:
                _complain(f"{self._name} ended with {status}, starting it again ({restarts_left} more times)", status)
            status = self._pause(RESTART_AFTER_S)
        return status if status is not None else 0

    def _await_needs(self) -> int | None:
        """None when all answer, else the exit status."""
        deadline = time.monotonic() + self._options.timeout_s
        for url in self._options.needs:
            while not answers(url):
                if time.monotonic() > deadline:
                    return _complain(
                        f"{url} not ready after {self._options.timeout_s:g} s, so {self._name} is not started",
                        _TIMED_OUT,
                    )
                stopped = self._pause(TICK_S)
                if stopped is not None:
                    return stopped
        return None

    def _pause(self, seconds: float) -> int | None:
        """Wait with no command running. The exit status when told to stop meanwhile, else None."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            for stop in self._stops(min(left, TICK_S)):
                self._stop_signal = stop
                return 128 + stop
        return None

    def _attend(self, command: subprocess.Popen[bytes]) -> int:
        """Pass signals on until the command ends; its exit status. Nothing of its session is left afterwards."""
        linger_until = kill_at = float("inf")
        while command.poll() is None:
            for stop in self._stops(TICK_S):
                if self._stop_signal is None and self._options.linger_s:
                    linger_until = time.monotonic() + self._options.linger_s
                else:  # at once without --linger; a second signal ends the lingering, or means "faster" to the command
                    linger_until = float("inf")
                    kill_at = min(kill_at, time.monotonic() + self._options.grace_s)
                    command.send_signal(stop)
                self._stop_signal = stop
            now = time.monotonic()
            if linger_until < float("inf") and (now > linger_until or (self._users and self._users.gone())):
                linger_until, kill_at = float("inf"), now + self._options.grace_s
                command.send_signal(self._stop_signal or signal.SIGTERM)
            if now > kill_at:
                _complain(f"{self._name} did not stop within {self._options.grace_s:g} s, killing it", 0)
                _kill_session(command.pid)
                command.wait(self._options.grace_s)
        _kill_session(command.pid)  # children it left: a killed Celery worker's pool, for instance
        return 128 - command.returncode if command.returncode < 0 else command.returncode

    def _stops(self, timeout_s: float) -> list[int]:
        """Signals to stop that came within the time; a starter that is gone counts as one SIGTERM."""
        stops = self._signals.wait(timeout_s)
        abandoned = os.getppid() != self._parent or (self._owner and not process_exists(self._owner))
        if abandoned and self._stop_signal is None and not stops:
            stops = [signal.SIGTERM]
        return stops


class Signals:
    """SIGTERM and SIGINT as a queue that can be waited for; a child's end wakes the wait, too.

    Python runs handlers between any two instructions; a queue read in one place has no such races.
    """

    def __enter__(self) -> Signals:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self._before_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        watched = (*_PASSED_ON, signal.SIGCHLD)
        self._before: dict[int, Any] = {number: signal.signal(number, _ignore) for number in watched}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._before_fd)
        self._read.close()
        self._write.close()

    def wait(self, timeout_s: float) -> list[int]:
        """The stop signals that came, oldest first; empty after `timeout_s`, or early when a child has ended."""
        select.select([self._read], [], [], timeout_s)
        with suppress(BlockingIOError):
            return [number for number in self._read.recv(4096) if number in _PASSED_ON]
        return []


class Users:
    """Who still needs the servers: a shared file lock each, which the kernel takes back however its holder ends."""

    def __init__(self) -> None:
        """Raises InvalidInput when the data folder cannot be used."""
        folder = Path(os.environ.get("FERRY_DATA_DIR") or ".ferry")
        make_data_folder(folder)
        self._lock = open(folder / "users.lock", "ab")  # noqa: SIM115 - held until the process ends

    def join(self) -> None:
        """Count this process as a user until it ends."""
        fcntl.flock(self._lock, fcntl.LOCK_SH)  # never waits for long: `gone` gives its lock back at once

    def gone(self) -> bool:
        """Whether no user is left."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        return True


def parse(arguments: list[str]) -> Options:
    """Read the command line. Raises InvalidInput for a URL or settings that cannot be used; SystemExit(2) for usage."""
    parser = argparse.ArgumentParser(
        prog="python -m workflows.supervise", usage="%(prog)s [options] -- command arguments...",
        description="Run one line of a Procfile robustly.",
    )  # fmt: skip
    parser.add_argument("--need", action="append", default=[], metavar="URL", help="wait until it answers")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="S", help="give up waiting after this long")
    parser.add_argument("--restart", type=int, default=0, metavar="N", help="starts again in a row, at most")
    parser.add_argument(
        "--grace", type=float, default=10.0, metavar="S", help="from being told to stop to being killed"
    )
    parser.add_argument("--linger", type=float, default=0.0, metavar="S", help="stop this long after who needs us")
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:cut])
    command = tuple(arguments[cut + 1 :])
    if not command:
        parser.error("write the command after --")
    return Options(
        needs=_urls(options.need), timeout_s=options.timeout, restarts=options.restart, grace_s=options.grace,
        linger_s=options.linger, command=command,
    )  # fmt: skip


def _urls(needs: list[str]) -> tuple[str, ...]:
    configured: dict[str, str] = {}
    if {"nats", "redis"} & set(needs):
        # Read only when asked for: any other command can be supervised without Ferry's settings being right.
        from routing.settings import Settings

        settings = Settings.load()
        configured = {"nats": settings.nats_url, "redis": settings.redis_url}
    urls = tuple(configured.get(need, need) for need in needs)
    for url in ",".join(urls).split(",") if urls else ():
        address_of(url)
    return urls


def _kill_session(leader: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # nobody left; macOS says "not permitted" for zombies
        os.killpg(leader, signal.SIGKILL)


def _complain(message: str, status: int) -> int:
    print(f"supervise: {message}", file=sys.stderr, flush=True)
    return status


def _ignore(signal_number: int, frame: FrameType | None) -> None:
    """A handler must exist for the wake-up to be written; the queue has the number."""


if __name__ == "__main__":
    sys.exit(main())
