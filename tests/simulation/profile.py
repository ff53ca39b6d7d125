"""What one schedule is like: how large the cluster, how short the times, how rough the weather."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from random import Random
from typing import Any

from routing.settings import Settings

# Short times, in the order of the ladder that routing/settings.py checks.
TIMES: dict[str, float] = {
    "append_timeout_s": 0.4, "drain_handlers_s": 0.6, "step_timeout_s": 1.0, "pause_lease_s": 2.0,
    "lock_lease_s": 4.0, "task_time_limit_s": 6.0, "visibility_timeout_s": 8.0, "node_lease_s": 2.0,
    "leader_lease_s": 2.0, "debounce_s": 0.2, "drain_timeout_s": 20.0, "passivate_after_s": 1.5,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Rates are per message, weights relative to each other, times seconds of virtual time."""

    shards: int = 4
    actors: int = 4
    nodes: int = 3
    workers: int = 2
    senders: int = 3
    commands: int = 10  # of each sender
    rough_s: float = 6.0  # how long faults go on

    # the network
    lost: float = 0.0
    lost_answer: float = 0.0
    late: float = 0.0
    doubled: float = 0.0
    stale: float = 0.0  # reads of the map by a leader that was deposed, of a log by a replica that lags
    stale_by_at_least: int = 1  # entries that such a leader lacks; six at most
    struck: str = ""  # only messages with this in their subject are lost, late, doubled or stale
    slow: float = 0.0  # messages that take up to `slow_s`
    slow_s: float = 0.5
    late_s: float = 4.0
    lagging: float = 0.0  # news of a watch that is late by up to `lag_s`, and so all news behind it
    lag_s: float = 3.0
    laggards: tuple[str, ...] = ()  # kinds of machines whose watches lag; none named: all

    # everything else
    fault_every_s: float = 0.8  # infinity: none
    faults: dict[str, float] = field(
        default_factory=lambda: {
            "kill": 4, "stop": 4, "partition": 2, "cut": 2, "clock": 1, "stall": 0.5, "redis": 1, "join": 1, "drain": 1,
            "lease": 1,
        }
    )  # fmt: skip
    victims: dict[str, float] = field(
        default_factory=lambda: {"node": 5, "coordinator": 1.5, "worker": 2, "sender": 0.5}
    )
    ambush: float = 0.0  # of the commits: just then the source and the workers are killed, the coordinators stopped
    astray: float = 0.0  # of the commits: the write strays past the pause lease, and nobody reaches the map meanwhile
    tasks_lost: float = 0.0
    tasks_doubled: float = 0.0
    tasks_late: float = 0.0
    move_every_s: float = 0.4  # an operator moves a shard
    cancel: float = 0.05  # of those moves
    pins: float = 0.0  # of those moves: of one actor instead, or back to its shard
    sessions: float = 0.5  # of the senders
    slow_handlers: float = 0.1
    conditional: float = 0.25
    truncated: bool = False  # a log loses its end after everything else

    # of the nodes
    buffer_messages: int = 10_000
    mailbox_messages: int = 1_000
    snapshot_every: int = 32
    snapshot_piece_bytes: int = 512 * 1024
    dedup_window: int = 128
    moves_at_once: int = 2
    precopy_from_bytes: int = 1
    more: dict[str, Any] = field(default_factory=dict)  # settings

    def settings(self) -> Settings:
        shared = {f.name for f in fields(self)} & {f.name for f in fields(Settings)}
        values: dict[str, Any] = {name: getattr(self, name) for name in shared}
        return Settings(cluster="sim", logs=2, **{**TIMES, **values, **self.more})


def draw(chance: Random) -> Profile:
    """A profile for a seed: mostly mixed weather, now and then calm, or a single kind of fault and much of it."""
    weather = chance.choices(("mixed", "calm", "network", "processes", "tasks"), (5, 1, 2, 2, 1))[0]
    rate = chance.choice((0.003, 0.01, 0.03))
    profile = Profile(
        snapshot_every=chance.choice((4, 8, 32)),
        buffer_messages=chance.choice((2, 6, 10_000)),
        mailbox_messages=chance.choice((2, 1_000, 1_000)),
        moves_at_once=chance.choice((1, 2)),
        precopy_from_bytes=chance.choice((1, 10**9)),  # all states before the gate is closed, or none
        sessions=chance.choice((0.0, 0.5, 1.0)),
        nodes=chance.choice((3, 3, 3, 4)),
        truncated=chance.random() < 0.06,
        slow=chance.choice((0.0, 0.01, 0.05)),
        lagging=chance.choice((0.0, 0.0, 0.02)),
        pins=chance.choice((0.0, 0.3, 0.6)),
        snapshot_piece_bytes=chance.choice((512 * 1024, 150)),  # all snapshots in one message, or many in several
    )
    if profile.truncated:  # the chronicle cannot tell what the server had left of a log that lost such a snapshot
        profile = replace(profile, snapshot_piece_bytes=512 * 1024)
    rough_network = {"lost": rate, "lost_answer": rate, "late": rate, "doubled": rate, "stale": rate}
    rough_tasks = {"tasks_lost": 0.05, "tasks_doubled": 0.1, "tasks_late": 0.1}
    match weather:
        case "calm":
            return replace(profile, fault_every_s=float("inf"))
        case "network":
            return replace(profile, **rough_network, fault_every_s=2.5)
        case "processes":
            return replace(profile, fault_every_s=0.6)
        case "tasks":
            return replace(profile, **rough_tasks, victims={"worker": 3, "coordinator": 1, "node": 1})
        case _:
            return replace(profile, **rough_network, **rough_tasks)
