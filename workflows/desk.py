"""What the leading coordinator is asked by people: plan, rebalance, migrate, unpin, cancel, suspend, resume."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from routing import shard_map
from routing.address import ActorId, shard_of
from routing.errors import InvalidInput, NotApplicable, Unavailable, UnknownActorType, WrongSequence
from routing.jsonlike import shown
from routing.link import Link
from routing.subjects import SUSPENDED_KEY, Subjects, actor_key, actor_of_key, kv_subject, shard_key, unit_in_words
from workflows import planner
from workflows.context import StepContext
from workflows.records import TERMINAL, RebalanceRequest, to_document
from workflows.store import RecordStore

if TYPE_CHECKING:
    from workflows.coordinator import Coordinator

APPEND_S = 2.0
MAP_ATTEMPTS = 4

T = TypeVar("T")
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
            "unpin": self.unpin, "cancel": self.cancel, "suspend": self.suspend, "resume": self.resume,
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
            "reasons": dict(Counter(move.reason for move in request.moves)), "waiting": request.waiting,
        }  # fmt: skip

    async def rebalance(self, _: dict[str, Any]) -> dict[str, Any]:
        """Plan and apply now; `{"plan": null}` when there is nothing to move, with how many shards are `waiting`."""
        request = await self._coordinator.make_plan("asked for")
        if not request.moves:
            return {"plan": None, "waiting": request.waiting}
        return {"plan": to_document(await self._coordinator.handle_rebalance_request(request))}

    async def migrate(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Move one shard, or one actor, which pins it. Answers `{"plan"}`: null when the actor was only pinned.

        Raises InvalidInput for an unknown shard, node or actor type, NotApplicable when it cannot go there.
        """
        destination = self._taker(asked.get("destination"))
        if "actor" in asked:
            actor, source = await self._decided(partial(self._pinned, destination), asked["actor"])
            if source == destination:
                return {"plan": None}
            return await self._move(actor_key(actor), self._shard_of(actor), source, destination)
        shard, directory = asked.get("shard"), self._coordinator.directory
        if type(shard) is not int or not 0 <= shard < directory.shards_total:  # a bool is an int as well
            raise InvalidInput(f"shard {shown(shard)} is unknown: this cluster has 0 to {directory.shards_total - 1}")
        entry = await directory.refresh(shard_key(shard))
        if entry is None:
            raise Unavailable(f"shard/{shard} has no owner yet: try again in a moment")
        return await self._move(shard_key(shard), shard, entry.ownership.owner, destination)

    async def _pinned(self, destination: str, actor: ActorId) -> tuple[ActorId, str]:
        """Give an actor that is to go to `destination` a key of its own, unless it has one. Returns it and its owner.

        Raises UnknownActorType when that node could not have it, WrongSequence when the map has changed meanwhile, and
        what writing to it raises.
        """
        self._check_type(actor, destination)
        directory, key = self._coordinator.directory, actor_key(actor)
        own = await directory.refresh(key)  # read before its shard's key, as `take_out` wants it
        shard = directory.get(directory.shard_unit_of(actor))
        if shard is None:
            raise Unavailable(f"the shard of {actor} has no owner yet: try again in a moment")
        apart = shard.ownership.apart_at(str(actor)) is not None
        if apart and (own is None or not directory.counts(key)):
            raise WrongSequence(f"{actor} has just been set apart")
        if apart and own is not None and own.ownership.retired:
            raise Unavailable(f"{actor} is just going back to its shard: try again in a moment")
        owner = own.ownership.owner if apart and own is not None else shard.ownership.owner
        if owner == destination and (own is None or not apart or own.ownership.pinned):
            raise NotApplicable(f"{actor} is at {destination} already: nothing to move")
        if own is None or not apart:
            value = shard_map.take_out(shard.ownership, str(actor), own.ownership if own is not None else None)
            if own is not None:  # it was apart before: make sure that it is not now, whoever answered the reads
                shard = await directory.transition(directory.shard_unit_of(actor), shard, shard.ownership)
            await directory.transition(key, own, value)
            after = shard_map.set_apart(shard.ownership, str(actor), value)
            await directory.transition(directory.shard_unit_of(actor), shard, after)
        elif not own.ownership.pinned:
            await directory.transition(key, own, shard_map.pin(own.ownership, pinned=True))
        return actor, owner

    async def unpin(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Let an actor that was moved by hand go back to its shard. Answers `{"plan"}`: its move, null when none is
        needed, or possible now. Raises NotApplicable when it is not pinned.
        """
        actor, source, home = await self._decided(self._unpinned, asked.get("actor"))
        if source is None or home == source or home not in self._coordinator.takers():
            return {"plan": None}  # the node that has both takes it back, and the next plan brings it there
        return await self._move(actor_key(actor), self._shard_of(actor), source, home, reason="unpinned by hand")

    async def _unpinned(self, actor: ActorId) -> tuple[ActorId, str | None, str]:
        """Write that it is not pinned. Returns it, its owner (None: it is moving), and its shard's owner."""
        directory, key = self._coordinator.directory, actor_key(actor)
        own = await directory.refresh(key)
        shard = directory.get(directory.shard_unit_of(actor))
        if own is None or shard is None or not directory.counts(key) or not own.ownership.pinned:
            raise NotApplicable(f"{actor} is not pinned: nothing to do")
        await directory.transition(key, own, shard_map.pin(own.ownership, pinned=False))
        return actor, own.ownership.owner if own.ownership.move is None else None, shard.ownership.owner

    async def _decided(self, decide: Callable[[ActorId], Coroutine[Any, Any, T]], actor: Any) -> T:
        """Decide about an actor on what the map says now, again when it has changed meanwhile."""
        if not isinstance(actor, str):
            raise InvalidInput(f"actor {shown(actor)} is malformed: write TYPE/KEY, e.g. aircraft/N14228")
        for _ in range(MAP_ATTEMPTS):
            with suppress(WrongSequence):
                return await decide(ActorId.parse(actor))
        raise Unavailable(f"{actor} or its shard changed hands {MAP_ATTEMPTS} times meanwhile: try again")

    def _shard_of(self, actor: ActorId) -> int:
        return shard_of(actor, self._coordinator.directory.shards_total)

    def _taker(self, node: Any) -> str:
        """A node that may receive something now. Raises InvalidInput when it is unknown, NotApplicable."""
        alive = self._coordinator.membership.alive()
        if not isinstance(node, str) or node not in alive:
            raise InvalidInput(f"node {shown(node)} is unknown: nodes are {', '.join(alive) or 'none'}")
        if not alive[node].takes_shards:
            raise NotApplicable(f"node {node} is {alive[node].state}: it takes no shards")
        if node not in self._coordinator.takers():
            raise NotApplicable(f"node {node} lacks actor types of the nodes with shards: see `ferry status`")
        return node

    def _check_type(self, actor: ActorId, node: str) -> None:
        """Asked before it is pinned: its move could only roll back, and it would stay pinned."""
        member = self._coordinator.membership.alive().get(node)
        if member is not None and actor.actor_type not in member.types:
            raise UnknownActorType(
                f"actor type {actor.actor_type!r} is unknown to node {node}: it has {', '.join(member.types) or 'none'}"
            )

    async def _move(
        self, unit: str, shard: int, source: str, destination: str, *, reason: str = "by hand"
    ) -> dict[str, Any]:
        """Plan one move and start it."""
        if source == destination:
            raise NotApplicable(f"{unit_in_words(unit)} is at {destination} already: nothing to move")
        nodes = {node: member for node, member in self._coordinator.membership.alive().items() if node == source}
        inventories = await self._coordinator.inventories(nodes)
        if (actor := actor_of_key(unit)) is not None:  # on record even when it rests in its log
            inventories.setdefault(source, {})
            inventories[source] = {unit: [(str(actor), 0)], **inventories[source]}
        request = RebalanceRequest(
            plan_id=self._coordinator.new_plan_id(), reason=f"{unit_in_words(unit)} {reason}",
            moves=(planner.planned_move(unit, shard, source, destination, inventories, reason=reason),),
        )  # fmt: skip
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
