"""How many of what, as a sentence says it."""

from __future__ import annotations

from collections.abc import Collection

from routing.subjects import actor_of_key


def counted(count: int, noun: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def counted_units(units: Collection[str]) -> str:
    """`2 shards and 1 actor`: an actor with a key of its own is a unit beside its shard."""
    actors = sum(actor_of_key(unit) is not None for unit in units)
    found = [(len(units) - actors, "shard"), (actors, "actor")]
    return " and ".join(counted(count, noun) for count, noun in found if count) or counted(0, "shard")
