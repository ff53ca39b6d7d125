"""What can be done with the document of a move that cannot be read: damaged, lost, or of another version. Pure.

Records are read strictly, because a save writes the whole document: a field that its reader had passed over would be
lost to the version that knows it. What is looked at here is only where a document is filed, and that a move has ended.
"""

from __future__ import annotations

from typing import Any

import orjson

from routing import jsonlike
from workflows.records import MigrationStatus


def filed_under(document: bytes | None) -> tuple[str, str]:
    """(plan, shard) in whose lists a move stands; empty, which no list is called, when its document does not say."""
    found = _object(document)
    plan_id, shard = found.get("plan_id"), found.get("shard")
    return plan_id if isinstance(plan_id, str) else "", str(shard) if type(shard) is int else ""


def ended(document: bytes | None, *, revision: int, now: float, error: str) -> bytes:
    """The document as whoever can read it shall find it: failed. Empty for one that is not even JSON."""
    found = _object(document)
    if not found:
        return b""
    end = {"status": MigrationStatus.FAILED, "step": None, "finished_at": now, "step_at": now, "error": error}
    return orjson.dumps({**found, **end, "revision": revision})


def _object(document: bytes | None) -> dict[str, Any]:
    try:
        found = jsonlike.loads(document or b"")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
