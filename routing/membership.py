"""Who is there: the node leases and the leader's lease, as seen by one observer's own clock."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any

from msgspec import Meta, Struct, structs

from routing.address import check_node_id
from routing.errors import InvalidInput
from routing.lease import RENEWALS_PER_LEASE, boottime_s, decode_lease
from routing.link import Entry, Link, Subscription
from routing.logs import get_logger
from routing.subjects import LEADER_KEY, Subjects, kv_stream, kv_subject
from routing.typed import taken_as

log = get_logger("ferry.membership")

OBSERVER_MARGIN_S = 1.0  # beyond the lease, before an observer calls a node dead
# Of all nodes together, missed in a row: then it is the observer that does not hear. More than one, because one may be
# lost or late, and so few that the silence is noticed before the first node has been silent for its lease.
SILENCE_RENEWALS = 2


class NodeState(StrEnum):
    UP = "up"
    DRAINING = "draining"  # gives its shards away and takes none
    DRAINED = "drained"  # owns nothing any more; safe to stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A node by its latest lease. `schemas`: actor type -> the schema version of its code, where it says so."""

    id: str
    incarnation: str
    state: NodeState
    weight: float
    role: str
    types: tuple[str, ...]
    host: str
    pid: int
    version: str
    schemas: Mapping[str, int] = field(default_factory=dict)

    @property
    def takes_shards(self) -> bool:
        return self.state is NodeState.UP


@dataclass(slots=True)
class _Seen:
    member: Member
    at_s: float


def reads(schemas: Mapping[str, int], written: Mapping[str, int]) -> bool:
    """Whether code of these schema versions can take over what code of those may have written: none is older.

    A type that only one of the two has says nothing, nor does a node of an earlier version of Ferry, which tells none.
    """
    return all(schemas[name] >= version for name, version in written.items() if name in schemas)


class Membership:
    """Follows the leases of a cluster.

    A node is gone when its lease was removed (released, or expired on the server), or when this observer has seen no
    renewal for the lease plus a margin, on its own clock. For liveness only. Whether that says something of the node or
    of the observer, `listening_for_s` tells.
    """

    def __init__(
        self, link: Link, subjects: Subjects, *, node_lease_s: float, timeout_s: float = 2.0,
        clock: Callable[[], float] = boottime_s, counters: Counter[str] | None = None,
    ) -> None:  # fmt: skip
        self.counters: Counter[str] = Counter() if counters is None else counters
        self._link, self._bucket, self._timeout_s = link, subjects.lease_bucket, timeout_s
        self._lease_s, self._clock = node_lease_s, clock
        self._prefix = len(kv_subject(self._bucket, ""))
        self._seen: dict[str, _Seen] = {}
        self._leader: str | None = None
        self._sequences: dict[str, int] = {}
        self._heard_at_s, self._listening_since_s = clock(), -math.inf
        self._silence_s = SILENCE_RENEWALS * node_lease_s / RENEWALS_PER_LEASE
        self._observers: list[Callable[[], None]] = []
        self._watch: Subscription | None = None

    async def start(self) -> None:
        """Returns once every present lease was seen. Raises Timeout, Unavailable."""
        self._heard_at_s = self._clock()
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
        return self._leader

    def alive(self) -> dict[str, Member]:
        oldest_s = self._clock() - self._lease_s - OBSERVER_MARGIN_S
        return {node: seen.member for node, seen in sorted(self._seen.items()) if seen.at_s >= oldest_s}

    def listening_for_s(self) -> float:
        """For how long this observer has heard of some lease at least every two renewals; 0 while it does not.

        The leader's lease counts as well, so a node that is silent alone is no silence. A watch that went silent, NATS
        that stood still and an observer that was stopped all are; after one it counts from the next lease that is new.
        """
        now_s = self._clock()
        return 0.0 if now_s - self._heard_at_s > self._silence_s else now_s - self._listening_since_s

    def _hear(self) -> None:
        now_s = self._clock()
        silent_s = now_s - self._heard_at_s
        if silent_s > self._silence_s:
            log.warning("of no lease was heard for a while", silent_s=round(silent_s, 2))
            self._listening_since_s = now_s
        self._heard_at_s = now_s

    def _on_entry(self, entry: Entry) -> None:
        key = entry.subject[self._prefix :]
        if entry.sequence < self._sequences.get(key, 0):
            return
        renewal_seen_before = entry.sequence == self._sequences.get(key)
        self._sequences[key] = entry.sequence
        if not renewal_seen_before:  # what a watch that begins again repeats was written before the silence
            self._hear()
        try:
            document = None if entry.removed else decode_lease(entry.payload)
            if key == LEADER_KEY:
                self._leader = None if document is None else _leader_of(document)
            elif key.startswith("node.") and not renewal_seen_before:
                self._on_node(key.removeprefix("node."), document)
        except InvalidInput as error:
            self.counters["malformed"] += 1
            log.error("lease ignored", key=key, error=str(error))

    def _on_node(self, node: str, document: dict[str, Any] | None) -> None:
        before = self._seen.get(node)
        if document is None:
            if self._seen.pop(node, None) is not None:
                self._notify()
            return
        member = member_of(node, document)
        self._seen[node] = _Seen(member, self._clock())
        if before is None or before.member != member:
            self._notify()

    def _notify(self) -> None:
        for observer in self._observers:
            observer()


class _LeaderLease(Struct):
    name: str = "?"


def _leader_of(document: dict[str, Any]) -> str:
    return taken_as(_LeaderLease, document, "lease of the leader").name


class _NodeLease(Struct):
    incarnation: str
    weight: Annotated[float, Meta(gt=0, le=sys.float_info.max)]
    types: tuple[str, ...]
    state: NodeState
    role: str = ""
    host: str = ""
    pid: int = 0
    version: str = ""
    schemas: dict[str, int] = {}


def member_of(node: str, document: dict[str, Any]) -> Member:
    """The node that this lease describes. Raises InvalidInput naming what it cannot be by."""
    lease = taken_as(_NodeLease, document, f"lease of node {node}")
    return Member(id=check_node_id(node), **structs.asdict(lease))
