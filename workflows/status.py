"""What is going on in a cluster, as far as anybody answers: `ferry status`.

    NATS    map, leases, switch    -> who owns what, who is there, who leads
    nodes   the verb `status`      -> live actors, paused shards        each within ASK_S, all at once
    Redis   latest plan, moves     -> what was planned, since when a lock is held
    Celery  a ping                 -> whether a worker takes steps

Any of them may be away: what it would have said is unknown then (None), and `problems` says so in words.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from routing.directory import MapEntry
from routing.errors import FerryError
from routing.membership import Member
from routing.settings import Settings
from routing.subjects import actor_of_key, shard_key, unit_in_words
from workflows.records import ClusterEvent, MigrationPlan, MigrationStatus, to_document
from workflows.session import open_session
from workflows.store import RecordStore
from workflows.words import counted, counted_units

ASK_S = 1.0
STORE_S = 2.0
PING_S = 1.0
EVENTS_SHOWN = 8
NAMED_AT_MOST = 5  # in a sentence; the rest is counted


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldLock:
    """A unit that a move holds locked, and for how long that move has not advanced; None: no record says.

    `error` is what its latest try was refused with; None: it was not.
    """

    unit: str
    move: str
    owner: str
    destination: str
    idle_s: float | None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """All that could be found out. What nobody could tell is None; `answers` has a None for a node that is silent."""

    cluster: str
    nats_error: str | None = None
    redis_error: str | None = None
    workers: Sequence[str] | None = None
    leader: str | None = None
    suspended: bool | None = None
    shards_total: int | None = None
    moves_running: int | None = None
    entries: Mapping[str, MapEntry]
    unreadable: Sequence[str] = ()  # units whose keys in the map have no value that can be read
    members: Mapping[str, Member]
    answers: Mapping[str, Mapping[str, Any] | None]
    locks: Sequence[HeldLock] = ()
    stuck_after_s: float = 10.0
    plan: MigrationPlan | None = None
    plan_error: str | None = None  # of the latest of its moves that was rolled back
    events: Sequence[ClusterEvent] = ()


async def gather_status(settings: Settings, *, all_workers: bool = False) -> Status:
    """Ask everybody, in about a second. `all_workers` waits for every worker's answer, not just for the first.

    Raises nothing for what is away, that is in the result; InvalidInput for a malformed FERRY_REDIS_URL.
    """
    store = RecordStore.connect(settings.redis_url, settings.cluster, timeout_s=STORE_S)
    try:
        seen, recorded = await asyncio.gather(_of_cluster(settings), _of_records(store, all_workers=all_workers))
        locks = await _locks(seen["entries"], store if "redis_error" not in recorded else None)
    finally:
        await store.close()
    return Status(cluster=settings.cluster, locks=locks, stuck_after_s=settings.pause_lease_s, **seen, **recorded)


def to_json(status: Status) -> dict[str, Any]:
    """The document that `ferry status --json` prints."""
    shards = Counter(e.ownership.owner for unit, e in status.entries.items() if actor_of_key(unit) is None)
    return {
        "cluster": status.cluster,
        "leader": status.leader,
        "suspended": status.suspended,
        "shards_total": status.shards_total,
        "nodes": [_node(member, shards[node], status.answers.get(node)) for node, member in status.members.items()],
        "moves_running": status.moves_running,
        "actors_apart": [
            {"actor": str(actor), "node": entry.ownership.owner, "pinned": entry.ownership.pinned}
            for unit, entry in sorted(status.entries.items())
            if (actor := actor_of_key(unit)) is not None
        ],
        "plan": to_document(status.plan) if status.plan is not None else None,
        "workers": list(status.workers) if status.workers is not None else None,
        "events": [to_document(event) for event in status.events],
        "problems": problems(status),
    }


def problems(status: Status) -> list[str]:
    """What an operator should look at, one sentence each, what explains the rest first."""
    found = [error for error in (status.nats_error, status.redis_error) if error is not None]
    if status.workers is not None and not status.workers:
        found.append("no worker answers, so moves wait: start one with `celery -A workflows worker`")
    if status.nats_error is not None:
        return found
    if status.leader is None:
        found.append("no coordinator leads, so nothing is assigned or moved: start one with `ferry coordinator`")
    if not any(member.takes_shards for member in status.members.values()):
        found.append("no node is up that takes shards: start one with `ferry node --id ID --actors MODULE`")
    found += [*_ownership_problems(status), *_node_problems(status), *_type_problems(status)]
    return [*found, *_lock_problems(status), *_plan_problems(status)]


# -- asking -----------------------------------------------------------------------------------------------------------
async def _of_cluster(settings: Settings) -> dict[str, Any]:
    try:
        async with open_session(settings) as session:
            await session.follow()
            members = session.membership.alive()
            suspended, leader, *answers = await asyncio.gather(
                session.suspended(),
                _unless_away(session.ask_leader("status")),
                *(_unless_away(session.ask_node(node, "status", timeout_s=ASK_S)) for node in members),
            )
            entries = session.directory.entries()
            return {
                "leader": session.membership.leader,
                "suspended": suspended,
                "shards_total": session.shards_total,
                "moves_running": leader["running"] if leader is not None else len(session.locked()),
                "entries": entries,
                "unreadable": session.directory.unreadable(),
                "members": members,
                "answers": dict(zip(members, answers, strict=True)),
            }
    except FerryError as error:
        return {"nats_error": str(error), "entries": {}, "members": {}, "answers": {}}


async def _unless_away(asking: Any) -> dict[str, Any] | None:
    try:
        answer: dict[str, Any] = await asking
        return answer
    except FerryError:
        return None  # the caller reports whoever did not answer


async def _of_records(store: RecordStore, *, all_workers: bool) -> dict[str, Any]:
    try:
        await store.ping()
        plan, rolled_back, events, workers = await asyncio.gather(
            store.latest_plan(), store.moves(status=MigrationStatus.ROLLED_BACK, limit=1), store.events(EVENTS_SHOWN),
            answering_workers(all_of_them=all_workers),
        )  # fmt: skip
    except FerryError as error:
        return {"redis_error": str(error)}
    of_plan = [move.error for move in rolled_back if plan is not None and move.plan_id == plan.id]
    return {"plan": plan, "plan_error": next(iter(of_plan), None), "events": events, "workers": workers}


async def answering_workers(*, all_of_them: bool = False) -> list[str] | None:
    """Names of the Celery workers that answer a ping; the first one only, or all that do so within PING_S.

    None when the broker cannot be asked.
    """

    def ping() -> list[str] | None:
        from kombu.exceptions import OperationalError
        from redis.exceptions import RedisError

        from workflows.app import app

        try:
            answers = app.control.ping(timeout=PING_S, limit=None if all_of_them else 1)
        except (OperationalError, RedisError, OSError):
            return None
        return sorted(name for answer in answers for name in answer)

    return await asyncio.to_thread(ping)


async def _locks(entries: Mapping[str, MapEntry], store: RecordStore | None) -> list[HeldLock]:
    locks = []
    for unit, entry in entries.items():
        view = entry.ownership
        if view.move is None or view.destination is None:
            continue
        try:
            move = await store.move(view.move) if store is not None else None
        except FerryError:
            move = None
        idle_s = time.time() - (move.step_at or move.created_at) if move is not None else None
        locks.append(
            HeldLock(
                unit=unit, move=view.move, owner=view.owner, destination=view.destination, idle_s=idle_s,
                error=move.error if move is not None else None,
            )
        )  # fmt: skip
    return locks


# -- in words ---------------------------------------------------------------------------------------------------------
def _node(member: Member, shards: int, answer: Mapping[str, Any] | None) -> dict[str, Any]:
    told = answer or {}
    return {
        "id": member.id,
        "incarnation": member.incarnation,
        "state": member.state,
        "weight": member.weight,
        "role": member.role,
        "shards": shards,
        "actors": told.get("actors"),
        "staged": told.get("staged"),
        "paused": told.get("paused"),
        "serving": told.get("serving"),
        "counters": told.get("counters"),
        "types": list(member.types),
        "host": member.host,
        "pid": member.pid,
        "version": member.version,
    }


def _ownership_problems(status: Status) -> list[str]:
    total = status.shards_total or 0
    known = status.entries.keys() | status.unreadable
    unowned = [shard_key(n) for n in range(total) if shard_key(n) not in known]
    found = [f"{_units(unowned)} no owner yet: a coordinator assigns them once a node is up"] if unowned else []
    if status.unreadable:
        found.append(
            f"{_units(sorted(status.unreadable))} no value in the map that can be read, and cannot be given to a node:"
            " `nats kv put` one like another's there, with an epoch above any that it had"
        )
    lost: dict[str, list[str]] = {}
    for unit, entry in status.entries.items():
        if entry.ownership.owner not in status.members:
            lost.setdefault(entry.ownership.owner, []).append(unit)
    for owner, units in sorted(lost.items()):
        found.append(
            f"node {owner} is gone and {_units(units)} not been given to another node yet: "
            + ("the leader does so in a moment" if status.leader else "that is the coordinator's work")
        )
    return found


def _node_problems(status: Status) -> list[str]:
    found = []
    for node, answer in sorted(status.answers.items()):
        if answer is None:
            found.append(f"node {node} holds a lease but does not answer: is it stopped, overloaded or cut off?")
            continue
        if not answer.get("serving", True):
            found.append(f"node {node} could not renew its lease in time and serves nothing: look at its log")
        quarantined = answer.get("counters", {}).get("quarantined", 0)
        if quarantined:
            found.append(
                f"node {node} refused {quarantined} times to wake an actor whose log is shorter than what was"
                " acknowledged (quarantined): look at its log, and at what happened to NATS' disk"
            )
        locked = {lock.unit for lock in status.locks}
        # A unit that has just been handed over is not this node's any more in the map, which was read after the answer.
        mine = {unit for unit, entry in status.entries.items() if entry.ownership.owner == node}
        forgotten = [unit for unit in answer.get("paused", ()) if unit in mine - locked]
        if forgotten:
            found.append(f"at node {node} {_units(forgotten)} been paused without a lock: this ends within seconds")
    return found


def _type_problems(status: Status) -> list[str]:
    """A command reaches the node of its shard, whether that has the actor's class or not, and however old that is."""
    known = {actor_type for member in status.members.values() for actor_type in member.types}
    newest: dict[str, int] = {}
    for member in status.members.values():
        newest |= {name: max(version, newest.get(name, version)) for name, version in member.schemas.items()}
    found = []
    for node, member in sorted(status.members.items()):
        behind = [f"{name} {v} ({newest[name]})" for name, v in sorted(member.schemas.items()) if v < newest[name]]
        if behind:
            found.append(
                f"node {node} has code of older schema versions than others (theirs in brackets): {', '.join(behind)};"
                " it cannot read what they have written, and their shards go there last: start it with the new code"
            )
    return found + [
        f"node {node} lacks actor types {', '.join(sorted(known - set(member.types)))}, which other nodes have:"
        " commands for them fail where it owns the shard; start it with the same --actors"
        for node, member in sorted(status.members.items())
        if known - set(member.types)
    ]


