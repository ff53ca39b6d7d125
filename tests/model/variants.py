"""The scopes in which the protocol itself is explored to its end.

A scope is small on purpose: a protocol that can fail nearly always fails with one actor, two nodes and two or three
faults. QUICK runs with every test run; COMPLETE takes some minutes and is what a change of the protocol has to pass.
"""

from __future__ import annotations

from collections.abc import Mapping

from tests.model.scopes import ONE, TWO, TWO_SENDERS, TWO_SESSIONS, scope
from tests.model.state import Scope

QUICK: Mapping[str, Scope] = {
    "a move, an append or a write unanswered": scope(TWO, moves=1, timeouts=1),
    "two moves, one of them in doubt": scope(ONE, moves=2, timeouts=1),
    "a move, its source or destination dies": scope(ONE, moves=1, crashes=1),
    "a false fail-over, a death, a doubt": scope(TWO, failovers=1, crashes=1, timeouts=1),
    "two false fail-overs of three nodes": scope(ONE, nodes=3, failovers=2),
    "a node wakes up beside its successor": scope(TWO, stops=1, failovers=1),
    "a source wakes up beside its successor": scope(ONE, stops=1, moves=1),
    "Redis is lost in the middle of a move": scope(ONE, moves=2, losses=1, timeouts=1),
    "settlers that read late and write late": scope(ONE, moves=1, slow_settlers=1, stale_reads=1, timeouts=1),
    "a state-dependent rejection": scope(TWO_SENDERS, conditional=True, failovers=1, timeouts=1),
    "a session that is forgotten": scope(TWO_SESSIONS, sessions=1, failovers=1, timeouts=1),
}

COMPLETE: Mapping[str, Scope] = {
    "a move, a false fail-over, a death": scope(TWO, moves=1, failovers=1, crashes=1),
    "a move, a false fail-over, a death, a doubt": scope(ONE, moves=1, failovers=1, crashes=1, timeouts=1),
    "two moves, a death": scope(TWO, moves=2, crashes=1),
    "two moves, a false fail-over": scope(ONE, moves=2, failovers=1),
    "two moves, two doubts": scope(ONE, moves=2, timeouts=2),
    "a move, two deaths": scope(ONE, moves=1, crashes=2),
    "two senders, a move, a false fail-over": scope((*TWO, (2, 1)), moves=1, failovers=1),
    "a source wakes up beside its successor, in doubt": scope(ONE, stops=1, moves=1, timeouts=1),
    "a source wakes up beside its successor and its heir": scope(ONE, stops=1, moves=1, failovers=1),
    "a node wakes up beside its successor, in doubt": scope(TWO, stops=1, failovers=1, timeouts=1),
    "three nodes, a move, a false fail-over, a doubt": scope(ONE, nodes=3, moves=1, failovers=1, timeouts=1),
    "three nodes, two moves": scope(ONE, nodes=3, moves=2),
    "three nodes, two false fail-overs, a doubt": scope(ONE, nodes=3, failovers=2, timeouts=1),
    "Redis is lost, a node dies": scope(ONE, moves=1, losses=1, crashes=1, timeouts=1),
    "settlers that read late and write late, two moves": scope(ONE, moves=2, slow_settlers=1, stale_reads=1),
    "a state-dependent rejection, a move": scope(TWO_SENDERS, conditional=True, moves=1, failovers=1, timeouts=1),
    "a session that is forgotten, a move": scope(TWO_SESSIONS, sessions=1, moves=1, failovers=1),
}
