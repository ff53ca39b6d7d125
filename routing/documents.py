"""Map values as they are stored: one JSON document a key, checked when read."""

from __future__ import annotations

from typing import Any

import orjson

from routing import jsonlike
from routing.address import ActorId, check_node_id
from routing.errors import InvalidInput
from routing.shard_map import APART_MOST, ITS_SHARD, LastMove, Outcome, Ownership


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
    try:
        document: dict[str, Any] = jsonlike.loads(payload)
        epoch, last, move, destination = (document[name] for name in ("epoch", "last", "move", "destination"))
        if (move is None) != (destination is None) or (destination is not None and destination == document["owner"]):
            raise InvalidInput("a lock names a move, and a destination that is not the owner")
        owner, apart = _text(document["owner"]), document.get("apart", {})
        if owner == ITS_SHARD and (move is not None or document["incarnation"] is not None):
            raise InvalidInput("what its shard owns has neither a lock nor an incarnation")
        if not isinstance(apart, dict) or len(apart) > APART_MOST:
            raise InvalidInput(f"{jsonlike.shown(apart)} are not at most {APART_MOST} actors")
        ownership = Ownership(
            owner=owner if owner == ITS_SHARD else check_node_id(owner),
            incarnation=None if document["incarnation"] is None else _text(document["incarnation"]),
            epoch=_epoch(epoch, least=1),
            fence=_epoch(document["fence"], most=epoch),
            move=None if move is None else _text(move),
            destination=None if destination is None else check_node_id(_text(destination)),
            last=None if last is None else _last(last, epoch),
            apart=tuple(sorted((str(ActorId.parse(actor)), _epoch(at, least=1)) for actor, at in apart.items())),
            taken_out=_epoch(document.get("taken_out", 0), most=epoch),
            pinned=_flag(document.get("pinned", False)),
        )
    except (ValueError, KeyError, TypeError, InvalidInput) as error:
        raise InvalidInput(f"map value {payload[:80]!r} is malformed: {jsonlike.shown(error, 200)}") from error
    return ownership


def _last(document: dict[str, Any], epoch: int) -> LastMove:
    outcome = Outcome(_text(document["outcome"]))
    return LastMove(move=_text(document["move"]), outcome=outcome, epoch=_epoch(document["epoch"], least=1, most=epoch))


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidInput(f"{jsonlike.shown(value)} is not a name")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidInput(f"{jsonlike.shown(value)} is neither true nor false")
    return value


def _epoch(value: Any, *, least: int = 0, most: int = 2**63) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InvalidInput(f"{jsonlike.shown(value)} is not an epoch from {least} to {most}")
    return value