def _plan_problems(status: Status) -> list[str]:
    """What the coordinator planned and could not carry out; who moved a shard by hand was told at once."""
    plan = status.plan
    if plan is None or plan.cancelled or not plan.failed or plan.by_hand:
        return []
    why = f" (the latest: {status.plan_error})" if status.plan_error else ""
    return [
        f"{plan.failed} of {counted(plan.total, 'move')} of the last plan did not complete{why}:"
        f" see `ferry migrations --plan {plan.id} --status rolled_back`"
    ]


def _lock_problems(status: Status) -> list[str]:
    found = []
    for lock in status.locks:
        where = f"{unit_in_words(lock.unit)} is locked by move {lock.move} ({lock.owner} to {lock.destination})"
        if lock.idle_s is None and status.redis_error is None:
            found.append(f"{where}, of which there is no record: its source aborts it within seconds")
        elif lock.idle_s is not None and lock.idle_s > status.stuck_after_s:
            why = f" ({lock.error})" if lock.error else ""
            found.append(f"{where}, which stands still for {lock.idle_s:.0f} s{why}: see `ferry migration {lock.move}`")
        elif lock.error is not None:
            found.append(f"{where}, whose step is tried again: {lock.error}")
    return found


def _units(units: Sequence[str]) -> str:
    """`shard/1 has`, or `12 shards and 1 actor (shard/1, shard/2, ...) have`: a sentence's subject and auxiliary."""
    if len(units) == 1:
        return f"{unit_in_words(units[0])} has"
    named = ", ".join(unit_in_words(unit) for unit in units[:NAMED_AT_MOST])
    return f"{counted_units(units)} ({named}{', ...' if len(units) > NAMED_AT_MOST else ''}) have"
