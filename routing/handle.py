"""One actor, seen from outside: its commands as methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from routing.address import ActorId

R_co = TypeVar("R_co", covariant=True)


class Sender(Protocol[R_co]):
    """A Cluster or a Session, whose results are awaited, or one of their blocking twins."""

    def send_message(self, actor: ActorId, command: str, arguments: dict[str, Any]) -> R_co: ...


class ActorHandle(Generic[R_co]):
    """`handle.fly(distance=1400)` sends the command `fly` as its sender does. Arguments go by name, as in a message."""

    def __init__(self, sender: Sender[R_co], actor: ActorId) -> None:
        self._sender = sender
        self.actor_id = actor

    def __getattr__(self, name: str) -> Callable[..., R_co]:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*nameless: Any, **arguments: Any) -> R_co:
            if nameless:
                raise TypeError(f"{name} takes keyword arguments only: write {name}(name=...), not {name}(...)")
            return self._sender.send_message(self.actor_id, name, arguments)

        return call

    def __repr__(self) -> str:
        return f"<actor {self.actor_id}>"
