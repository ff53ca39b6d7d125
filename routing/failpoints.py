"""Named points where a test or a demonstration makes a process fail on purpose. Off unless FERRY_FAILPOINTS is set.

    FERRY_FAILPOINTS="verify=error*1,commit=kill"

    error        refuse for good                  kill    SIGKILL oneself
    unavailable  refuse, and let them try again   stop    SIGSTOP oneself

`*N` fires the first N times, then never again. A node passes the point `<verb>` on its side of every step, a worker
`<step>.begin` and `<step>.end`. When off, `hit` is one look-up in an empty dict.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping

from routing.errors import InvalidInput, PermanentError, Unavailable

_ACTIONS = ("error", "unavailable", "kill", "stop")
_COUNT = re.compile(r"[1-9][0-9]*")


class Failpoints:
    """What to do at which point. Raises InvalidInput for a malformed specification."""

    def __init__(self, specification: str = "") -> None:
        self._armed: dict[str, tuple[str, int | None]] = {}
        for item in filter(None, (part.strip() for part in specification.split(","))):
            name, equals, action = item.partition("=")
            action, star, count = action.partition("*")
            if not (name and equals) or action not in _ACTIONS or (star and not _COUNT.fullmatch(count)):
                raise InvalidInput(
                    f"FERRY_FAILPOINTS: {item!r} is malformed: write NAME=ACTION or NAME=ACTION*COUNT,"
                    f" COUNT from 1, ACTION one of {', '.join(_ACTIONS)}"
                )
            self._armed[name] = (action, int(count) if star else None)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Failpoints:
        return cls(environment.get("FERRY_FAILPOINTS", ""))

    def hit(self, name: str) -> None:
        """Pass the point `name`. When armed: raises PermanentError or Unavailable, or ends or stops this process."""
        if name not in self._armed:
            return
        action, left = self._armed[name]
        if left is not None:
            if left <= 0:
                return
            self._armed[name] = (action, left - 1)
        if action == "error":
            raise PermanentError(f"failpoint {name}: refused on purpose (FERRY_FAILPOINTS)")
        if action == "unavailable":
            raise Unavailable(f"failpoint {name}: not now, on purpose (FERRY_FAILPOINTS)")
        os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
