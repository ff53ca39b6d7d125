"""When a cluster is at rest, and what a log that lost its end must lead to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from routing.errors import FerryError, Quarantined
from routing.shard_map import Ownership
from routing.subjects import actor_of_key
from runtime.unit import UnitState
from tests.simulation.machines import NodeMachine

if TYPE_CHECKING:
    from tests.simulation.world import World


def under_way(world: World) -> list[str]:
    """What is not over yet, in words; empty when nothing is."""
    left = [f"{sender.name} still sends" for sender in world.senders if not sender.over]
    left += [f"move {move.id} of {move.unit} is {move.status}" for move in world.shelf.unfinished_now()]
    left += [f"plan {plan.id} is not finished" for plan in world.shelf.running_now()]
    left += [f"{world.asking} operators wait"] if world.asking else []
    if not world.broker.idle:
        left.append(
            f"tasks: {len(world.broker.queue)} waiting, {len(world.broker.unacknowledged)} taken,"
            f" {world.broker.under_way} on their way"
        )
    nodes = {node.name: node for node in world.nodes}
    left += [f"{machine.name} does not run" for machine in world.machines if machine.wanted and not machine.up]
    for unit, view in sorted(world.chronicle.map.items()):
        if world.counts(unit):
            left += _of_unit(unit, view, nodes.get(view.owner))
    for machine in world.nodes:
        left += _of_node(world, machine)
    leaders = [one.name for one in world.coordinators if one.up and one.coordinator and one.coordinator.leading]
    if len(leaders) != 1:
        left.append(f"leaders: {', '.join(leaders) or 'none'}")
    return left


def _of_unit(unit: str, view: Ownership, owner: NodeMachine | None) -> list[str]:
    if actor_of_key(unit) is not None and not view.pinned:
        return [f"{unit} is not back in its shard"]
    if view.move is not None:
        return [f"{unit} is locked for {view.move}"]
    if owner is None or not owner.up or owner.node is None:
        return [f"{unit} belongs to {view.owner}, which does not run"]
    if not owner.wanted:
        return [f"{unit} belongs to {view.owner}, which drains"]
    if view.incarnation != owner.node.incarnation:
        return [f"{unit} belongs to {view.incarnation} of {view.owner}"]
    held = owner.node.host.units.get(unit)
    if held is None or held.state is not UnitState.OPEN or held.epoch != view.epoch:
        return [f"{unit} is {held.state if held else 'not held'} at {view.owner}"]
    return []


def _of_node(world: World, machine: NodeMachine) -> list[str]:
    if not machine.up:
        return []
    node = machine.node
    if node is None:
        return [f"{machine.name} is just starting"]
    left = []
    for unit in node.host.units.values():
        if world.chronicle.map[unit.name].owner != machine.name or not world.counts(unit.name):
            left.append(f"{machine.name} still holds {unit.name}")
        if len(unit.buffer) or unit.pause is not None or unit.running:
            left.append(f"{unit.name} at {machine.name} has {len(unit.buffer)} waiting and {unit.running} running")
    if len(node._arrivals):
        left.append(f"{machine.name} has {len(node._arrivals)} moves staged")
    if node._handover._outgoing:
        left.append(f"{machine.name} has {len(node._handover._outgoing)} moves prepared")
    return left


async def lose_the_end_of_a_log(world: World) -> None:
    """JetStream loses the end of a stream: every actor that noticed says so, and none goes on from less than it had."""
    router = world.senders[0].router
    assert router is not None
    for actor in world.actors:  # so that none of them is put to rest in the middle of this
        await router.send_message(actor, "read", message_id=f"before-{actor.key}", timeout_s=5.0)
    stream = world.settings.subjects.log_streams()[world.chance.randrange(world.settings.logs)][0]
    entries = world.nats.entries(stream)
    lost = world.nats.truncate(stream, entries[-1].sequence - world.chance.randint(1, 4)) if entries else []
    remembered = [subject for subject in dict.fromkeys(entry.subject for entry in lost) if _remembers(world, subject)]
    world.note(f"{stream} lost {len(lost)} entries; {len(remembered)} of its actors are live")
    for subject in remembered:
        actor = next(one for one in world.actors if subject.endswith(f".{one.token}"))
        before = _alarms(world)
        for name, arguments in (("write", {"entry": f"after.{actor.key}"}), ("read", {})):
            try:
                await router.send_message(
                    actor, name, arguments, message_id=f"truncated-{name}-{actor.key}", timeout_s=5.0,
                    linearizable=name == "read",
                )  # fmt: skip
                world.problem(f"{name} of {actor} was served although its log lost its end")
            except Quarantined:
                world.quarantined.add(str(actor))
            except FerryError as error:
                world.problem(f"{name} of {actor}, whose log lost its end, ended with {error!r}")
        if _alarms(world) <= before:
            world.problem(f"{actor}: no alarm was counted")
    for entry in lost:
        log = world.chronicle.logs[entry.subject.rpartition(".")[2].replace("=", "/")]
        log.lost(entry.sequence)
        # Actors that nobody remembers go on from what is left: nobody can know. Their losses are the disk's.
        world.quarantined.add(entry.subject.rpartition(".")[2].replace("=", "/"))


def _remembers(world: World, subject: str) -> bool:
    for machine in world.nodes:
        if machine.up and machine.node is not None:
            for unit in machine.node.host.units.values():
                for actor, live in unit.actors.items():
                    if subject.endswith(f".{actor.token}") and live.instance is not None and not live.dirty:
                        return True
    return False


def _alarms(world: World) -> int:
    return sum(machine.node.host.counters["quarantined"] for machine in world.nodes if machine.node is not None)
