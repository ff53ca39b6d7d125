"""The migration protocol: how one shard, with all its live actors, goes from one node to another while it is in use.

    source        the node that owns the shard                       destination   the node that is to own it
    map           who owns which shard; one compare-and-set a change epoch         grows with each change of ownership
    gate          while closed, the shard's commands wait at the     LOCK, COMMIT, ABORT   see routing/shard_map.py
                  source, in order

A move is one Celery chain of six tasks. Each loads the move's record, asks a node over NATS, and saves the record by
compare-and-set; tasks carry the move's id and nothing else, and state never passes through Celery or Redis. Small moves
that go the same way share a chain, a convoy: each step is then taken by all of them at once, and each for itself. One
whose step fails for now leaves it, and goes on in a chain of its own, so that the others do not stand still meanwhile
(workflows/driver.py).

      worker                         source (a)                          destination (b)                     map
    1 pause       LOCK ------------------------------------------------------------------------> a, e, m -> b
                  pause -----------> copies states ahead --------> stages, inactive
                                     closes the gate, handlers finish
    2 capture     capture ---------> state at the log's last sequence
    3 serialize   serialize -------> bytes, digests, limits
    4 send        send ------------> announces, sends what lacks ------> stages, inactive
    5 await_ack   await_ack -------> asks -----------------------------> verifies, decodes
    6 delete      commit ----------> COMMIT ----------------------------------------------------> b, e+1
                                     hands over what waited -----------> BIND, serves --------------> b, ib, e+1
      rollback    ABORT (loses against COMMIT: then roll forward) -----------------------------> a, e+1
                  resume ----------> opens the gate, what waited first

Why it is safe, in three sentences. COMMIT is written by the source itself with its gate closed, and COMMIT and ABORT
start from the same revision of one key, so exactly one happens, whoever tries. The source leaves its pause only through
the map, the destination serves only because of the map, and what was transferred is a cache that is compared with the
actor's log before its first use. So a step may run twice, late, or days later, and a worker may die anywhere: a step
that no longer applies returns quietly, and what nobody drives on is ended from the map (workflows/coordinator.py).

Why it is fast: steps 2 to 5 follow from the pause and can be repeated, so the worker has them taken in one go, and
recorded, while Celery hands the chain on; their tasks find them taken (workflows/ahead.py). COMMIT is asked for when
the chain has come to `await_ack`, while Celery hands it on to `delete`.

Example: `ferry migrate shard/17 --to b --wait`, then `ferry migration ID` shows when each step was reached. An actor
that is moved by hand is a unit of its own, with a key of its own in the map, and goes the same way.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import structlog
from celery import Task, chain

from routing.errors import InDoubt, NotApplicable, PermanentError, TransientError
from routing.shard_map import Outcome
from workflows.app import PRIORITY_BEGUN, PRIORITY_PAUSE, app, settings
from workflows.context import StepContext, Worker
from workflows.driver import STEP_RETRIES, Driver, Step
from workflows.records import STEPS, MigrationStatus, Move

log = structlog.get_logger("ferry.migration")

RETRY_FIRST_S = 0.1  # how long a step waits for its second try; twice as long for each one after


# -- the six steps, in the order of time -----------------------------------------------------------------------------
async def pause(context: StepContext, move: Move) -> Move:
    """Lock the shard in the map and close its gate at the source.

    Before: planned; the record names the revision of the map that LOCK must replace.
    Does: LOCK; the source copies states ahead while their actors go on; then it stops the whole shard between two
        commands and keeps what arrives. With few actors it has then taken the steps up to COMMIT as well.
    Safe to repeat because: a lock for this move is found, not taken twice; closing a closed gate does nothing.
    Raises: NotApplicable when the shard changed hands since; Busy while handlers still run; Unavailable, Timeout.
    Undo: ABORT opens the gate, what waited goes first.
    """
    entry = await context.lock(move)
    locked = replace(move, epoch=entry.ownership.epoch)
    locked, answer = await context.ask_through(move.source, "pause", locked, ahead=True)
    context.taken(move.id, "pause", answer.get("ago_s"))
    context.keep_prepared(move.id, answer.get("prepared"))
    return context.passed(locked, MigrationStatus.PAUSED, messages_buffered=answer["waiting"])


async def capture(context: StepContext, move: Move) -> Move:
    """Take the state of every live actor at the last sequence of its log.

    Before: paused; no handler and no append runs at the source.
    Does: the source notes version and digest of each actor; actors nobody has used stay in the log, at no cost.
    Safe to repeat because: a captured shard is still, so the answer is the same.
    Raises: StateNotPortable naming the actor that cannot be encoded; NotApplicable when the pause is over.
    Undo: nothing to undo.
    """
    rows = await context.ask_rows(move.source, "capture", move)
    return context.passed(move, MigrationStatus.CAPTURED, actors=rows, actors_total=len(rows))


async def serialize(context: StepContext, move: Move) -> Move:
    """Turn captured state into bytes, within the limits.

    Before: captured.
    Does: the source frames each state: schema version, codec, digest; a state over the limit ends the move.
    Safe to repeat because: what is serialized already is kept.
    Raises: PayloadTooLarge naming the actor and the setting; NotApplicable when the pause is over.
    Undo: nothing to undo.
    """
    rows = await context.ask_rows(move.source, "serialize", move)
    state_bytes = sum(row.state_bytes or 0 for row in rows)
    return context.passed(move, MigrationStatus.SERIALIZED, actors=rows, state_bytes=state_bytes)


async def send(context: StepContext, move: Move) -> Move:
    """Have the source send to the destination what that lacks.

    Before: serialized.
    Does: source -> destination over NATS: a manifest of what was not verified there ahead, then chunks of what lacks,
        each acknowledged.
    Safe to repeat because: chunks are idempotent under (move, actor, offset); what is there is not sent again.
    Raises: UnknownActorType or PayloadTooLarge as the destination says; Unavailable when it is away.
    Undo: the destination forgets when the map no longer names the move.
    """
    move, _ = await context.ask_through(move.source, "send", move)
    return context.passed(move, MigrationStatus.SENT)


async def await_ack(context: StepContext, move: Move) -> Move:
    """Wait until the destination has verified every digest and decoded every state with its own code.

    Before: sent.
    Does: the source asks the destination and keeps its word; without it, it will not commit.
    Safe to repeat because: verifying changes nothing.
    Raises: StateNotPortable when the destination's code cannot take it; Unavailable when something is missing.
    Undo: as for send.
    """
    move, _ = await context.ask_through(move.source, "await_ack", move)
    return context.passed(move, MigrationStatus.ACKED)


async def delete(context: StepContext, move: Move) -> Move:
    """COMMIT: the destination owns the shard; the source hands over what waited, drops the actors, forwards stragglers.

    Before: acked.
    Does: the source writes COMMIT, forwards its buffer in order, and measures from closing its gate to the
        destination's word that it serves: the blackout.
    Safe to repeat because: the map names the outcome; a source that is gone, or has forgotten, is not needed any more.
    Raises: Unavailable, Timeout while the outcome is open; NotApplicable when it was aborted.
    Undo: none. This is the point of no return; from here only forward.
    """
    context.standing_still.end(move.id)  # in a moment: the next chain closes its gates meanwhile
    try:
        answer = await context.ask(move.source, "commit", move)
    except (NotApplicable, TransientError):
        entry = await context.directory.refresh(move.unit)
        if entry is None or entry.ownership.outcome_of(move.id) is not Outcome.COMMITTED:
            raise
        answer = {"blackout_ms": None, "waiting": None}
    return await context.reached(
        move, MigrationStatus.COMPLETED, blackout_ms=answer["blackout_ms"], messages_buffered=answer["waiting"]
    )


async def roll_back(context: StepContext, move_id: str, error: str | None) -> None:
    """End a move whose step failed for good: ABORT, unless COMMIT was first. Both nodes are told to look at the map."""
    move = await context.settle(move_id, error=error)
    if move is None:
        return
    for node in (move.source, move.destination):
        try:
            await context.ask(node, "resume", move)
        except (TransientError, PermanentError) as reason:
            log.info("not told of the rollback, it will see the map", node=node, move=move_id, error=str(reason))
    context.standing_still.end(move_id)


async def roll_back_together(context: StepContext, move_ids: Sequence[str]) -> None:
    for move_id in move_ids:
        await roll_back(context, move_id, None)


# -- as Celery tasks -------------------------------------------------------------------------------------------------
CHAIN: tuple[Step, ...] = (
    Step("pause", pause, PRIORITY_PAUSE),
    Step("capture", capture, PRIORITY_BEGUN),
    Step("serialize", serialize, PRIORITY_BEGUN),
    Step("send", send, PRIORITY_BEGUN),
    Step("await_ack", await_ack, PRIORITY_BEGUN),
    Step("delete", delete, PRIORITY_BEGUN),
)
assert tuple(step.name for step in CHAIN) == STEPS
driver = Driver(CHAIN)


def _task_for(step: Step) -> Any:
    """The Celery task of a step. Transient errors are tried again, with back-off and jitter; then the errback runs."""

    @app.task(bind=True, name=f"workflows.migration.{step.name}", max_retries=STEP_RETRIES)
    def task(self: Task, *move_ids: str) -> None:
        task_id, retries, worker = self.request.id, self.request.retries, Worker.get(settings)
        if not retries and worker.relieved(step.name, move_ids):
            if step is driver.before_commit:
                worker.begin(partial(driver.go_on_ahead, step), move_ids)
            return
        try:
            parted = worker.run(lambda context: driver.drive(step, context, move_ids, retries, task_id))
        except (TransientError, InDoubt) as error:
            log.warning("step failed", step=step.name, moves=move_ids, retries=retries, error=str(error))
            raise self.retry(exc=error, countdown=_countdown_s(retries), priority=step.priority) from error
        for move_id in parted.lost:
            rollback.si(move_id).apply_async(priority=PRIORITY_BEGUN)
        for move in parted.behind:
            log.warning("left its convoy", step=step.name, move=move.id, retries=retries)
            launch(move, retries=retries + 1)

    return task


TASKS: dict[str, Any] = {step.name: _task_for(step) for step in CHAIN}


@app.task(bind=True, name="workflows.migration.rollback", max_retries=STEP_RETRIES)
def rollback(self: Task, *move_ids: str) -> None:
    """The chain's errback, a task of its own with its own retries. The reconciler does the same if this one is lost."""
    try:
        Worker.get(settings).run(lambda context: roll_back_together(context, move_ids))
    except (TransientError, InDoubt) as error:
        raise self.retry(exc=error, countdown=_countdown_s(self.request.retries)) from error


def _countdown_s(retries: int) -> float:
    """How long to wait after a try that failed, the first being 0."""
    return RETRY_FIRST_S * 2.0**retries * random.uniform(1, 2)


def launch(*moves: Move, retries: int = 0) -> None:
    """Send one chain for moves that wait for the same step, from that step. Its task ids are in their records.

    With `retries`, that step was tried so many times before: the next try comes after as long as a retry's, and counts
    as one.
    """
    first, move_ids = moves[0], [move.id for move in moves]
    signatures = [
        TASKS[step.name].si(*move_ids).set(task_id=first.task_ids[step.name], priority=step.priority)
        for step in CHAIN
        if step.name in first.steps_left
    ]
    if retries:
        signatures[0].set(retries=retries, countdown=_countdown_s(retries - 1))
    chain(*signatures).on_error(rollback.si(*move_ids).set(priority=PRIORITY_BEGUN)).apply_async()
