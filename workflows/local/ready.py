"""The one line that says that a local cluster can be used, and what to try first."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from routing.errors import FerryError
from routing.settings import Settings
from routing.subjects import actor_of_key
from workflows.local.probe import answers, port_is_free
from workflows.local.process import process_exists

LOOK_EVERY_S = 0.5
EXAMPLE = "examples.flights"  # what the Procfile's nodes load when nothing else is named


def say_when_ready(
    settings: Settings, *, nodes: int, flower_port: int, say: Callable[[str], None], stopping: threading.Event
) -> None:
    """Look until so many nodes of this machine are up, a coordinator leads and every shard is a node's, and Flower
    listens; say so once, and return.

    For a thread of its own; `stopping` ends it sooner. That nothing answers yet is what it waits out.
    """
    while not stopping.wait(LOOK_EVERY_S):
        if port_is_free(flower_port) or not answers(settings.nats_url):
            continue
        try:
            shards = asyncio.run(_shards_when_ready(settings, nodes))
        except (FerryError, OSError):
            continue
        if shards is not None:
            first = "ferry send aircraft/N14228 fly distance=1400" if EXAMPLE in settings.actors else "ferry status"
            moves = f"http://127.0.0.1:{flower_port}/migrations"
            say(f"ready: {nodes} node{'' if nodes == 1 else 's'}, {shards} shards. Try: {first}; moves: {moves}")
            return


async def _shards_when_ready(settings: Settings, nodes: int) -> int | None:
    """How many shards there are, or None while nodes are missing or shards are nobody's."""
    from workflows.session import open_session  # it brings the clients of Redis and NATS with it

    async with open_session(settings) as session:
        await session.follow()
        # Leases of an earlier cluster, killed a moment ago, last some seconds longer than its processes.
        living = {node: m for node, m in session.membership.alive().items() if process_exists(m.pid)}
        owners = [e.ownership.owner for unit, e in session.directory.entries().items() if actor_of_key(unit) is None]
        up = sum(member.takes_shards for member in living.values())
        assigned = sum(owner in living for owner in owners)
        ready = up >= nodes and assigned == session.shards_total and session.membership.leader is not None
        return session.shards_total if ready else None
