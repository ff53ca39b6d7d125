"""The coordinator: who is there -> what should move -> chains, a few at a time. One leads, others stand by.

    lease      the leader holds one key; another leads when it runs out
    ownership  shards nobody owns are assigned, those of dead nodes fail over         (workflows/assignment.py)
    moves      when membership has been quiet for a moment: the fewest moves to a balanced map, launched while their
               nodes have room (workflows/admission.py); what does not advance is driven on or ended from the map
               (workflows/reconciler.py)

The three go on side by side, so that a Redis that hangs holds up moves and never a failover. All of it can be repeated
by another leader at any time: the map decides, records report. A leader that was stopped and wakes up does no harm,
because everything it writes is a compare-and-set on what it has read.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any

import structlog

from routing import control
from routing.address import ActorId
from routing.birth import found_or_join
from routing.control import COORDINATOR, Inventory, InventoryRequest
from routing.directory import Directory, MapEntry
from routing.errors import FerryError, InDoubt, InvalidInput, NotApplicable, TransientError, Unavailable
from routing.jsonlike import shown
from routing.lease import Lease, boottime_s
from routing.link import Entry, Link, Message, Subscription
from routing.membership import OBSERVER_MARGIN_S, Member, Membership
from routing.placement import ConsistentHashPlacement
from routing.settings import Settings
from routing.shard_map import Ownership
from routing.subjects import LEADER_KEY, SUSPENDED_KEY, Subjects, actor_of_key, kv_stream, kv_subject, shard_of_key
from routing.typed import taken_as
from workflows import planner, reconciler
from workflows.admission import Admission
from workflows.assignment import Assignment, shard_in
from workflows.context import StepContext
from workflows.desk import Desk
from workflows.reconciler import Reconciler
from workflows.records import ActorRow, ClusterEvent, MigrationPlan, Move, PlannedMove, RebalanceRequest
from workflows.store import RecordStore
from workflows.words import counted

log = structlog.get_logger("ferry.coordinator")

TICK_S = 0.1
REPLAN_FIRST_S, REPLAN_MOST_S = 2.0, 60.0  # after a plan with failures: a deterministic failure must not become a storm
INVENTORY_S = 2.0  # for one page of a node's inventory
INVENTORY_PAGES = 5_000  # of two thousand actors each: more than one node can hold


class Coordinator:
    """One coordinator process without its process: leads when it holds the lease, stands by otherwise."""

    def __init__(
        self, settings: Settings, *, name: str, link: Link, store: RecordStore,
        launch: Callable[..., Awaitable[None]], clock: Callable[[], float] = boottime_s,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.name, self.incarnation = name, uuid.uuid4().hex
        self.leading, self.suspended = False, False
        self.counters: Counter[str] = Counter()
        self._settings, self._link, self._store, self._launch = settings, link, store, launch
        self._clock, self._wall_clock = clock, wall_clock
        self._placement = ConsistentHashPlacement()
        self._changed_at_s: float | None = None  # membership changed and no plan has followed yet
        self._reason = "start"
        self._replan_after_s, self._replan_pause_s = float("-inf"), REPLAN_FIRST_S
        self._no_failover_before_s = float("-inf")
        self._reconciled_at_s = float("-inf")
        self._wake = asyncio.Event()  # a move ended: do not wait for the next tick
        self._inherited = False  # the moves an earlier leader left were read from the store
        self._asking: Subscription | None = None
        self._aside: set[asyncio.Task[None]] = set()
        self._known: dict[str, str] = {}  # node -> state, as last told

    # -- life ----------------------------------------------------------------------------------------------------------
    async def start(self) -> None:
        """Raises Incompatible, Unavailable, Timeout."""
        settings, timeout_s = self._settings, self._settings.append_timeout_s
        born = await found_or_join(self._link, settings)
        self._subjects = subjects = Subjects(settings.cluster, born.logs)
        self._lease = Lease(
            self._link, subjects.lease_bucket, LEADER_KEY, incarnation=self.incarnation,
            ttl_s=settings.leader_lease_s, clock=self._clock,
        )  # fmt: skip
        self.directory = Directory(
            self._link, subjects, shards_total=born.shards, timeout_s=timeout_s, counters=self.counters
        )
        self.membership = Membership(
            self._link, subjects, node_lease_s=settings.node_lease_s, clock=self._clock, counters=self.counters
        )
        context = StepContext(
            link=self._link, subjects=subjects, directory=self.directory, store=self._store, settings=settings,
            wall_clock=self._wall_clock,
        )  # fmt: skip
        self._assignment = Assignment(self.directory, self._placement)
        self.admission = Admission(
            store=self._store, directory=self.directory, context=context, launch=self._launch,
            moves_at_once=settings.moves_at_once, moves_per_chain=settings.moves_per_chain,
            blackout_budget_s=settings.blackout_budget_s, wall_clock=self._wall_clock,
        )  # fmt: skip
        self._reconciler = Reconciler(
            store=self._store, directory=self.directory, context=context, admission=self.admission,
            records_kept=settings.records_kept, wall_clock=self._wall_clock, clock=self._clock,
        )  # fmt: skip
        self._desk = Desk(self, link=self._link, subjects=subjects, store=self._store, context=context)
        self.directory.on_change(self._on_map)
        self.membership.on_change(lambda: self.plan_soon("membership changed"))
        self._link.on_reconnect(self._await_renewals)
        await self.directory.start()
        await self.membership.start()
        stream, subject = kv_stream(subjects.map_bucket), kv_subject(subjects.map_bucket, SUSPENDED_KEY)
        self._watch = await self._link.watch(stream, subject, self._on_suspended, timeout_s=timeout_s)

    async def serve(self, stopping: asyncio.Event) -> None:
        """Lead or stand by until `stopping` is set; then give the lease up, so that another leads at once."""
        try:
            async with asyncio.TaskGroup() as group:
                loops = [
                    group.create_task(self._repeat(self._hold_lease, self._lease.renew_every_s)),
                    group.create_task(self._repeat(self._tend_ownership, TICK_S)),
                    group.create_task(self._repeat(self._tend_moves, TICK_S, self._wake)),
                ]
                await stopping.wait()
                for loop in loops:
                    loop.cancel()
        finally:
            await self.stop()

    async def stop(self) -> None:
        self.leading = False
        for task in list(self._aside):
            task.cancel()
        await asyncio.gather(*self._aside, return_exceptions=True)
        try:
            for following in filter(None, (self._asking, self._watch, self.directory, self.membership)):
                await following.stop()
            await self._lease.release()
        except TransientError as error:
            log.warning("lease not released: it runs out by itself", error=str(error))
        await self._link.close()
        await self._store.close()

    async def _repeat(
        self, act: Callable[[], Awaitable[None]], every_s: float, wake: asyncio.Event | None = None
    ) -> None:
        """Run `act` again and again, at once when `wake` is set. What may pass is logged and tried again."""
        wake = wake or asyncio.Event()
        while True:
            try:
                await act()
            except (TransientError, InDoubt, NotApplicable) as error:
                log.warning("goes on", what=act.__name__.strip("_"), error=str(error))
            try:
                async with asyncio.timeout(every_s):
                    await wake.wait()
            except TimeoutError:
                continue
            finally:
                wake.clear()

    # -- lease ---------------------------------------------------------------------------------------------------------
    async def _hold_lease(self) -> None:
        stood_still = self.leading and not self._lease.is_trusted()
        held = await self._lease.hold({"name": self.name})
        if held and stood_still:
            self._await_renewals()  # NATS or this process stood still, and so perhaps did everybody's renewals
        if held and not self.leading:
            self._tell(f"coordinator {self.name} leads")
            control_subject = self._subjects.control(COORDINATOR, "*")
            self._asking = await self._link.subscribe(control_subject, self._on_control)
            # Nodes that start together with this leader get a moment to take their leases before they count as dead.
            self._hold_failover(2 * self._settings.debounce_s)
            self.plan_soon("new leader")
            self._known = {member.id: member.state.value for member in self.membership.alive().values()}
            self.leading, self._inherited = True, False
        elif not held and self.leading:
            log.warning("no longer leading", name=self.name)
            self.leading = False
            self.admission.forget_all()
            if self._asking is not None:
                await self._asking.stop()  # a standby has no ear for questions, so that they fail at once

    @property
    def _may_lead(self) -> bool:
        return self.leading and self._lease.is_trusted()

    # -- ownership -----------------------------------------------------------------------------------------------------
    async def _tend_ownership(self) -> None:
        if not self._may_lead:
            return
        alive = self.membership.alive()
        self._tell_who_came_and_went(alive)
        if self._quiet():
            self._tell(await self._assignment.assign(alive))
        if self._may_fail_over:
            self._tell(await self._assignment.fail_over(alive))

    def _tell_who_came_and_went(self, alive: Mapping[str, Member]) -> None:
        now = {member.id: member.state.value for member in alive.values()}
        for node in now.keys() | self._known.keys():
            state = now.get(node)
            if state != self._known.get(node):
                self._tell(f"node {node} {'left' if state is None else 'is ' + state}")
        self._known = now

    @property
    def _may_fail_over(self) -> bool:
        """Whether who is not alive is dead. When nobody was heard, every node that lives is first to be heard again."""
        listening = self.membership.listening_for_s() >= self._renewals_within_s
        return listening and self._clock() >= self._no_failover_before_s

    @property
    def _renewals_within_s(self) -> float:
        """How long after a silence every node that lives has been heard of."""
        return self._settings.node_lease_s + OBSERVER_MARGIN_S

    def _await_renewals(self) -> None:
        """While NATS was away nobody could renew: give every node its chance before calling it dead."""
        self._hold_failover(self._renewals_within_s)

    def _hold_failover(self, for_s: float) -> None:
        self._no_failover_before_s = max(self._no_failover_before_s, self._clock() + for_s)

    # -- moves ---------------------------------------------------------------------------------------------------------
    async def _tend_moves(self) -> None:
        if not self._may_lead:
            return
        if not self._inherited:
            self.admission.take_over(await self._store.unfinished_moves())
            self._inherited = True
        if self._clock() - self._reconciled_at_s >= reconciler.EVERY_S:
            self._reconciled_at_s = self._clock()
            for plan in await self._reconciler.reconcile():
                self._tell(f"plan {plan.id} ended: {plan.completed} of {counted(plan.total, 'move')} completed")
                self._after_plan(plan.failed)
        if self._changed_at_s is None and not self.admission.busy and self._assignment.strays(self.membership.alive()):
            self.plan_soon("actors go back to their shards")
        await self._plan_when_due()
        await self.admission.admit(self.takers() if self.admission.waiting else (), self._awaited())

    def _awaited(self) -> set[str]:
        """Destinations that are not alive as far as was heard, while that does not say yet that they are dead."""
        if self._may_fail_over:
            return set()
        return {move.destination for move in self.admission.waiting.values()} - self.membership.alive().keys()

    def plan_soon(self, reason: str) -> None:
        """Plan once membership has been quiet for the debounce time."""
        self._changed_at_s, self._reason = self._clock(), reason

    def _quiet(self) -> bool:
        return self._clock() >= (self._changed_at_s or float("-inf")) + self._settings.debounce_s

    async def _plan_when_due(self) -> None:
        asked_at_s = self._changed_at_s
        if asked_at_s is None or self.suspended or not self._quiet() or self._clock() < self._replan_after_s:
            return
        await self.admission.drop_waiting("superseded: a newer plan decides")
        if self.admission.running or self._assignment.unassigned():
            return  # a few moves, each some milliseconds: plan on what they leave behind
        if self.takers():
            request = await self.make_plan(self._reason)
            if request.moves:
                await self.handle_rebalance_request(request)
        if self._changed_at_s == asked_at_s:
            self._changed_at_s = None

    def _after_plan(self, failed: int) -> None:
        """When some moves did not go through the map is not balanced yet: plan again, later each time in a row."""
        if not failed:
            self._replan_pause_s = REPLAN_FIRST_S
            return
        self._replan_after_s = self._clock() + self._replan_pause_s
        self._replan_pause_s = min(self._replan_pause_s * 2, REPLAN_MOST_S)
        if self._changed_at_s is None:
            self.plan_soon("moves were rolled back")

    async def make_plan(self, reason: str) -> RebalanceRequest:
        """What a rebalance would move now, and why. Raises InvalidInput when no node could receive anything."""
        alive, takers, lost = self.membership.alive(), self.takers(), set(self.directory.unreadable())

        def expected(entries: Mapping[str, MapEntry]) -> dict[str, Ownership]:
            """What the map says, and will say as soon as the moves that were planned before have locked their units."""
            found = {unit: entry.ownership for unit, entry in entries.items() if unit not in lost}
            for move in (*self.admission.waiting.values(), *self.admission.running.values()):
                own = found.get(move.unit)
                if own is not None and own.owner == move.source and own.move is None:
                    found[move.unit] = replace(own, move=move.id, destination=move.destination)
            return found

        return planner.plan_rebalance(
            {shard_in(unit): ownership for unit, ownership in expected(self.directory.shards()).items()},
            [
                planner.NodeState(id=m.id, weight=m.weight, draining=m.id not in takers, schemas=m.schemas)
                for m in alive.values()
            ],
            await self.inventories(alive),
            plan_id=self.new_plan_id(), reason=reason, shards_total=self.directory.shards_total,
            placement=self._placement,
            apart=expected(self.directory.apart()),
        )  # fmt: skip

    def takers(self) -> set[str]:
        """The nodes that may receive shards now."""
        return {node.id for node in self._assignment.takers(self.membership.alive())}

    def new_plan_id(self) -> str:
        return f"p{uuid.uuid4().hex[:12]}"

    async def inventories(self, nodes: Mapping[str, Member]) -> dict[str, planner.Inventory]:
        """node -> unit -> its live actors with the bytes of their state, as the nodes answer."""

        async def of(node: str) -> tuple[str, planner.Inventory]:
            try:
                return node, await self._inventory_of(node)
            except (TransientError, InvalidInput) as error:
                self.counters["malformed"] += isinstance(error, InvalidInput)
                log.warning("no inventory: its actors are found at capture", node=node, error=str(error))
                return node, {}

        return dict(await asyncio.gather(*(of(node) for node in nodes)))

    async def _inventory_of(self, node: str) -> planner.Inventory:
        """All pages of a node's inventory. Raises InvalidInput when it is none, Unavailable, Timeout."""
        found: dict[str, list[tuple[str, int]]] = {}
        asked = InventoryRequest()
        for _ in range(INVENTORY_PAGES):
            answer = await control.ask(self._link, self._subjects, node, "inventory", asked, timeout_s=INVENTORY_S)
            page = taken_as(Inventory, answer, f"inventory of {node}")
            for unit, actors in page.units.items():
                if shard_of_key(unit) is None and actor_of_key(unit) is None:
                    raise InvalidInput(f"inventory of {node} names {shown(unit)}: expected a unit")
                found.setdefault(unit, []).extend((str(ActorId.parse(actor)), size) for actor, size in actors)
            if page.next is None:
                return found
            asked = page.next
        raise InvalidInput(f"inventory of {node} does not end after {INVENTORY_PAGES} pages")

    async def handle_rebalance_request(self, request: RebalanceRequest) -> MigrationPlan:
        """Write down a plan, its moves and one record per actor, and queue the moves for admission.

        Raises Unavailable when Redis cannot store it; nothing has moved then. Repeating it is safe.
        """
        known = await self._store.plan(request.plan_id)
        if known is not None:
            return known
        now, estimate = self._wall_clock(), planner.summary(request)
        plan = MigrationPlan(
            id=request.plan_id, reason=request.reason, created_at=now, started_at=now, total=len(request.moves),
            actors_total=estimate.actors, state_bytes=estimate.state_bytes, estimate_s=estimate.estimate_s,
        )  # fmt: skip
        moves = [_move_of(request.plan_id, planned, now) for planned in request.moves]
        rows = {move.id: _rows_of(planned) for move, planned in zip(moves, request.moves, strict=True)}
        self.admission.add(await self._store.create_plan(plan, moves, rows))
        self._wake.set()
        what = f"{counted(len(moves), 'move')}, {counted(plan.actors_total, 'actor')}"
        self._tell(f"plan {plan.id}, because {plan.reason}: {what}")
        return plan

    def _tell(self, what: str | None) -> None:
        """Log what happened to the cluster and keep it for `ferry status`; nothing waits for Redis because of it."""
        if what is None:
            return
        log.info(what)
        self._run_aside(self._keep(ClusterEvent(at=self._wall_clock(), what=what)))

    async def _keep(self, event: ClusterEvent) -> None:
        try:
            await self._store.note(event)
        except TransientError as error:
            log.warning("event not kept", what=event.what, error=str(error))

    def _run_aside(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._aside.add(task)
        task.add_done_callback(self._aside.discard)

    # -- what it sees and hears ----------------------------------------------------------------------------------------
    def _on_map(self, unit: str, entry: MapEntry) -> None:
        if self.admission.on_map(unit, entry) and self.admission.waiting:
            self._wake.set()

    def _on_suspended(self, entry: Entry) -> None:
        self.suspended = not entry.removed

    def _on_control(self, message: Message) -> None:
        self._run_aside(self._answer(message))

    async def _answer(self, message: Message) -> None:
        verb = message.subject.rpartition(".")[2]
        result: dict[str, Any] | Exception
        try:
            if not self._may_lead:
                raise Unavailable(f"coordinator {self.name} is losing the lead: ask again in a moment")
            run: Callable[[dict[str, Any]], Coroutine[Any, Any, dict[str, Any]]] = self._desk.verb(verb)
            result = await run(control.decode(message.payload))
        except FerryError as error:
            if type(error) is InvalidInput:
                self.counters["malformed"] += 1
            log.info("refused", verb=verb, error=str(error))
            result = error
        if not message.reply:
            return
        try:
            await self._link.publish(message.reply, control.encode_result(result))
        except FerryError as error:
            log.warning("answer not sent", verb=verb, error=str(error))


def _move_of(plan_id: str, planned: PlannedMove, now: float) -> Move:
    return Move(
        id=f"m{uuid.uuid4().hex[:12]}", plan_id=plan_id, unit=planned.unit, shard=planned.shard, source=planned.source,
        destination=planned.destination, actors_total=len(planned.actors),
        state_bytes=sum(actor.state_bytes for actor in planned.actors), created_at=now,
    )  # fmt: skip


def _rows_of(planned: PlannedMove) -> list[ActorRow]:
    return [
        ActorRow(index=index, actor_id=actor.actor_id, state_bytes=actor.state_bytes)
        for index, actor in enumerate(planned.actors)
    ]
