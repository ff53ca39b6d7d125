"""The node of this very process, as its router sees it."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Protocol

from routing.address import ActorId
from routing.envelope import Answer, Command

LATER: Any = object()  # instead of a reply: it has to be asked for where there is somebody to wait


class LocalNode(Protocol):
    """The actor host of this very process, when there is one."""

    def serves(self, unit: str) -> bool: ...

    def query_at_once(self, actor: ActorId, name: str, arguments: dict[str, Any]) -> Any:
        """The reply to a query that an actor here can answer without waiting; LATER for everything else.

        Raises what the actor answers instead of a reply. `arguments` are known to be JSON-like.
        """

    def ask(self, command: Command) -> Awaitable[Answer]: ...
