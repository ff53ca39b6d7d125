"""The name of a sender session: when it was opened and a random part, `1764000000000-3f9c2a71d5e80b46`.

Actors keep the order of sessions by `opened` alone: what they have forgotten lies at or below a floor, so that a late
duplicate from a forgotten session is told from a new one. Nobody's clock has to be right for that; a clock that is far
behind only has its new sessions refused where many others were open meanwhile.
"""

from __future__ import annotations

import os
import re

from routing.errors import InvalidInput

IN_FLIGHT = 32  # unanswered commands of one session to one actor; actors keep the replies of as many

_FORM = re.compile(r"([0-9]{1,15})-[0-9a-f]{8,32}")


def new_session_id(opened_ms: int) -> str:
    """64 random bits: two sessions opened in the same millisecond differ."""
    return f"{opened_ms}-{os.urandom(8).hex()}"


def opened_at(session: str) -> int:
    """When a session was opened, in unix milliseconds by its sender's clock. Raises InvalidInput."""
    match = _FORM.fullmatch(session)
    if match is None:
        raise InvalidInput(f"session {session[:40]!r} is malformed: open one with `cluster.session()`")
    return int(match[1])
