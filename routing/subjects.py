"""Every NATS subject, stream and key name, in one place.

    ferry.<cluster>.cmd.<node>.<sender>            commands and queries for actors on a node
    ferry.<cluster>.ctl.<node>.<verb>              the node's side of moves, and inspection
    ferry.<cluster>.xfer.<node>.<move>             chunks of state on their way to a node
    ferry.<cluster>.ev.<log>.<shard>.<actor>       the journal: one subject per actor, the truth
    $KV.ferry-<cluster>-map.shard.<n>              who owns a shard
    $KV.ferry-<cluster>-map.actor.<actor>          who owns an actor that was moved by hand, once its shard says so
    $KV.ferry-<cluster>-map.cluster                what the cluster was born with
    $KV.ferry-<cluster>-leases.node.<id>           a live node
    $KV.ferry-<cluster>-leases.leader              the leading coordinator

Node, sender and verb stand in the subject so that server-side permissions can tell roles apart. The two
buckets are ordinary NATS KV buckets: `nats kv ls ferry-<cluster>-map` works.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from routing.address import ActorId
from routing.errors import InvalidInput

_CLUSTER = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_ACTOR = "actor."
_SHARD = re.compile(r"shard\.(0|[1-9][0-9]{0,4})")  # as `shard_key` writes it, for a shard has one name only

CLUSTER_KEY = "cluster"
SUSPENDED_KEY = "suspended"
LEADER_KEY = "leader"


@dataclass(frozen=True, slots=True)
class Subjects:
    """The names of one cluster. Raises InvalidInput for a cluster name that subjects cannot hold."""

    cluster: str
    logs: int = 4

    def __post_init__(self) -> None:
        if not (isinstance(self.cluster, str) and _CLUSTER.fullmatch(self.cluster)):
            raise InvalidInput(f"cluster name {self.cluster!r} is malformed: use lower-case letters, digits, - and _")

    # -- messages between processes ------------------------------------------------------------------------------
    def command(self, node: str, sender: str) -> str:
        return f"ferry.{self.cluster}.cmd.{node}.{sender}"

    def control(self, node: str, verb: str) -> str:
        return f"ferry.{self.cluster}.ctl.{node}.{verb}"

    def transfer(self, node: str, move_id: str) -> str:
        return f"ferry.{self.cluster}.xfer.{node}.{move_id}"

    # -- the journal ---------------------------------------------------------------------------------------------
    def log_of(self, shard: int) -> str:
        """The stream that holds a shard's journal."""
        return f"ferry-{self.cluster}-log-{shard % self.logs}"

    def log_streams(self) -> list[tuple[str, str]]:
        """(stream, the subjects it takes) of every log."""
        return [(f"ferry-{self.cluster}-log-{k}", f"ferry.{self.cluster}.ev.{k}.>") for k in range(self.logs)]

    def events(self, shard: int, actor: ActorId) -> str:
        return f"ferry.{self.cluster}.ev.{shard % self.logs}.{shard}.{actor.token}"

    # -- buckets -------------------------------------------------------------------------------------------------
    @property
    def map_bucket(self) -> str:
        return f"ferry-{self.cluster}-map"

    @property
    def lease_bucket(self) -> str:
        return f"ferry-{self.cluster}-leases"


def shard_key(shard: int) -> str:
    """The map's key of a shard, which is also the name of the shard as a unit of ownership."""
    return f"shard.{shard}"


def shard_of_key(key: str) -> int | None:
    """The shard a map key is about, or None when the key is about something else."""
    written = _SHARD.fullmatch(key)
    return int(written[1]) if written else None


def actor_key(actor: ActorId) -> str:
    """The map's key of an actor that was moved by hand, which is also its name as a unit of ownership."""
    return f"{_ACTOR}{actor.token}"


def actor_of_key(key: str) -> ActorId | None:
    """The actor a map key is about, or None when the key is about something else."""
    if not key.startswith(_ACTOR):
        return None
    try:
        actor = ActorId.from_token(key.removeprefix(_ACTOR))
    except InvalidInput:
        return None
    return actor if actor_key(actor) == key else None  # an actor has one key only


def unit_in_words(unit: str) -> str:
    """A unit as users write it: shard/17, or the actor's id."""
    actor = actor_of_key(unit)
    return str(actor) if actor is not None else unit.replace(".", "/", 1)


def node_key(node: str) -> str:
    return f"node.{node}"


def kv_stream(bucket: str) -> str:
    return f"KV_{bucket}"


def kv_subject(bucket: str, key: str) -> str:
    return f"$KV.{bucket}.{key}"
