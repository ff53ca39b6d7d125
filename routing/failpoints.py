"""Named points where a test or a demonstration makes a process fail on purpose. Off unless FERRY_FAILPOINTS is set.

    FERRY_FAILPOINTS="verify=error*1,commit=kill"       what to do, from the start on
    FERRY_FAILPOINTS="@/tmp/points"                     what that file says whenever a point is passed

    error        refuse for good                  kill    SIGKILL oneself
    unavailable  refuse, and let them try again   stop    SIGSTOP oneself, until somebody sends SIGCONT

`*N` fires the first N times, then never again; a file written anew starts its counts anew. A node passes the point
`<verb>` on its side of every step, and `committed` right after COMMIT is written; a worker passes `<step>.begin` and
`<step>.end`. When off, `hit` is one look-up in an empty dict; with a file it reads that each time, which is for tests.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping
from pathlib import Path

from routing.errors import InvalidInput, PermanentError, Unavailable
from routing.logs import get_logger

log = get_logger("ferry.failpoints")

_ACTIONS = ("error", "unavailable", "kill", "stop")
_COUNT = re.compile(r"[1-9][0-9]*")


class Failpoints:
    """What to do at which point. Raises InvalidInput for a malformed specification, or one that names no file."""

    def __init__(self, specification: str = "") -> None:
        self._armed: dict[str, tuple[str, int | None]] = {}
        self._file: Path | None = None
        self._seen: tuple[int, int, str] | None = None  # the file's inode, time and text when last looked at
        if specification.startswith("@"):
            self._file = Path(specification[1:])
            if not self._file.is_file():
                raise InvalidInput(f"FERRY_FAILPOINTS: {specification[1:]!r} is no file: create it, empty means off")
        else:
            self._armed = _parsed(specification)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Failpoints:
        return cls(environment.get("FERRY_FAILPOINTS", ""))

    def hit(self, name: str) -> None:
        """Pass the point `name`. When armed: raises PermanentError or Unavailable, or ends or stops this process."""
        if self._file is not None:
            self._look_again(self._file)
        if name not in self._armed:
            return
        action, left = self._armed[name]
        if left is not None:
            if left <= 0:
                return
            self._armed[name] = (action, left - 1)
        log.warning("failpoint fires", point=name, action=action)
        if action == "error":
            raise PermanentError(f"failpoint {name}: refused on purpose (FERRY_FAILPOINTS)")
        if action == "unavailable":
            raise Unavailable(f"failpoint {name}: not now, on purpose (FERRY_FAILPOINTS)")
        # To this very thread, which so goes no further; sent to the process, another thread might take it, later.
        signal.raise_signal(signal.SIGKILL if action == "kill" else signal.SIGSTOP)

    def _look_again(self, file: Path) -> None:
        """Arm what the file says now. One that is gone or malformed arms nothing, and is reported once."""
        try:
            written = file.stat()
            seen = (written.st_ino, written.st_mtime_ns, file.read_text())
        except OSError as error:
            seen = (0, 0, f"(cannot be read: {error})")
        if seen == self._seen:
            return
        self._seen, self._armed = seen, {}
        try:
            self._armed = _parsed(seen[2])
        except InvalidInput as error:
            log.error("failpoints ignored", file=str(file), error=str(error))


def _parsed(specification: str) -> dict[str, tuple[str, int | None]]:
    """point -> (action, how often; None: always). Raises InvalidInput."""
    armed: dict[str, tuple[str, int | None]] = {}
    for item in filter(None, (part.strip() for part in specification.split(","))):
        name, equals, action = item.partition("=")
        action, star, count = action.partition("*")
        if not (name and equals) or action not in _ACTIONS or (star and not _COUNT.fullmatch(count)):
            raise InvalidInput(
                f"FERRY_FAILPOINTS: {item!r} is malformed: write NAME=ACTION or NAME=ACTION*COUNT,"
                f" COUNT from 1, ACTION one of {', '.join(_ACTIONS)}"
            )
        armed[name] = (action, int(count) if star else None)
    return armed
