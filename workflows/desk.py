"""What the leading coordinator is asked by people: plan, rebalance, migrate, cancel, suspend, resume."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from routing.errors import InvalidInput, NotApplicable, Unavailable
from routing.jsonlike import shown
from routing.link import Link
from routing.subjects import SUSPENDED_KEY, Subjects, kv_subject, shard_key
from workflows import planner
from workflows.context import StepContext
from workflows.records import TERMINAL, PlannedActor, PlannedMove, RebalanceRequest, to_document
from workflows.store import RecordStore

if TYPE_CHECKING:
    from workflows.coordinator import Coordinator

APPEND_S = 2.0

Verb = Callable[[dict[str, Any]], Coroutine[Any, Any, dict[str, Any]]]


class Desk:
    """Answers requests with JSON objects. Every method raises errors that name the mend."""

    def __init__(
        self, coordinator: Coordinator, *, link: Link, subjects: Subjects, store: RecordStore, context: StepContext
    ) -> None:
        self._coordinator, self._link, self._store, self._context = coordinator, link, store, context
        self._suspended_subject = kv_subject(subjects.map_bucket, SUSPENDED_KEY)
        self._verbs: dict[str, Verb] = {
            "status": self.status, "plan": self.plan, "rebalance": self.rebalance, "migrate": self.migrate,
            "cancel": self.cancel, "suspend": self.suspend, "resume": self.resume,
        }  # fmt: skip

    def verb(self, name: str) -> Verb:
        """Raises InvalidInput for a verb this version does not know."""
        if name not in self._verbs:
            raise InvalidInput(f"verb {name!r} is unknown to this coordinator: upgrade it")
        return self._verbs[name]

    async def status(self, _: dict[str, Any]) -> dict[str, Any]:
        admission = self._coordinator.admission
        return {
            "leader": self._coordinator.name, "suspended": self._coordinator.suspended,
            "waiting": len(admission.waiting), "running": len(admission.running),
        }  # fmt: skip

    async def plan(self, _: dict[str, Any]) -> dict[str, Any]:
        """A dry run: what a rebalance would move and why; moves nothing."""
        request = await self._coordinator.make_plan("dry run")
        estimate = planner.summary(request)
        return {
            "moves": estimate.moves, "actors": estimate.actors, "state_bytes": estimate.state_bytes,
            "estimate_s": round(estimate.estimate_s, 3), "routes": [asdict(route) for route in estimate.routes],
            "reasons": dict(Counter(move.reason for move in request.moves)),
        }  # fmt: skip

    async def rebalance(self, _: dict[str, Any]) -> dict[str, Any]:
        """Plan and apply now; `{"plan": null}` when the map is balanced."""
        request = await self._coordinator.make_plan("asked for")
        if not request.moves:
            return {"plan": None}
        return {"plan": to_document(await self._coordinator.handle_rebalance_request(request))}

    async def migrate(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Move one shard. Raises InvalidInput for an unknown shard or node, NotApplicable when it cannot go there."""
        shard, destination = asked.get("shard"), asked.get("destination")
        directory, alive = self._coordinator.directory, self._coordinator.membership.alive()
        if type(shard) is not int or not 0 <= shard < directory.shards_total:  # a bool is an int as well
            raise InvalidInput(f"shard {shown(shard)} is unknown: this cluster has 0 to {directory.shards_total - 1}")
        if not isinstance(destination, str) or destination not in alive:
            raise InvalidInput(f"node {shown(destination)} is unknown: nodes are {', '.join(alive) or 'none'}")
        if not alive[destination].takes_shards:
            raise NotApplicable(f"node {destination} is {alive[destination].state}: it takes no shards")
        if destination not in self._coordinator.takers():
            raise NotApplicable(f"node {destination} lacks actor types of the nodes with shards: see `ferry status`")
        entry = await directory.refresh(shard_key(shard))
        if entry is None:
            raise Unavailable(f"shard/{shard} has no owner yet: try again in a moment")
        source = entry.ownership.owner
        if source == destination:
            raise NotApplicable(f"shard/{shard} is at {destination} already: nothing to move")
        inventories = await self._coordinator.inventories({k: m for k, m in alive.items() if k == source})
        live = inventories.get(source, {}).get(shard, ())
        planned = PlannedMove(
            unit=shard_key(shard), shard=shard, source=source, destination=destination, reason="by hand",
            actors=tuple(PlannedActor(actor_id=actor_id, state_bytes=size) for actor_id, size in live),
        )  # fmt: skip
        request = RebalanceRequest(
            plan_id=self._coordinator.new_plan_id(), reason=f"shard/{shard} by hand", moves=(planned,)
        )
        return {"plan": to_document(await self._coordinator.handle_rebalance_request(request))}

    async def cancel(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Stop a plan: what is not launched is cancelled, what has not committed rolls back. Answers `{"stopped"}`."""
        plan_id = asked.get("plan")
        plan = await self._store.plan(plan_id) if isinstance(plan_id, str) else None
        if plan is None:
            raise InvalidInput(f"plan {shown(plan_id)} is unknown: `ferry status` names the latest")
        if plan.finished_at is not None:
            raise NotApplicable(f"plan {plan.id} has ended already: nothing to cancel")
        await self._store.save_plan(replace(plan, cancelled=True))
        stopped = 0
        for move in await self._store.unfinished_moves():
            if move.plan_id == plan.id:
                ended = await self._context.settle(move.id, error="its plan was cancelled")
                self._coordinator.admission.waiting.pop(move.id, None)
                stopped += ended is not None and ended.status in TERMINAL
        return {"stopped": stopped}

    async def suspend(self, _: dict[str, Any]) -> dict[str, Any]:
        """No automatic plans until resumed; failover goes on, and so does what is asked for by hand."""
        await self._link.append(self._suspended_subject, b"true", expected=None, timeout_s=APPEND_S)
        return {"suspended": True}

    async def resume(self, _: dict[str, Any]) -> dict[str, Any]:
        await self._link.append(self._suspended_subject, b"", expected=None, timeout_s=APPEND_S, discard=True)
        self._coordinator.plan_soon("resumed")
        return {"suspended": False}
