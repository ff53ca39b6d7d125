"""Faults, drawn from the seed: what happens to messages, to processes, to clocks, and when."""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random
from typing import TYPE_CHECKING

from routing.shard_map import Ownership
from routing.subjects import kv_subject, node_key
from runtime.testing import Fault, Kind
from tests.simulation.chronicle import unit_in
from tests.simulation.machines import Machine

if TYPE_CHECKING:
    from tests.simulation.world import World

DEPOSED = 0.9  # of the reads after an ambush
ASTRAY_S = (2.2, 4.5)  # a little more than the pause lease, and the time in which everybody gives up


class Weather:
    """`rough` until healed; counts what it did in `faults`."""

    def __init__(self, world: World, chance: Random) -> None:
        self._world, self._chance = world, chance
        self.rough = False
        self.faults: Counter[str] = Counter()
        self.commands_doubled_s: list[float] = []  # when
        self._deposed = False  # most reads of the map are answered by a leader that is none any more
        self._committing = self._unaware = ""  # the source of a COMMIT that goes astray
        self._unreachable_until_s = float("-inf")
        self._stalled_until_s = 0.0
        self._rates = self._cumulated()

    # -- messages ----------------------------------------------------------------------------------------------------
    def _cumulated(self) -> list[tuple[float, Fault]]:
        profile = self._world.profile
        rates: list[tuple[float, Fault]] = [
            (profile.lost, "drop_request"), (profile.lost_answer, "drop_reply"), (profile.late, "late"),
            (profile.doubled, "double"), (profile.stale, "stale"),
        ]  # fmt: skip
        total, cumulated = 0.0, []
        for rate, fault in rates:
            total += rate
            if rate:
                cumulated.append((total, fault))
        return cumulated

    def fate(self, kind: Kind, subject: str) -> Fault:
        """What becomes of one message; asked for each, so that the trace of a run has all of them."""
        fate = self._fate(kind, subject)
        self._world.note(f"{kind} {subject} {fate}")
        return fate

    def _fate(self, kind: Kind, subject: str) -> Fault:
        if self.rough and (directed := self._directed(kind, subject)) is not None:
            return directed
        if not self.rough or not self._rates or self._world.profile.struck not in subject:
            return "deliver"
        drawn = self._chance.random()
        if drawn >= self._rates[-1][0]:
            return "deliver"
        fault = next(fault for limit, fault in self._rates if drawn < limit)
        if fault == "stale" and not (kind == "read" and (unit_in(subject) or "-log-" in subject)):
            return "deliver"
        if fault == "double" and kind in ("append", "read"):
            return "deliver"
        if fault == "drop_reply" and kind == "publish":
            fault = "drop_request"
        if fault in ("late", "double"):
            self._world.nats.late_s = self._chance.uniform(0.05, self._world.profile.late_s)
        if fault == "stale":
            self._world.nats.stale_by = self._chance.randint(self._world.profile.stale_by_at_least, 6)
        if fault == "double" and ".cmd." in subject:
            self.commands_doubled_s.append(self._world.now_s())
        self.faults[f"message {_WORDS[fault]}"] += 1
        return fault

    # -- faults at the worst moment ----------------------------------------------------------------------------------
    def ambush(self, before: Ownership) -> None:
        """COMMIT has landed: nobody who knows of it is left to write that down, and the map's leader is deposed."""
        if not self.rough or self._chance.random() >= self._world.profile.ambush:
            return
        self.faults["ambush"] += 1
        self._deposed = True
        self._world.note(f"ambush at the commit of {before.move}")
        for machine in self._world.machines:
            if machine.name == before.owner:
                machine.kill()
            elif machine.kind == "worker":
                machine.kill()
                self._world.loop.call_later(0.3, machine.start, context=self._world.nats.context)
            elif machine.kind == "coordinator":
                machine.stop()

    def _directed(self, kind: Kind, subject: str) -> Fault | None:
        """What befalls the map around a COMMIT, where the profile says so."""
        if unit_in(subject):
            if self._deposed and kind == "read" and self._chance.random() < DEPOSED:
                self._world.nats.stale_by = self._chance.randint(self._world.profile.stale_by_at_least, 6)
                self.faults["message stale"] += 1
                return "stale"
            return self._astray(kind)
        if kind == "request" and subject.endswith(".commit") and self._world.loop.time() > self._unreachable_until_s:
            self._committing = subject.split(".")[3] if self._chance.random() < self._world.profile.astray else ""
        return None

    def _astray(self, kind: Kind) -> Fault | None:
        """A COMMIT that lands long after its source has sent it, while nobody can read or write the map."""
        now_s = self._world.loop.time()
        if now_s < self._unreachable_until_s:
            return "drop_request"
        if kind != "append" or not self._committing:
            return None
        self.faults["commit astray"] += 1
        self._unaware, self._committing = self._committing, ""
        self._unreachable_until_s = now_s + ASTRAY_S[1]
        self._world.nats.late_s = self._chance.uniform(*ASTRAY_S)
        return "late"

    def latency_s(self) -> float:
        chance, profile = self._chance, self._world.profile
        latency_s = 0.0003 + 0.002 * chance.random()
        if self.rough:
            if profile.slow and chance.random() < profile.slow:
                latency_s = profile.slow_s * chance.random()
                self.faults["message slow"] += 1
            now_s = self._world.loop.time()
            if now_s < self._stalled_until_s:
                latency_s += self._stalled_until_s - now_s
        return latency_s

    def watch_lag_s(self, link: str) -> float:
        profile = self._world.profile
        if self.rough and link == self._unaware and self._world.loop.time() < self._unreachable_until_s:
            return ASTRAY_S[1]
        if profile.laggards and self._world.kind_of(link) not in profile.laggards:
            return 0.0
        if self.rough and profile.lagging and self._chance.random() < profile.lagging:
            self.faults["watch lags"] += 1
            return profile.lag_s * self._chance.random()
        return 0.0

    # -- processes ---------------------------------------------------------------------------------------------------
    async def blow(self) -> None:
        """Begin one fault after another, each ending by itself unless everything is healed before."""
        profile = self._world.profile
        kinds, weights = list(profile.faults), list(profile.faults.values())
        while profile.fault_every_s < float("inf"):
            await asyncio.sleep(self._chance.expovariate(1 / profile.fault_every_s))
            kind = self._chance.choices(kinds, weights)[0]
            self._world.begin(self._befall(kind))

    async def _befall(self, kind: str) -> None:
        chance, world = self._chance, self._world
        match kind:
            case "stall":
                self._stalled_until_s = world.loop.time() + chance.choice((0.3, 1.0, 2.5))
            case "redis":
                world.shelf.away = True
                await asyncio.sleep(chance.choice((0.2, 1.0, 3.0)))
                world.shelf.away = False
            case "lease":
                nodes = [node for node in world.nodes if node.up]
                if not nodes:
                    return
                name = chance.choice(nodes).name
                world.note(f"the lease of {name} is lost")
                world.nats.expire(kv_subject(world.settings.subjects.lease_bucket, node_key(name)))
            case "join":
                if not world.join():
                    return
            case "drain":
                if not world.drain():
                    return
            case _:
                victim = self._victim()
                if victim is None:
                    return
                world.note(f"{kind} {victim.name}")
                await self._harm(kind, victim)
        self.faults[kind] += 1

    def _victim(self) -> Machine | None:
        victims = self._world.profile.victims
        kind = self._chance.choices(list(victims), list(victims.values()))[0]
        machines = [one for one in self._world.machines if one.kind == kind and one.up]
        return self._chance.choice(machines) if machines else None

    async def _harm(self, kind: str, victim: Machine) -> None:
        chance = self._chance
        match kind:
            case "kill":
                if victim.kind == "sender":
                    return await self._harm("stop", victim)
                victim.kill()
                await asyncio.sleep(chance.choice((0.05, 0.5, 3.5, 30.0)))
                victim.start()
            case "stop":
                victim.stop()
                await asyncio.sleep(chance.choice((0.1, 0.5, 1.0, 3.5, 6.0)))
                victim.resume()
            case "partition" | "cut":
                links = [chance.choice(victim.links)] if chance.random() < 0.3 and victim.links else victim.links
                for link in links:
                    if kind == "partition":
                        link.partition()
                    else:
                        link.disconnect()
                await asyncio.sleep(chance.choice((0.05, 0.5, 1.5, 4.0)))
                for link in links:
                    link.reconnect()
            case "clock":
                if chance.random() < 0.5:
                    victim.clock.ahead_s += chance.choice((0.5, 3.0, 3600.0))
                else:
                    victim.clock.wall_ahead_s = chance.choice((-3600.0, -5.0, 5.0, 3600.0))

    def doubled_a_command(self, since_s: float) -> bool:
        """Whether the network has delivered some command twice since then.

        The second copy may be applied after the first was refused, and no sender can know. NATS itself never does that.
        """
        return any(at_s >= since_s for at_s in self.commands_doubled_s)

    def heal(self) -> None:
        self.rough = False
        self._stalled_until_s = 0.0


_WORDS = {"drop_request": "lost", "drop_reply": "answer lost", "late": "late", "double": "doubled", "stale": "stale"}
