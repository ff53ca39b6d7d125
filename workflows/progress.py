"""Waiting for what was asked for: a plan to end, a node to be empty; at most so long, and saying what blocks it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from routing.errors import Timeout, TransientError
from routing.subjects import unit_in_words
from workflows.records import MigrationPlan, MigrationStatus, Move
from workflows.session import Session
from workflows.status import answering_workers
from workflows.words import counted_units

POLL_S = 0.1
STALLED_S = 2.0  # without progress before somebody is asked why
ASK_WHY_EVERY_S = 2.0
LATEST_MOVES = 50
CLOCK_SKEW_S = 5.0  # between us and the leader, which dates the records

Show = Callable[[int, int, str], None]  # done, of how many, what blocks it ("" when nothing seems to)


class StillRunning(Timeout):
    """The caller's patience ran out; what was asked for goes on."""


async def finished_plan(session: Session, plan_id: str, *, timeout_s: float, show: Show) -> MigrationPlan:
    """Wait until every move of a plan has ended, well or not.

    Redis may be away meanwhile; without it nobody knows. Raises StillRunning.
    """
    loop = asyncio.get_running_loop()
    deadline_s, watch = loop.time() + timeout_s, _Stall(loop)
    while True:
        try:
            plan = await session.store.plan(plan_id)
        except TransientError as error:
            watch.why = str(error)
        else:
            done, total = (plan.completed + plan.failed, plan.total) if plan is not None else (0, 0)
            if plan is not None and done >= total:
                show(done, total, "")
                return plan
            if watch.stalled(done):
                watch.why = await _what_blocks(session, since=watch.since)
            show(done, total, watch.why)
        if loop.time() >= deadline_s:
            raise StillRunning(
                f"plan {plan_id} still runs after {timeout_s:g} s{watch.because}: it goes on;"
                f" `ferry migrations --plan {plan_id}` shows how far, `ferry cancel {plan_id}` stops it"
            )
        await asyncio.sleep(POLL_S)


async def emptied(session: Session, node: str, *, timeout_s: float, show: Show) -> None:
    """Wait until a node owns nothing. The session follows the map. Raises StillRunning."""
    loop = asyncio.get_running_loop()
    deadline_s, watch = loop.time() + timeout_s, _Stall(loop)
    had = session.owned_by(node)
    while True:
        units = session.owned_by(node)
        had = max(had, units, key=len)
        left, total = len(units), len(had)
        if left and watch.stalled(total - left):
            watch.why = await _what_blocks(session, since=watch.since, leaving=node)
        show(total - left, total, watch.why)
        if not left:
            return
        if loop.time() >= deadline_s:
            raise StillRunning(
                f"node {node} still has {left} of {counted_units(had)} after {timeout_s:g} s{watch.because}:"
                " draining goes on"
            )
        await asyncio.sleep(POLL_S)


async def _what_blocks(session: Session, *, since: float, leaving: str | None = None) -> str:
    """The likeliest reason why nothing moves, as one clause with its mend; empty when there is none to be seen.

    `since` is the Unix time of the question, `leaving` the node that is to give everything away. The order is that of
    cause and effect.
    """
    try:
        await session.follow()
        members = session.membership.alive()
        if session.membership.leader is None:
            return "no coordinator leads: start one with `ferry coordinator`"
        if leaving is not None and await session.suspended():
            return "rebalancing is suspended: `ferry resume` lets it go on"
        if leaving is not None and not any(m.takes_shards for m in members.values() if m.id != leaving):
            return f"no other node is up to take its shards: nodes are {', '.join(members) or 'none'}"
        latest = await session.store.moves(limit=LATEST_MOVES)  # first, because Celery asks a dead Redis for seconds
        if await answering_workers() == []:
            return "no worker answers: start one with `celery -A workflows worker`"
    except TransientError as error:
        return str(error)
    failed = [m for m in latest if m.status in _FAILED and leaving in (None, m.source) and m.created_at > since]
    return (
        f"{unit_in_words(failed[0].unit)} was {failed[0].status.replace('_', ' ')}: {failed[0].error}" if failed else ""
    )


_FAILED = (MigrationStatus.ROLLED_BACK, MigrationStatus.FAILED)


async def moves_not_completed(session: Session, plan: MigrationPlan) -> list[Move]:
    """Those of a plan that ended otherwise, newest first. Raises Unavailable."""
    moves = await session.store.moves(plan_id=plan.id, limit=max(plan.total, 1))
    return [move for move in moves if move.status is not MigrationStatus.COMPLETED]


class _Stall:
    """Notices when a count stands still, and when it is time to ask (again) why."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.why = ""
        self.since = time.time() - CLOCK_SKEW_S
        self._loop, self._done = loop, -1
        self._ask_at_s = 0.0

    def stalled(self, done: int) -> bool:
        now_s = self._loop.time()
        if done != self._done:
            self._done, self._ask_at_s, self.why = done, now_s + STALLED_S, ""
            return False
        if now_s < self._ask_at_s:
            return False
        self._ask_at_s = now_s + ASK_WHY_EVERY_S
        return True

    @property
    def because(self) -> str:
        return f" ({self.why})" if self.why else ""
