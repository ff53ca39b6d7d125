"""Ferry without machines: NATS in memory, virtual time, processes that can be killed and stopped.

    memory_nats     the server: streams, subscriptions, faults on demand       memory_link   one connection to it
    virtual_time    an event loop on which waiting costs nothing               process       kill -9, SIGSTOP, SIGCONT
    trial           an actor class through moves, crashes and replays, in one call
    twins           one call put to copies of an actor, moved and not

For unit tests of actors the first two are enough; tests/simulation/ uses all of them. Nothing here needs pytest.
"""

from __future__ import annotations

from runtime.testing.memory_link import MemoryLink
from runtime.testing.memory_nats import Fault, Kind, MemoryNats
from runtime.testing.trial import Exercised, Violation, exercise

__all__ = ["Exercised", "Fault", "Kind", "MemoryLink", "MemoryNats", "Violation", "exercise"]
