"""Map values as they are stored: one JSON document a key, checked when read."""

from __future__ import annotations

from typing import Any

import orjson

from routing.errors import InvalidInput
from routing.shard_map import LastMove, Outcome, Ownership


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
        }
    )


def decode_ownership(payload: bytes) -> Ownership:
    """Raises InvalidInput for anything that `encode_ownership` did not write."""
    try:
        document: dict[str, Any] = orjson.loads(payload)
        last = document["last"]
        ownership = Ownership(
            owner=document["owner"],
            incarnation=document["incarnation"],
            epoch=document["epoch"],
            fence=document["fence"],
            move=document["move"],
            destination=document["destination"],
            last=last and LastMove(move=last["move"], outcome=Outcome(last["outcome"]), epoch=last["epoch"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"map value {payload[:80]!r} is malformed: {error}") from error
    texts = (ownership.owner, ownership.incarnation or "", ownership.move or "", ownership.destination or "")
    if not all(isinstance(text, str) for text in texts) or not isinstance(ownership.epoch, int) or ownership.epoch < 1:
        raise InvalidInput(f"map value {payload[:80]!r} is malformed: wrong types")
    return ownership
