"""Who is there: the node leases and the leader's lease, as seen by one observer's own clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import structlog

from routing.errors import InvalidInput
from routing.lease import boottime_s, decode_lease
from routing.link import Entry, Link, Subscription
from routing.subjects import LEADER_KEY, Subjects, kv_stream, kv_subject

log = structlog.get_logger("ferry.membership")

OBSERVER_MARGIN_S = 1.0  # beyond the lease, before an observer calls a node dead


class NodeState(StrEnum):
    UP = "up"
    DRAINING = "draining"  # gives its shards away and takes none
    DRAINED = "drained"  # owns nothing any more; safe to stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A node by its latest lease."""

    id: str
    incarnation: str
    state: NodeState
    weight: float
    role: str
    types: tuple[str, ...]
    host: str
    pid: int
    version: str

    @property
    def takes_shards(self) -> bool:
        return self.state is NodeState.UP


@dataclass(slots=True)
class _Seen:
    member: Member
    at_s: float


class Membership:
    """Follows the leases of a cluster.

    A node is gone when its lease was removed (released, or expired on the server), or when this observer has seen no
    renewal for the lease plus a margin, on its own clock. For liveness only.
    """

    def __init__(
        self, link: Link, subjects: Subjects, *, node_lease_s: float, timeout_s: float = 2.0,
        clock: Callable[[], float] = boottime_s,
    ) -> None:  # fmt: skip
        self._link, self._bucket, self._timeout_s = link, subjects.lease_bucket, timeout_s
        self._lease_s, self._clock = node_lease_s, clock
        self._prefix = len(kv_subject(self._bucket, ""))
        self._seen: dict[str, _Seen] = {}
        self._leader: dict[str, Any] | None = None
        self._sequences: dict[str, int] = {}
        self._observers: list[Callable[[], None]] = []
        self._watch: Subscription | None = None

    async def start(self) -> None:
        """Returns once every present lease was seen. Raises Timeout, Unavailable."""
        stream = kv_stream(self._bucket)
        self._watch = await self._link.watch(
            stream, kv_subject(self._bucket, ">"), self._on_entry, timeout_s=self._timeout_s
        )

    async def stop(self) -> None:
        if self._watch is not None:
            await self._watch.stop()

    def on_change(self, observer: Callable[[], None]) -> None:
        """Call `observer()` when a node comes, goes or changes (not for plain renewals)."""
        self._observers.append(observer)

    @property
    def leader(self) -> str | None:
        """The leading coordinator's name, as far as seen."""
        return str(self._leader.get("name", "?")) if self._leader is not None else None

    def alive(self) -> dict[str, Member]:
        oldest_s = self._clock() - self._lease_s - OBSERVER_MARGIN_S
        return {node: seen.member for node, seen in sorted(self._seen.items()) if seen.at_s >= oldest_s}

    def _on_entry(self, entry: Entry) -> None:
        key = entry.subject[self._prefix :]
        if entry.sequence < self._sequences.get(key, 0):
            return
        renewal_seen_before = entry.sequence == self._sequences.get(key)
        self._sequences[key] = entry.sequence
        try:
            document = None if entry.removed else decode_lease(entry.payload)
            if key == LEADER_KEY:
                self._leader = document
            elif key.startswith("node.") and not renewal_seen_before:
                self._on_node(key.removeprefix("node."), document)
        except InvalidInput as error:
            log.error("lease ignored", key=key, error=str(error))

    def _on_node(self, node: str, document: dict[str, Any] | None) -> None:
        before = self._seen.get(node)
        if document is None:
            if self._seen.pop(node, None) is not None:
                self._notify()
            return
        member = _member(node, document)
        self._seen[node] = _Seen(member, self._clock())
        if before is None or before.member != member:
            self._notify()

    def _notify(self) -> None:
        for observer in self._observers:
            observer()


def _member(node: str, document: dict[str, Any]) -> Member:
    try:
        return Member(
            id=node, incarnation=document["incarnation"], state=NodeState(document["state"]),
            weight=float(document["weight"]), role=str(document.get("role", "")), types=tuple(document["types"]),
            host=str(document.get("host", "")), pid=int(document.get("pid", 0)),
            version=str(document.get("version", "")),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"lease of node {node} is malformed: {error}") from error
