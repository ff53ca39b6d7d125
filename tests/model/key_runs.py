"""The scopes of the model of two keys, and the rules whose absence it has to find."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from routing import shard_map
from routing.shard_map import Ownership
from tests.model import keys
from tests.model.keys import ACTOR, Budget, Rule, TwoKeys

QUICK = {
    "two keys, a pin and a move": TwoKeys(Budget(pins=1, moves=1)),
    "two keys, a pin, a move and a late write": TwoKeys(Budget(pins=1, moves=1, late=1)),
    "two keys, a pin and a failover": TwoKeys(Budget(pins=1, failovers=1)),
}
COMPLETE = {
    "two keys, a pin, a move and a failover": TwoKeys(Budget(pins=1, moves=1, failovers=1)),
    "two keys, two pins and a move": TwoKeys(Budget(pins=2, moves=1)),
    "two keys, two pins and a late write": TwoKeys(Budget(pins=2, late=1)),
    "two keys, two pins by two leaders": TwoKeys(Budget(pins=2), leaders=2),
    "two keys, two pins, a move and a stale read": TwoKeys(Budget(pins=2, moves=1, stale=1)),
    "two keys, a pin, a move and two late writes": TwoKeys(Budget(pins=1, moves=1, late=2)),
    "two keys, a pin, a failover and a late write": TwoKeys(Budget(pins=1, failovers=1, late=1)),
    "two keys, a pin and two failovers": TwoKeys(Budget(pins=1, failovers=2)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyMutant:
    """One rule switched off, by replacing functions or by doing `without`."""

    name: str
    what: str
    world: TwoKeys
    replaces: Sequence[tuple[ModuleType, str, Callable[..., Any]]] = ()


_take_out, _take_back = shard_map.take_out, shard_map.take_back


def _taken_out_unfenced(shard: Ownership, actor: str, known: Ownership | None) -> Ownership:
    return replace(_take_out(shard, actor, known), epoch=shard.epoch, fence=shard.fence, taken_out=shard.epoch)


def _taken_back_unfenced(shard: Ownership, actor: str, own: Ownership, *, incarnation: str) -> Ownership:
    return replace(_take_back(shard, actor, own, incarnation=incarnation), epoch=shard.epoch, fence=shard.fence)


def _unchecked(before: Ownership | None, after: Ownership) -> None:
    return None


def _counts_by_name(shard: Ownership, own: Ownership) -> bool:
    return shard.apart_at(ACTOR) is not None


MUTANTS = (
    KeyMutant(
        name="P1", what="an actor's own key does not begin above its shard's",
        world=TwoKeys(Budget(pins=1, moves=1, late=1)),
        replaces=((shard_map, "take_out", _taken_out_unfenced), (shard_map, "check", _unchecked)),
    ),
    KeyMutant(
        name="P2", what="a shard takes an actor back at its old epoch", world=TwoKeys(Budget(pins=1)),
        replaces=((shard_map, "take_back", _taken_back_unfenced), (shard_map, "check", _unchecked)),
    ),
    KeyMutant(
        name="P5", what="an actor's own key counts whichever time it is of", world=TwoKeys(Budget(pins=2, moves=1)),
        replaces=((keys, "of_one_time", _counts_by_name),),
    ),
    KeyMutant(
        name="P6", what=f"not so: {Rule.MAKING_SURE.value}",
        world=TwoKeys(Budget(pins=2, stale=1), without=frozenset({Rule.MAKING_SURE})),
    ),
    KeyMutant(
        name="P7", what=f"not so: {Rule.CLOSING.value}",
        world=TwoKeys(Budget(pins=1, moves=2, late=1), without=frozenset({Rule.CLOSING})),
    ),
    KeyMutant(
        name="P8", what=f"not so: {Rule.FENCING_OFF.value}",
        world=TwoKeys(Budget(pins=1, moves=2, late=1), without=frozenset({Rule.FENCING_OFF})),
    ),
)  # fmt: skip
