"""The coordinator: who is there -> what should move -> chains, a few at a time. One leads, others stand by.

    every tick, as leader:
      assign      units nobody ever owned go to the nodes that are up
      fail over   units of dead nodes go to others, fenced; their actors wake there when somebody asks for them
      reconcile   moves whose task was lost, or whose record lags behind the map, are driven on or ended
      plan        when membership has been quiet for a moment: the fewest moves to a balanced map
      admit       planned moves are launched while their source and destination have room

All of it can be repeated by another leader at any time: the map decides, records report. A leader that was stopped
and wakes up does no harm, because everything it writes is a compare-and-set on what it has read.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any

import structlog

from routing import control, shard_map
from routing.birth import found_or_join
from routing.control import COORDINATOR
from routing.directory import Directory, MapEntry
from routing.errors import FerryError, InDoubt, InvalidInput, NotApplicable, TransientError, Unavailable
from routing.lease import Lease, boottime_s
from routing.link import Entry, Link, Message, Subscription
from routing.membership import OBSERVER_MARGIN_S, Member, Membership
from routing.placement import ConsistentHashPlacement, NodeWeight
from routing.settings import Settings
from routing.subjects import LEADER_KEY, SUSPENDED_KEY, Subjects, kv_stream, kv_subject, shard_key, shard_of_key
from workflows import planner
from workflows.context import StepContext
from workflows.records import (
    STEPS,
    TERMINAL,
    ActorRow,
    MigrationPlan,
    Move,
    PlannedActor,
    PlannedMove,
    RebalanceRequest,
    to_document,
)
from workflows.store import RecordStore

log = structlog.get_logger("ferry.coordinator")

TICK_S = 0.1
RECONCILE_EVERY_S = 1.0
STUCK_S = 6.0  # without advance before a step is sent again: more than a step's timeout, less than the pause lease
LAG_S = 2.0  # how long a record may lag behind the map before the reconciler writes it
RELAUNCHES = 2  # then a move that does not advance is aborted
REPLAN_FIRST_S, REPLAN_MOST_S = 2.0, 60.0  # after a plan with failures: a deterministic failure must not become a storm
ASK_S = 2.0


class Coordinator:
    """One coordinator process without its process: leads when it holds the lease, stands by otherwise."""

    def __init__(
        self, settings: Settings, *, name: str, link: Link, store: RecordStore,
        launch: Callable[[Move], Awaitable[None]], clock: Callable[[], float] = boottime_s,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.name, self.incarnation = name, uuid.uuid4().hex
        self._settings, self._link, self._store, self._launch = settings, link, store, launch
        self._clock, self._wall_clock = clock, wall_clock
        self._placement = ConsistentHashPlacement()
        self._waiting: dict[str, Move] = {}  # planned, not launched, in the order of their plan
        self._running: dict[str, Move] = {}  # launched, not seen to end
        self._relaunched: Counter[str] = Counter()
        self._suspended = False
        self._changed_at_s: float | None = None  # membership changed and no plan has followed yet
        self._reason = "start"
        self._replan_after_s, self._replan_pause_s = 0.0, REPLAN_FIRST_S
        self._no_failover_before_s = 0.0
        self._reconciled_at_s = 0.0
        self._subscriptions: list[Subscription] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.leading = False
        self._wake = asyncio.Event()  # something ended or changed: do not wait for the next tick

    # -- life ----------------------------------------------------------------------------------------------------------
    async def start(self) -> None:
        """Raises Incompatible, Unavailable, Timeout."""
        settings = self._settings
        born = await found_or_join(self._link, settings)
        self._subjects = subjects = Subjects(settings.cluster, born.logs)
        self._lease = Lease(
            self._link, subjects.lease_bucket, LEADER_KEY, incarnation=self.incarnation,
            ttl_s=settings.leader_lease_s, clock=self._clock,
        )  # fmt: skip
        self._directory = Directory(self._link, subjects, shards_total=born.shards, timeout_s=settings.append_timeout_s)
        self._membership = Membership(self._link, subjects, node_lease_s=settings.node_lease_s, clock=self._clock)
        self._context = StepContext(
            link=self._link, subjects=subjects, directory=self._directory, store=self._store, settings=settings,
            wall_clock=self._wall_clock,
        )  # fmt: skip
        self._directory.on_change(self._on_map)
        self._membership.on_change(self._on_members)
        self._link.on_reconnect(self._on_reconnect)
        await self._directory.start()
        await self._membership.start()
        self._subscriptions.append(
            await self._link.watch(
                kv_stream(subjects.map_bucket), kv_subject(subjects.map_bucket, SUSPENDED_KEY), self._on_suspended,
                timeout_s=settings.append_timeout_s,
            )
        )  # fmt: skip
        self._verbs = {
            "plan": self._ask_plan, "rebalance": self._ask_rebalance, "migrate": self._ask_migrate,
            "cancel": self._ask_cancel, "suspend": self._ask_suspend, "resume": self._ask_resume,
            "status": self._ask_status,
        }  # fmt: skip

    async def serve(self, stopping: asyncio.Event) -> None:
        """Lead or stand by until `stopping` is set; then give the lease up, so that the other leads at once."""
        renewed_at_s = float("-inf")
        try:
            while not stopping.is_set():
                try:
                    if self._clock() - renewed_at_s >= self._lease.renew_every_s:
                        renewed_at_s = self._clock()
                        await self._hold_lease()
                    if self.leading and self._lease.trusted:
                        await self.tick()
                except (TransientError, InDoubt, NotApplicable) as error:
                    log.warning("tick not finished, goes on", leading=self.leading, error=str(error))
                await self._next_tick(stopping)
        finally:
            await self.stop()

    async def _next_tick(self, stopping: asyncio.Event) -> None:
        """Return after a tick, or as soon as there is something to do."""
        waits = [asyncio.ensure_future(event.wait()) for event in (stopping, self._wake)]
        try:
            await asyncio.wait(waits, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._wake.clear()
            for wait in waits:
                wait.cancel()

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            for subscription in [*self._subscriptions, self._directory, self._membership]:
                await subscription.stop()
            await self._lease.release()
        except TransientError as error:
            log.warning("lease not released: it runs out by itself", error=str(error))
        await self._link.close()
        await self._store.close()

    async def _hold_lease(self) -> None:
        held = await self._lease.hold({"name": self.name})
        if held and not self.leading:
            await self._begin_to_lead()
        elif not held and self.leading:
            log.warning("no longer leading", name=self.name)
            self.leading = False
            self._waiting.clear()
            self._running.clear()
            await self._subscriptions.pop().stop()

    async def _begin_to_lead(self) -> None:
        """Take over what an earlier leader left: its unfinished moves are in the store, in the order of their plan."""
        unfinished = await self._store.unfinished_moves()
        self._waiting = {m.id: m for m in unfinished if m.started_at is None}
        self._running = {m.id: m for m in unfinished if m.started_at is not None}
        control_subject = self._subjects.control(COORDINATOR, "*")
        self._subscriptions.append(await self._link.subscribe(control_subject, self._on_control))
        self._changed_at_s, self._reason = self._clock(), "new leader"
        # Nodes that start together with this leader get a moment to take their leases before they count as dead.
        self._no_failover_before_s = max(self._no_failover_before_s, self._clock() + 2 * self._settings.debounce_s)
        self.leading = True
        log.info("leading", name=self.name, waiting=len(self._waiting), running=len(self._running))

    # -- what it sees --------------------------------------------------------------------------------------------------
    def _on_members(self) -> None:
        self._changed_at_s = self._clock()
        self._reason = "membership changed"

    def _on_map(self, unit: str, entry: MapEntry) -> None:
        """A move that the map has ended makes room for the next, before its record is written."""
        last = entry.ownership.last
        if last is not None and last.move in self._running:
            move = self._running.pop(last.move)
            self._relaunched.pop(last.move, None)
            log.info("move ended", move=move.id, unit=unit, outcome=last.outcome)
            self._wake.set()

    def _on_reconnect(self) -> None:
        """While NATS was away nobody could renew: give every node its chance before calling it dead."""
        self._no_failover_before_s = self._clock() + self._settings.node_lease_s + OBSERVER_MARGIN_S

    def _on_suspended(self, entry: Entry) -> None:
        self._suspended = not entry.removed

    # -- one tick as leader --------------------------------------------------------------------------------------------
    async def tick(self) -> None:
        alive = self._membership.alive()
        await self._assign(alive)
        if self._clock() >= self._no_failover_before_s:
            await self._fail_over(alive)
        if self._clock() - self._reconciled_at_s >= RECONCILE_EVERY_S:
            self._reconciled_at_s = self._clock()
            await self._reconcile()
        await self._plan_when_due(alive)
        await self._admit(alive)

    async def _assign(self, alive: dict[str, Member]) -> None:
        """ASSIGN what nobody ever owned."""
        unassigned = [n for n in range(self._directory.shards_total) if self._directory.get(shard_key(n)) is None]
        takers = _takers(alive)
        if not unassigned or not takers or (self._changed_at_s or 0) + self._settings.debounce_s > self._clock():
            return
        owners = await self._new_owners(set(), takers)
        await self._write_all({shard_key(n): (None, shard_map.assign(owners[n])) for n in unassigned})
        log.info("assigned", units=len(unassigned), nodes=[node.id for node in takers])

    async def _fail_over(self, alive: dict[str, Member]) -> None:
        """FAILOVER what dead nodes own."""
        orphans = {
            unit: entry for unit, entry in self._directory.entries().items() if entry.ownership.owner not in alive
        }
        takers = _takers(alive)
        if not orphans or not takers:
            return
        dead = sorted({entry.ownership.owner for entry in orphans.values()})
        owners = await self._new_owners(set(dead), takers)
        log.warning("failing over", dead=dead, units=len(orphans))
        await self._write_all(
            {
                unit: (entry, shard_map.failover(entry.ownership, to=owners[_shard(unit)]))
                for unit, entry in orphans.items()
            }
        )

    async def _new_owners(self, dead: set[str], takers: list[NodeWeight]) -> dict[int, str]:
        """shard -> node, as placement wants it when the shards of `dead` and of nobody are free."""
        owners: dict[int, str | None] = dict.fromkeys(range(self._directory.shards_total))
        for unit, entry in self._directory.entries().items():
            owner = entry.ownership.owner
            owners[_shard(unit)] = None if owner in dead else owner
        # A draining node keeps its shards here: they leave by moves, not by failover.
        return dict(self._placement.rebalance_shards(owners, takers).shard_map)

    async def _write_all(self, changes: dict[str, tuple[MapEntry | None, shard_map.Ownership]]) -> None:
        """Many transitions at once. One that loses was overtaken by who knew better: the next tick looks again."""
        results = await asyncio.gather(
            *(self._directory.transition(unit, before, after) for unit, (before, after) in changes.items()),
            return_exceptions=True,
        )
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, (TransientError, InDoubt)):
                raise result

    # -- planning ------------------------------------------------------------------------------------------------------
    async def _plan_when_due(self, alive: dict[str, Member]) -> None:
        now_s = self._clock()
        if self._changed_at_s is None or self._suspended or now_s < self._changed_at_s + self._settings.debounce_s:
            return
        if now_s < self._replan_after_s:
            return
        await self._supersede()
        if self._running:
            return  # a few moves, each some milliseconds: plan on what they leave behind
        planned_at_s = self._changed_at_s
        request = await self._make_plan(alive, self._reason)
        if request is not None and request.moves:
            await self.handle_rebalance_request(request)
        if self._changed_at_s == planned_at_s:
            self._changed_at_s = None

    async def _supersede(self) -> None:
        """Moves planned for an earlier membership and not yet launched are dropped: the next plan decides anew."""
        for move in list(self._waiting.values()):
            await self._context.settle(move.id, error="superseded: membership changed before it was launched")
            self._waiting.pop(move.id, None)

    async def _make_plan(self, alive: dict[str, Member], reason: str) -> RebalanceRequest | None:
        """What a rebalance would move now; None when no node could receive anything."""
        if not _takers(alive):
            return None
        return planner.plan_rebalance(
            {_shard(unit): entry.ownership for unit, entry in self._directory.entries().items()},
            [
                planner.NodeState(id=m.id, weight=m.weight, draining=not m.takes_shards)
                for m in alive.values()
            ],
            await self._inventories(alive),
            plan_id=_new_id("p"), reason=reason, shards_total=self._directory.shards_total, placement=self._placement,
        )  # fmt: skip

    async def _inventories(self, alive: dict[str, Member]) -> dict[str, planner.Inventory]:
        async def of(node: str) -> tuple[str, planner.Inventory]:
            try:
                units = (await self._ask(node, "inventory"))["units"]
            except TransientError as error:
                log.warning("no inventory: its actors are found at capture", node=node, error=str(error))
                return node, {}
            return node, {_shard(unit): [(str(a), int(size)) for a, size in rows] for unit, rows in units.items()}

        return dict(await asyncio.gather(*(of(node) for node in alive)))

    async def handle_rebalance_request(self, request: RebalanceRequest) -> MigrationPlan:
        """Write down a plan, its moves and one record per actor, and queue the moves for admission.

        Raises Unavailable when Redis cannot store it; nothing has moved then. Repeating it is safe.
        """
        known = await self._store.plan(request.plan_id)
        if known is not None:
            return known
        now = self._wall_clock()
        estimate = planner.summary(request)
        plan = MigrationPlan(
            id=request.plan_id, reason=request.reason, created_at=now, started_at=now, total=len(request.moves),
            actors_total=estimate.actors, state_bytes=estimate.state_bytes, estimate_s=estimate.estimate_s,
        )  # fmt: skip
        moves = [_move_of(request.plan_id, planned, now) for planned in request.moves]
        rows = {
            move.id: [
                ActorRow(index=index, actor_id=actor.actor_id, state_bytes=actor.state_bytes)
                for index, actor in enumerate(planned.actors)
            ]
            for move, planned in zip(moves, request.moves, strict=True)
        }
        stored = await self._store.create_plan(plan, moves, rows)
        self._waiting.update({move.id: move for move in stored})
        log.info("plan", plan=plan.id, reason=plan.reason, moves=len(moves), actors=plan.actors_total)
        return plan

    # -- admission -----------------------------------------------------------------------------------------------------
    async def _admit(self, alive: dict[str, Member]) -> None:
        """Launch waiting moves while their source and destination have room. The window bounds what is ever paused."""
        if not self._waiting:
            return
        busy = Counter(node for move in self._running.values() for node in (move.source, move.destination))
        for move in list(self._waiting.values()):
            if max(busy[move.source], busy[move.destination]) >= self._settings.moves_at_once:
                continue
            del self._waiting[move.id]
            if await self._start(move, alive):
                busy.update((move.source, move.destination))

    async def _start(self, move: Move, alive: dict[str, Member]) -> bool:
        entry = self._directory.get(move.unit)
        view = entry.ownership if entry is not None else None
        if view is None or view.owner != move.source or move.destination not in alive:
            await self._context.settle(move.id, error=f"{move.unit} or its destination changed before the launch")
            return False
        if view.incarnation is None or view.move is not None:
            self._waiting[move.id] = move  # just being taken over, or the end of another move: in a moment
            return False
        assert entry is not None
        started = replace(
            move, lock_revision=entry.revision, started_at=self._wall_clock(), step_at=self._wall_clock(),
            task_ids={step: str(uuid.uuid4()) for step in STEPS},
        )  # fmt: skip
        await self._send_chain(await self._store.save(started))
        return True

    async def _send_chain(self, move: Move) -> None:
        self._running[move.id] = move
        await self._launch(move)

    # -- reconciling ---------------------------------------------------------------------------------------------------
    async def _reconcile(self) -> None:
        """Drive on or end every move that does not advance. Celery on Redis can lose a task for good; this does not."""
        now = self._wall_clock()
        unfinished = {move.id: move for move in await self._store.unfinished_moves()}
        for move_id in [move_id for move_id in self._running if move_id not in unfinished]:
            del self._running[move_id]
        for move in unfinished.values():
            if move.id in self._waiting:
                continue
            if move.started_at is None:
                await self._context.settle(move.id, error="its plan was never completed: the leader died")
                continue
            idle_s = now - (move.step_at or move.started_at)
            entry = self._directory.get(move.unit)
            ended = entry is None or entry.ownership.outcome_of(move.id) is not None
            if ended and idle_s > LAG_S:
                await self._context.settle(move.id)
            elif idle_s > STUCK_S:
                await self._drive_on(move, locked=entry is not None and entry.ownership.move == move.id)
        await self._finish_plans()

    async def _drive_on(self, move: Move, *, locked: bool) -> None:
        self._relaunched[move.id] += 1
        if self._relaunched[move.id] > RELAUNCHES or not (locked or move.step == STEPS[0]):
            log.warning("move does not advance: aborting", move=move.id, unit=move.unit, step=move.step)
            await self._context.settle(move.id, error=f"{move.step}: no worker took this step in time")
            return
        log.warning("move does not advance: its step is sent again", move=move.id, unit=move.unit, step=move.step)
        again = replace(
            move, step_at=self._wall_clock(), task_ids=move.task_ids | {s: str(uuid.uuid4()) for s in _left(move)}
        )
        await self._send_chain(await self._store.save(again))

    async def _finish_plans(self) -> None:
        for plan in await self._store.running_plans():
            if plan.completed + plan.failed >= plan.total and plan.finished_at is None:
                await self._store.save_plan(replace(plan, finished_at=self._wall_clock()))
                log.info("plan finished", plan=plan.id, completed=plan.completed, failed=plan.failed)
                if plan.failed:
                    self._replan_later()
                else:
                    self._replan_pause_s = REPLAN_FIRST_S
                await self._store.trim(self._settings.records_kept)

    def _replan_later(self) -> None:
        """Some moves did not go through, so the map is not balanced yet. Each time in a row, wait longer."""
        if self._clock() < self._replan_after_s:
            return
        self._replan_after_s = self._clock() + self._replan_pause_s
        self._replan_pause_s = min(self._replan_pause_s * 2, REPLAN_MOST_S)
        if self._changed_at_s is None:
            self._changed_at_s, self._reason = self._clock(), "moves were rolled back"

    # -- what it is asked ----------------------------------------------------------------------------------------------
    def _on_control(self, message: Message) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, message: Message) -> None:
        verb = message.subject.rpartition(".")[2]
        try:
            run: Callable[[dict[str, Any]], Coroutine[Any, Any, dict[str, Any]]] | None = self._verbs.get(verb)
            if run is None:
                raise InvalidInput(f"verb {verb!r} is unknown to this coordinator: upgrade it")
            result: dict[str, Any] | Exception = await run(control.decode(message.payload))
        except FerryError as error:
            result = error
        try:
            await self._link.publish(message.reply, control.encode_result(result))
        except FerryError as error:
            log.warning("answer not sent", verb=verb, error=str(error))

    async def _ask_status(self, _: dict[str, Any]) -> dict[str, Any]:
        return {
            "leader": self.name, "suspended": self._suspended, "waiting": len(self._waiting),
            "running": len(self._running),
        }  # fmt: skip

    async def _ask_plan(self, _: dict[str, Any]) -> dict[str, Any]:
        """A dry run: what a rebalance would move and why; moves nothing."""
        request = await self._make_plan(self._membership.alive(), "dry run")
        if request is None:
            raise Unavailable("no node could receive a shard: start one")
        estimate = planner.summary(request)
        return {
            "moves": len(request.moves), "actors": estimate.actors, "state_bytes": estimate.state_bytes,
            "estimate_s": round(estimate.estimate_s, 3),
            "routes": [
                {"source": r.source, "destination": r.destination, "moves": r.moves, "actors": r.actors,
                 "state_bytes": r.state_bytes}
                for r in estimate.routes
            ],
            "reasons": dict(Counter(move.reason for move in request.moves)),
        }  # fmt: skip

    async def _ask_rebalance(self, _: dict[str, Any]) -> dict[str, Any]:
        request = await self._make_plan(self._membership.alive(), "asked for")
        if request is None:
            raise Unavailable("no node could receive a shard: start one")
        if not request.moves:
            return {"plan": None}
        return {"plan": to_document(await self.handle_rebalance_request(request))}

    async def _ask_migrate(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Move one shard by hand. Raises InvalidInput for an unknown shard or node, NotApplicable when it cannot go."""
        shard, destination = asked.get("shard"), asked.get("destination")
        alive = self._membership.alive()
        if not isinstance(shard, int) or not 0 <= shard < self._directory.shards_total:
            raise InvalidInput(f"shard {shard!r} is unknown: this cluster has 0 to {self._directory.shards_total - 1}")
        if destination not in alive:
            raise InvalidInput(f"node {destination!r} is unknown: nodes are {', '.join(alive) or 'none'}")
        if not alive[destination].takes_shards:
            raise NotApplicable(f"node {destination} is {alive[destination].state}: it takes no shards")
        entry = await self._directory.refresh(shard_key(shard))
        if entry is None:
            raise Unavailable(f"shard/{shard} has no owner yet: try again in a moment")
        owner = entry.ownership.owner
        if owner == destination:
            raise NotApplicable(f"shard/{shard} is at {destination} already: nothing to move")
        inventory = (await self._inventories({k: v for k, v in alive.items() if k == owner})).get(owner, {})
        actors = tuple(PlannedActor(actor_id=a, state_bytes=size) for a, size in inventory.get(shard, ()))
        planned = PlannedMove(
            unit=shard_key(shard), shard=shard, source=owner, destination=str(destination), reason="by hand",
            actors=actors,
        )  # fmt: skip
        request = RebalanceRequest(plan_id=_new_id("p"), reason=f"shard/{shard} by hand", moves=(planned,))
        return {"plan": to_document(await self.handle_rebalance_request(request))}

    async def _ask_cancel(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Stop a plan: what is not launched is cancelled, what has not committed rolls back."""
        plan = await self._store.plan(str(asked.get("plan")))
        if plan is None:
            raise InvalidInput(f"plan {asked.get('plan')!r} is unknown: `ferry status` names the latest")
        await self._store.save_plan(replace(plan, cancelled=True))
        stopped = 0
        for move in await self._store.unfinished_moves():
            if move.plan_id == plan.id:
                self._waiting.pop(move.id, None)
                ended = await self._context.settle(move.id, error="its plan was cancelled")
                stopped += ended is not None and ended.status in TERMINAL
        return {"stopped": stopped}

    async def _ask_suspend(self, _: dict[str, Any]) -> dict[str, Any]:
        await self._link.append(
            kv_subject(self._subjects.map_bucket, SUSPENDED_KEY), b"true", expected=None, timeout_s=ASK_S
        )
        return {"suspended": True}

    async def _ask_resume(self, _: dict[str, Any]) -> dict[str, Any]:
        subject = kv_subject(self._subjects.map_bucket, SUSPENDED_KEY)
        await self._link.append(subject, b"", expected=None, timeout_s=ASK_S, discard=True)
        self._changed_at_s, self._reason = self._clock(), "resumed"
        return {"suspended": False}

    async def _ask(self, node: str, verb: str) -> dict[str, Any]:
        return await control.ask(self._link, self._subjects, node, verb, timeout_s=ASK_S)


def _takers(alive: dict[str, Member]) -> list[NodeWeight]:
    return [NodeWeight(id=m.id, weight=m.weight) for m in alive.values() if m.takes_shards]


def _shard(unit: str) -> int:
    shard = shard_of_key(unit)
    assert shard is not None
    return shard


def _left(move: Move) -> tuple[str, ...]:
    return STEPS[STEPS.index(move.step or STEPS[0]) :]


def _new_id(kind: str) -> str:
    return f"{kind}{uuid.uuid4().hex[:12]}"


def _move_of(plan_id: str, planned: PlannedMove, now: float) -> Move:
    return Move(
        id=_new_id("m"), plan_id=plan_id, unit=planned.unit, shard=planned.shard, source=planned.source,
        destination=planned.destination, actors_total=len(planned.actors),
        state_bytes=sum(actor.state_bytes for actor in planned.actors), created_at=now,
    )  # fmt: skip
