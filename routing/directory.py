"""The live shard map: a local copy that follows NATS KV, and one compare-and-set per transition."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from routing import shard_map
from routing.address import ActorId, NodeId, Recalled, shard_of
from routing.documents import decode_ownership, encode_ownership
from routing.errors import InDoubt, InvalidInput, NotApplicable, Unavailable, WrongSequence
from routing.link import Entry, Link, Subscription
from routing.logs import get_logger
from routing.shard_map import Ownership
from routing.subjects import Subjects, actor_key, actor_of_key, kv_stream, kv_subject, shard_key, shard_of_key

log = get_logger("ferry.directory")

CAS_ATTEMPTS = 8  # contenders for one key are few: source, worker, reconciler, coordinator


@dataclass(frozen=True, slots=True)
class MapEntry:
    """A unit's ownership and the revision of its key, which the next transition must name."""

    ownership: Ownership
    revision: int


class Directory:
    """Where every unit of ownership lives: every shard, and every actor that was moved by hand.

    Invariant: an entry is only ever replaced by one of a higher revision, so a view never goes back in time.
    A value that nobody can read, or a removal, replaces none: the unit is `unreadable` until a good value is written.
    An actor's own key counts exactly while its shard's key names it apart and both name the same epoch of TAKE OUT.
    Reads are local and may be stale; `refresh` asks the leader; only `transition` decides.
    """

    def __init__(
        self, link: Link, subjects: Subjects, *, shards_total: int, timeout_s: float = 2.0,
        counters: Counter[str] | None = None,
    ) -> None:  # fmt: skip
        self.shards_total = shards_total
        self.counters: Counter[str] = Counter() if counters is None else counters
        self._link = link
        self._stream = kv_stream(subjects.map_bucket)
        self._bucket = subjects.map_bucket
        self._prefix = len(kv_subject(self._bucket, ""))
        self._timeout_s = timeout_s
        self._entries: dict[str, MapEntry] = {}
        self._unreadable: dict[str, int] = {}  # unit -> the revision at which its key has no value that can be read
        self._actor_keys: dict[str, None] = {}  # those of the entries that are about an actor
        self._apart: dict[ActorId, str] = {}  # actor -> its unit, of those that their shards name apart
        self._taken_out: dict[str, int] = {}  # those units -> the epoch at which they were taken out
        self._observers: list[Callable[[str, MapEntry], None]] = []
        self._watch: Subscription | None = None
        self._awaited: dict[str, asyncio.Event] = {}
        self._units = Recalled(self._work_out_unit)
        self.unit_of: Callable[[ActorId], str] = self._units.__getitem__  # the unit of ownership an actor belongs to

    async def start(self) -> None:
        """Follow the map. Returns once the local copy is complete. Raises Timeout, Unavailable."""
        subject = kv_subject(self._bucket, ">")
        self._watch = await self._link.watch(self._stream, subject, self._on_entry, timeout_s=self._timeout_s)

    async def stop(self) -> None:
        if self._watch is not None:
            await self._watch.stop()

    def on_change(self, observer: Callable[[str, MapEntry], None]) -> None:
        """Call `observer(unit, entry)` after each change of the local copy."""
        self._observers.append(observer)

    # -- reading ---------------------------------------------------------------------------------------------------
    def shard_unit_of(self, actor: ActorId) -> str:
        """The unit that an actor's shard is, whether the actor has a key of its own or not."""
        return shard_key(shard_of(actor, self.shards_total))

    def _work_out_unit(self, actor: ActorId) -> str:
        return self._apart.get(actor) or self.shard_unit_of(actor)

    def counts(self, unit: str) -> bool:
        """Whether what is known of a unit's key says who owns it: a shard's always does, an actor's as said above."""
        if unit not in self._actor_keys:
            return actor_of_key(unit) is None
        return self._entries[unit].ownership.taken_out == self._taken_out.get(unit)

    def get(self, unit: str) -> MapEntry | None:
        return self._entries.get(unit)

    def entries(self) -> dict[str, MapEntry]:
        """Every unit of which is known who owns it."""
        return self.shards() | self.apart()

    def unreadable(self) -> list[str]:
        """Units whose keys exist and have no value that can be read: nobody but a person can write to them.

        Of some the last good value is still known here. An actor's key that no shard names does not matter.
        """
        return [unit for unit in self._unreadable if actor_of_key(unit) is None or unit in self._taken_out]

    def shards(self) -> dict[str, MapEntry]:
        """The units that are shards."""
        if not self._actor_keys:
            return dict(self._entries)
        return {unit: entry for unit, entry in self._entries.items() if unit not in self._actor_keys}

    def actors_apart(self) -> list[ActorId]:
        """The actors whose own keys count, or wait for their shards' owners to take them back."""
        return list(self._apart)

    def apart(self) -> dict[str, MapEntry]:
        """The actors whose own keys count, without those that wait for their shard's owner to take them back."""
        found = ((unit, self._entries[unit]) for unit in self._actor_keys if self.counts(unit))
        return {unit: entry for unit, entry in found if not entry.ownership.retired}

    def get_actor_node(self, actor: ActorId) -> NodeId | None:
        """The node that owns the actor as far as known here; None before the cluster's first assignment."""
        return self.owner_of(self.unit_of(actor))[0]

    def owner_of(self, unit: str) -> tuple[NodeId | None, int]:
        """(owner, epoch) as far as known here. An actor that waits to be taken back by its shard has no owner."""
        entry = self._entries.get(unit)
        if entry is None or (unit in self._actor_keys and not self.counts(unit)):
            return None, 0
        return None if entry.ownership.retired else entry.ownership.owner, entry.ownership.epoch

    async def refresh(self, unit: str) -> MapEntry | None:
        """Read a unit's key from the leader, and after an actor's own key that of its shard.

        Raises Timeout, Unavailable.
        """
        await self._read(unit)
        if (actor := actor_of_key(unit)) is not None:
            await self._read(self.shard_unit_of(actor))
        return self._entries.get(unit)

    async def holds(self, unit: str, rule: Callable[[Ownership], bool]) -> bool:
        """Whether a rule holds of a unit: as known here, or else as it is read, for news may be on its way.

        Raises Timeout, Unavailable.
        """
        entry = self._entries.get(unit)
        if entry is None or not rule(entry.ownership):
            entry = await self.refresh(unit)
        return entry is not None and rule(entry.ownership)

    async def locate(self, actor: ActorId) -> tuple[str, MapEntry | None]:
        """(unit, entry) of an actor, read from the leader. Raises Timeout, Unavailable."""
        await self._read(self.shard_unit_of(actor))
        unit = self.unit_of(actor)
        if unit != self.shard_unit_of(actor):
            await self._read(unit)
        return unit, self._entries.get(unit)

    async def _read(self, unit: str) -> None:
        stored = await self._link.last(self._stream, kv_subject(self._bucket, unit), timeout_s=self._timeout_s)
        if stored is not None:
            self._on_entry(stored)

    async def news(self, unit: str, *, beyond: int, timeout_s: float) -> None:
        """Return once a unit's epoch here is beyond `beyond`: as the watch tells, or read after `timeout_s`.

        Raises NotApplicable for what is no unit; Timeout, Unavailable when it has to be read and cannot be.
        """
        of_actor = actor_of_key(unit) is not None
        if of_actor and unit not in self._entries:
            await self.refresh(unit)  # any name of an actor has the form of a unit, and few of them are one
        if not self._is_unit(unit) or (of_actor and unit not in self._entries):
            raise NotApplicable(f"{unit} is no unit of this cluster")
        try:
            async with asyncio.timeout(timeout_s):
                while (known := self._entries.get(unit)) is None or known.ownership.epoch <= beyond:
                    await self._awaited.setdefault(unit, asyncio.Event()).wait()
        except TimeoutError:
            await self.refresh(unit)

    # -- deciding --------------------------------------------------------------------------------------------------
    async def transition(self, unit: str, before: MapEntry | None, after: Ownership) -> MapEntry:
        """Write `after` if the key still is at `before`'s revision.

        Raises WrongSequence when somebody else wrote first, InDoubt when the write may or may not have landed,
        Unavailable when it did not, InvariantViolated when the step itself is not a legal one.
        """
        shard_map.check(before.ownership if before else None, after)
        expected = before.revision if before else 0
        subject = kv_subject(self._bucket, unit)
        payload = encode_ownership(after)
        revision = await self._link.append(subject, payload, expected=expected, timeout_s=self._timeout_s)
        entry = MapEntry(after, revision)
        self._adopt(unit, entry)
        log.info("map", unit=unit, owner=after.owner, epoch=after.epoch, move=after.move, revision=revision)
        return entry

    async def decide(self, unit: str, change: Callable[[Ownership], Ownership]) -> MapEntry:
        """Read, change and write until the write lands on what was read.

        `change` raises NotApplicable to stop; a write of unknown fate is settled by reading again, so `change` sees
        its own effect. Raises NotApplicable, Unavailable, Timeout, and InDoubt when even that stays unknown.
        """
        known = self._entries.get(unit) if self._watch is not None else None
        if known is not None:  # most often the copy that follows the map is the map: no need to read it first
            with suppress(NotApplicable, WrongSequence, InDoubt):
                return await self.transition(unit, known, change(known.ownership))
        for _ in range(CAS_ATTEMPTS):
            entry = await self.refresh(unit)
            if entry is None:
                raise NotApplicable(f"{unit} has no owner yet: start a coordinator and a node")
            try:
                return await self.transition(unit, entry, change(entry.ownership))
            except (WrongSequence, InDoubt):
                continue
        raise Unavailable(f"{unit} changed hands {CAS_ATTEMPTS} times while being decided: try again")

    # -- following -------------------------------------------------------------------------------------------------
    def _on_entry(self, stored: Entry) -> None:
        unit = stored.subject[self._prefix :]
        if not self._is_unit(unit):
            return
        try:
            if stored.removed:
                raise InvalidInput("its key was deleted")
            ownership = decode_ownership(stored.payload)
            self._check_unit(unit, ownership)
        except InvalidInput as error:
            self.counters["malformed"] += 1
            log.error("map value ignored", unit=unit, error=str(error))
            known = self._entries.get(unit)
            if known is None or known.revision < stored.sequence:
                self._unreadable[unit] = max(stored.sequence, self._unreadable.get(unit, 0))
            return
        self._adopt(unit, MapEntry(ownership, stored.sequence))

    def _adopt(self, unit: str, entry: MapEntry) -> None:
        known = self._entries.get(unit)
        if known is not None and known.revision >= entry.revision:
            return
        self._entries[unit] = entry
        if self._unreadable.get(unit, entry.revision) < entry.revision:
            del self._unreadable[unit]
        if actor_of_key(unit) is not None:
            self._actor_keys[unit] = None
        changed = self._set_apart(known.ownership.apart if known is not None else (), entry.ownership.apart)
        self._notify(unit, entry)
        for own in changed:  # whether these keys count has changed, and so what their values mean
            if (found := self._entries.get(own)) is not None:
                self._notify(own, found)

    def _set_apart(self, before: tuple[tuple[str, int], ...], after: tuple[tuple[str, int], ...]) -> list[str]:
        """Remember which actors' own keys count by a shard's latest value; returns those for which that has changed."""
        if before == after:
            return []
        self._units.clear()
        changed = []
        for text in sorted({actor for actor, _ in {*before} ^ {*after}}):
            actor, epoch = ActorId.parse(text), dict(after).get(text)
            changed.append(own := actor_key(actor))
            if epoch is not None:
                self._apart[actor], self._taken_out[own] = own, epoch
            else:
                del self._apart[actor], self._taken_out[own]
        return changed

    def _notify(self, unit: str, entry: MapEntry) -> None:
        if (awaited := self._awaited.pop(unit, None)) is not None:
            awaited.set()
        for observer in self._observers:
            observer(unit, entry)

    def _check_unit(self, unit: str, ownership: Ownership) -> None:
        """Raises InvalidInput for a value that this unit cannot have."""
        is_shard = shard_of_key(unit) is not None
        if (ownership.retired or ownership.taken_out or ownership.pinned) if is_shard else ownership.apart:
            raise InvalidInput("only a shard has actors apart, and only an actor is taken out of one")
        if any(self.shard_unit_of(ActorId.parse(actor)) != unit for actor, _ in ownership.apart):
            raise InvalidInput("the actors apart are not all of this shard")

    def _is_unit(self, key: str) -> bool:
        shard = shard_of_key(key)
        return shard < self.shards_total if shard is not None else actor_of_key(key) is not None
