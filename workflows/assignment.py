"""Owners for shards that have none, and for the shards of dead nodes. Needs the map alone: no Redis, no worker."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from routing import shard_map
from routing.address import shard_of
from routing.directory import Directory, MapEntry
from routing.errors import InDoubt, TransientError
from routing.membership import Member, reads
from routing.placement import ConsistentHashPlacement, NodeWeight
from routing.shard_map import Ownership
from routing.subjects import actor_of_key, shard_key, shard_of_key
from workflows.words import counted_units


class Assignment:
    """Writes ASSIGN and FAILOVER. Every write is a compare-and-set on what was read, so several may try at once."""

    def __init__(self, directory: Directory, placement: ConsistentHashPlacement) -> None:
        self._directory, self._placement = directory, placement
        self._seen: dict[str, Member] = {}  # alive now, or when something was not yet given away that they own

    def takers(self, alive: Mapping[str, Member]) -> list[NodeWeight]:
        """The nodes that may receive shards: up, and with every actor type that all nodes with shards have.

        So a node started with other actor classes does not take traffic down, and one with more of them can join.
        """
        owners = {entry.ownership.owner for entry in self._directory.shards().values()}
        serving = [set(alive[owner].types) for owner in owners if owner in alive]
        needed = set.intersection(*serving) if serving else set()
        return [
            NodeWeight(id=member.id, weight=member.weight)
            for member in alive.values()
            if member.takes_shards and needed <= set(member.types)
        ]

    def unassigned(self) -> list[int]:
        """Shards that nobody ever owned. One whose key has a value that cannot be read may have had owners."""
        known = self._directory.shards().keys() | self._directory.unreadable()
        return [n for n in range(self._directory.shards_total) if shard_key(n) not in known]

    async def assign(self, alive: Mapping[str, Member]) -> str | None:
        """ASSIGN what nobody ever owned, balanced over the nodes that take shards. Returns what it did, in words."""
        takers, unassigned = self.takers(alive), self.unassigned()
        if not unassigned or not takers:
            return None
        owners = self._balanced(without=set(), takers=takers)
        given = await self._write_all({shard_key(n): (None, shard_map.assign(owners[n])) for n in unassigned})
        if not given:
            return None
        were = "was" if len(given) == 1 else "were"
        to = ", ".join(sorted({own.owner for own in given.values()}))
        return f"{counted_units(given)} {were} assigned to {to}"

    async def fail_over(self, alive: Mapping[str, Member]) -> str | None:
        """FAILOVER what dead nodes own. Their actors wake at the new owner when somebody asks for them.

        In the middle of a rolling upgrade what a node with newer code owned goes to others of that code while there are
        any: older code could not read it. Returns what it did, in words.
        """
        lost = set(self._directory.unreadable())  # what is known of these is not what their keys are at
        orphans = {
            unit: entry
            for unit, entry in self._directory.entries().items()
            if entry.ownership.owner not in alive and unit not in lost
        }
        self._seen = self._seen | dict(alive) if orphans else dict(alive)
        takers = self.takers(alive)
        if not orphans or not takers:
            return None
        dead = {entry.ownership.owner for entry in orphans.values()}
        owners = {
            node: self._balanced(without=dead, takers=self._able(self._seen.get(node), takers, alive)) for node in dead
        }
        heirs = {  # an actor goes where its shard goes
            unit: owners[entry.ownership.owner][self._shard_of(unit)] for unit, entry in orphans.items()
        }
        given = await self._write_all(
            {unit: (entry, shard_map.failover(entry.ownership, to=heirs[unit])) for unit, entry in orphans.items()}
        )
        if not given:
            return None
        gone = ", ".join(sorted({orphans[unit].ownership.owner for unit in given}))
        to = ", ".join(sorted({own.owner for own in given.values()}))
        return f"node {gone} is gone: {counted_units(given)} failed over to {to}"

    def _able(self, dead: Member | None, takers: list[NodeWeight], alive: Mapping[str, Member]) -> list[NodeWeight]:
        """Those whose code reads what a dead node may have written: any node's, if it was never seen here.

        All of them when there are none: better an owner that has to be upgraded first than no owner.
        """
        written = [dead] if dead is not None else [alive[node.id] for node in takers]
        able = [node for node in takers if all(reads(alive[node.id].schemas, one.schemas) for one in written)]
        return able or takers

    def strays(self, alive: Mapping[str, Member]) -> list[str]:
        """Actors that have to go home and can: unpinned, or at a node that takes nothing. By their units' names.

        One whose home has older code than its node waits there until that is upgraded.
        """
        apart, lost = self._directory.apart(), set(self._directory.unreadable())
        takers, found = {node.id for node in self.takers(alive)} if apart else set(), []
        for unit, entry in apart.items():
            home, own = self._directory.get(shard_key(self._shard_of(unit))), entry.ownership
            stays = own.owner not in alive or (own.pinned and own.owner in takers) or unit in lost
            if home is None or home.ownership.owner not in takers - {own.owner} or stays:
                continue
            if own.owner not in takers or reads(alive[home.ownership.owner].schemas, alive[own.owner].schemas):
                found.append(unit)
        return found

    def _shard_of(self, unit: str) -> int:
        """The shard that a unit is, or that it belongs to. Raises ValueError for a unit that is none."""
        actor = actor_of_key(unit)
        return shard_in(unit) if actor is None else shard_of(actor, self._directory.shards_total)

    def _balanced(self, *, without: set[str], takers: list[NodeWeight]) -> Mapping[int, str]:
        """shard -> node as placement wants it, when the shards of `without` and of nobody are free to give away."""
        owners: dict[int, str | None] = dict.fromkeys(range(self._directory.shards_total))
        for unit, entry in self._directory.shards().items():
            owner = entry.ownership.owner
            owners[shard_in(unit)] = None if owner in without else owner
        return self._placement.rebalance_shards(owners, takers).shard_map

    async def _write_all(self, changes: Mapping[str, tuple[MapEntry | None, Ownership]]) -> dict[str, Ownership]:
        """Many transitions at once; returns those that landed.

        One that loses was overtaken by who knew better: the next round looks again.
        """
        results = await asyncio.gather(
            *(self._directory.transition(unit, before, after) for unit, (before, after) in changes.items()),
            return_exceptions=True,
        )
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, (TransientError, InDoubt)):
                raise result
        return {
            unit: result.ownership
            for unit, result in zip(changes, results, strict=True)
            if not isinstance(result, BaseException)
        }


def shard_in(unit: str) -> int:
    """The shard a unit is. Raises ValueError for a unit that is none."""
    shard = shard_of_key(unit)
    if shard is None:
        raise ValueError(f"unit {unit!r} is not a shard")
    return shard
