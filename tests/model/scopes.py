"""The worlds that are explored, in short."""

from __future__ import annotations

from tests.model.state import Budget, Scope

ONE, TWO = ((1, 1),), ((1, 1), (1, 2))  # commands of one session
TWO_SENDERS = ((1, 1), (2, 1))
TWO_SESSIONS = ((1, 1), (1, 2), (2, 1))


def scope(
    commands: tuple[tuple[int, int], ...], *, nodes: int = 2, conditional: bool = False, duplicates: bool = True,
    sessions: int = 9, queries: bool = True, **budget: int,
) -> Scope:  # fmt: skip
    """A scope with these commands and at most so many of each fault."""
    return Scope(
        commands=commands, nodes=nodes, conditional=conditional, duplicates=duplicates, sessions=sessions,
        queries=queries, budget=Budget(**budget),
    )  # fmt: skip
