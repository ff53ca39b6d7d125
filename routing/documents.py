"""Map values as they are stored: one JSON document a key, checked when read."""

from __future__ import annotations

from typing import Annotated

import orjson
from msgspec import Meta, Struct

from routing.address import ActorId, check_node_id
from routing.errors import InvalidInput
from routing.shard_map import APART_MOST, ITS_SHARD, LastMove, Outcome, Ownership
from routing.typed import Count, Text, reader

_Epoch = Annotated[int, Meta(ge=1, le=2**63 - 1)]


class _Last(Struct):
    move: Text
    outcome: Outcome
    epoch: _Epoch


class _Stored(Struct):
    owner: Text
    incarnation: Text | None
    epoch: _Epoch
    fence: Count
    move: Text | None
    destination: Text | None
    last: _Last | None
    apart: Annotated[dict[str, _Epoch], Meta(max_length=APART_MOST)] = {}
    taken_out: Count = 0
    pinned: bool = False


_read = reader(_Stored, "map value")


def encode_ownership(ownership: Ownership) -> bytes:
    last = ownership.last
    return orjson.dumps(
        {
            "owner": ownership.owner,
            "incarnation": ownership.incarnation,
            "epoch": ownership.epoch,
            "fence": ownership.fence,
            "move": ownership.move,
            "destination": ownership.destination,
            "last": None if last is None else {"move": last.move, "outcome": last.outcome, "epoch": last.epoch},
            **({"apart": dict(ownership.apart)} if ownership.apart else {}),
            **({"taken_out": ownership.taken_out} if ownership.taken_out else {}),
            **({"pinned": True} if ownership.pinned else {}),
        }
    )


def decode_ownership(payload: bytes) -> Ownership:
    """Raises InvalidInput for anything that `encode_ownership` did not write."""
    stored = _read(payload)
    try:
        return _checked(stored)
    except InvalidInput as error:
        raise InvalidInput(f"map value {payload[:80]!r} is malformed: {error}") from error


def _checked(stored: _Stored) -> Ownership:
    """What the types of the fields do not say."""
    owner, destination, last = stored.owner, stored.destination, stored.last
    if (stored.move is None) != (destination is None) or destination == owner:
        raise InvalidInput("a lock names a move, and a destination that is not the owner")
    if owner == ITS_SHARD and (stored.move is not None or stored.incarnation is not None):
        raise InvalidInput("what its shard owns has neither a lock nor an incarnation")
    if max(stored.fence, stored.taken_out, 0 if last is None else last.epoch) > stored.epoch:
        raise InvalidInput(f"epoch {stored.epoch} is not the latest that it names")
    return Ownership(
        owner=owner if owner == ITS_SHARD else check_node_id(owner), incarnation=stored.incarnation,
        epoch=stored.epoch, fence=stored.fence, move=stored.move,
        destination=None if destination is None else check_node_id(destination),
        last=None if last is None else LastMove(move=last.move, outcome=last.outcome, epoch=last.epoch),
        apart=tuple(sorted((str(ActorId.parse(actor)), at) for actor, at in stored.apart.items())),
        taken_out=stored.taken_out, pinned=stored.pinned,
    )  # fmt: skip
