"""One local process that never outlives us.

Every child gets a session of its own, so that a terminal's Ctrl-C reaches only us and we stop things in the right
order; and, on Linux, a parent-death signal, so that nothing is left behind even when we are killed with SIGKILL.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from routing.errors import NotApplicable, Timeout

_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
_KILL_TIMEOUT_S = 10.0  # SIGKILL is immediate but for a process stuck in the kernel, on a dead disk for instance


def spawn(argv: Sequence[str], *, death_signal: int = signal.SIGKILL, **options: Any) -> subprocess.Popen[bytes]:
    """`subprocess.Popen` in a session of its own; the child gets `death_signal` when this process dies (Linux).

    The kernel sends that signal when the *thread* that forked ends, so every fork is done by one thread that lives as
    long as the process: callers may come and go on threads of their own. Raises OSError as Popen does.
    """

    def fork() -> subprocess.Popen[bytes]:
        return subprocess.Popen(argv, start_new_session=True, preexec_fn=_die_with_parent(death_signal), **options)

    return _forking_thread(os.getpid()).submit(fork).result()


@lru_cache(maxsize=1)
def _forking_thread(process_id: int) -> ThreadPoolExecutor:
    """The one thread of process `process_id`; the key, because a forked copy of us has lost the thread."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"ferry-spawn-{process_id}")


def _die_with_parent(death_signal: int) -> Callable[[], None] | None:
    if not sys.platform.startswith("linux"):
        return None
    # Looked up before the fork: between fork and exec only one thread is left, and a lock may be held for ever.
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, int(death_signal))
        if os.getppid() != parent:  # it died before the signal was armed, which then never comes
            os._exit(1)

    return in_child


def process_exists(process_id: int) -> bool:
    """Whether a process with this id lives, be it ours or another user's. One that only waits to be reaped does not."""
    try:
        return bool(psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


class LocalProcess:
    """A named child process writing to a log file. Not thread-safe; every wait has a deadline.

    Invariants: (1) it is dead at the latest when we are, on Linux; (2) after `terminate` or `kill9` no process of its
    session is left either. Both are checked in tests/integration/test_embedded_servers.py.
    """

    def __init__(
        self, name: str, argv: Sequence[str], *, log_path: Path, env: Mapping[str, str] | None = None,
        cwd: Path | None = None, pass_fds: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """`env` replaces the environment; None inherits it. Nothing runs before `start`."""
        self.name = name
        self.argv = list(argv)
        self.log_path = log_path
        self._env = dict(env) if env is not None else None
        self._cwd = cwd
        self._pass_fds = tuple(pass_fds)
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    def start(self) -> LocalProcess:
        """Start it, or start it again once it has ended. The log is appended to. Raises OSError, NotApplicable."""
        if self.running:
            raise NotApplicable(f"{self.name} already runs as process {self.pid}: stop it first")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log_path, "ab") as log:
            self._log_start = log.tell()
            self._process = spawn(
                self.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=self._env, cwd=self._cwd, pass_fds=self._pass_fds,
            )  # fmt: skip
        return self

    @property
    def pid(self) -> int:
        return self._started().pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        """Exit status, negative for a signal as in `subprocess`; None while it runs or before it was started."""
        return self._process.poll() if self._process is not None else None

    def wait(self, timeout_s: float) -> int:
        """Wait for its end and return the exit status. Raises Timeout when it still runs then."""
        try:
            return self._started().wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise Timeout(
                f"{self.name} (process {self.pid}) still runs after {timeout_s:g} s; its log is {self.log_path}"
            ) from error

    def send_signal(self, signal_number: int) -> None:
        """Signal the process alone, not its children. Nothing happens when it has ended."""
        self._started().send_signal(signal_number)

    def terminate(self, grace_s: float = 10.0) -> int:
        """SIGTERM, wait up to `grace_s`, then SIGKILL. Returns the exit status; harmless when it has ended."""
        self.ask_to_stop()
        with suppress(Timeout):  # kill9 below is the answer to that
            self.wait(grace_s)
        return self.kill9()

    def ask_to_stop(self) -> None:
        """SIGTERM, and return at once. Nothing happens when it has ended."""
        self.send_signal(signal.SIGTERM)
        self.resume()  # a paused process would take its SIGTERM only then

    def kill9(self) -> int:
        """SIGKILL the process and all of its session, as when a machine dies. Returns the exit status."""
        with suppress(ProcessLookupError, PermissionError):  # nobody left; macOS says "not permitted" for zombies
            os.killpg(self.pid, signal.SIGKILL)
        return self.wait(_KILL_TIMEOUT_S)

    def pause(self) -> None:
        """SIGSTOP: the process freezes with all its connections open."""
        self.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT: the process goes on, and notices nothing but the clock."""
        self.send_signal(signal.SIGCONT)

    def log_tail(self, lines: int = 20) -> str:
        """The last lines it wrote since its latest start; empty when there are none."""
        try:
            with open(self.log_path, "rb") as log:
                log.seek(self._log_start)
                return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return ""

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise NotApplicable(f"{self.name} was never started: call start first")
        return self._process
