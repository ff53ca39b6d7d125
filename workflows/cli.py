"""`ferry`: the command line. Each command parses, calls, prints; what it calls lives in the modules it imports.

Imports are inside the commands, so that `ferry --help` is quick, a node never loads Celery, and everything else never
loads the actor host. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 timed out while waiting (it goes on).
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from routing.address import ActorId
from routing.errors import FerryError, InvalidInput, PermanentError, Unavailable
from routing.settings import Settings
from routing.subjects import unit_in_words
from workflows import presentation as show
from workflows.command_line import (
    FAILED,
    POSITIVE,
    FerryGroup,
    json_option,
    load_settings,
    parse_arguments,
    run,
    wait_options,
)
from workflows.records import MigrationStatus, Move, to_document

if TYPE_CHECKING:
    from routing.link import Link
    from runtime.actor import ActorClasses
    from runtime.node import Node
    from workflows.coordinator import Coordinator
    from workflows.session import Session

SHARD_PREFIX = "shard/"
LAUNCH_S = 2.0  # Celery itself would try for half a minute, in which the coordinator would lose its lease


@click.group(cls=FerryGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show a traceback with an error.")
@click.version_option(package_name="actor-ferry", prog_name="ferry", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Move live, stateful actors between the nodes of a cluster while they are being used."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


# -- processes ---------------------------------------------------------------------------------------------------------
@cli.command()
@click.option("--nodes", type=click.IntRange(1, 100), default=3, show_default=True, help="How many nodes.")
def up(nodes: int) -> None:
    """Run a local cluster until Ctrl-C."""
    from workflows.local import run_up

    settings = load_settings()
    raise click.exceptions.Exit(run_up(nodes, settings.data_dir))


@cli.command()
@click.option(
    "--flights", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE.csv.gz",
    help="Flights to replay, instead of those that left New York in January 2013.",
)  # fmt: skip
@click.option("--rate", type=POSITIVE, metavar="N", help="Flights per second.")
@json_option
def demo(flights: Path | None, rate: float | None, as_json: bool) -> None:
    """Replay a month of flights on a changing cluster, and verify it."""
    from workflows import demo as the_demo

    load_settings(log_level="error")
    raise click.exceptions.Exit(the_demo.run(flights, rate, as_json))


@cli.command()
@click.option("--id", "node_id", metavar="ID", help="Name of the node, unique in the cluster (or FERRY_NODE_ID).")
@click.option("--actors", multiple=True, metavar="MODULE", help="Module with actor classes; several, or with commas.")
@click.option("--weight", type=POSITIVE, default=1.0, show_default=True, help="Its share of the shards.")
@click.option("--role", default="", metavar="R", help="A label shown in `ferry status --json`.")
def node(node_id: str | None, actors: tuple[str, ...], weight: float, role: str) -> None:
    """Run one node; SIGTERM drains it, then it exits."""
    from workflows.foreground import run_until_stopped

    modules = tuple(name.strip() for given in actors for name in given.split(",") if name.strip())
    settings = load_settings(log_level="info", node_id=node_id, actors=modules or None)
    if not settings.node_id:
        raise InvalidInput("a node needs a name: give --id ID, or set FERRY_NODE_ID")
    if not settings.actors:
        raise InvalidInput("a node needs actor classes: give --actors MODULE, or set FERRY_ACTORS")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the modules of whoever starts it
    run_until_stopped(lambda stopping: _run_node(settings, weight, role, stopping))


async def _run_node(settings: Settings, weight: float, role: str, stopping: asyncio.Event) -> None:
    from runtime.node import Node
    from workflows.foreground import connect_patiently

    classes = _actor_classes(settings.actors)
    name = f"ferry-node-{settings.node_id}"
    link = await connect_patiently(settings.nats_url, name=name, stopping=stopping)
    # State on its way has a connection of its own: a large one would hold up commands and the lease on this one.
    transfer = await connect_patiently(settings.nats_url, name=f"{name}-transfer", stopping=stopping)
    if link is None or transfer is None:
        return
    process = Node(settings, link=link, transfer_link=transfer, classes=classes, weight=weight, role=role)
    await _serve(process, link, settings, stopping)


def _actor_classes(modules: tuple[str, ...]) -> ActorClasses:
    """Raises InvalidInput whatever a module raises while it is imported."""
    from runtime.actor import ActorClasses
    from workflows.local.actor_modules import fault_of

    try:
        return ActorClasses.load(modules)
    except FerryError:
        raise
    except Exception as error:
        raise InvalidInput(f"--actors {','.join(modules)}: {fault_of(error)}") from error


@cli.command()
@click.option("--name", metavar="N", help="Name to show as leader; host and process id by default.")
def coordinator(name: str | None) -> None:
    """Run a coordinator: one leads, further ones stand by."""
    from workflows.foreground import run_until_stopped

    settings = load_settings(log_level="info")
    name = name or f"{socket.gethostname()}-{os.getpid()}"
    run_until_stopped(lambda stopping: _run_coordinator(settings, name, stopping))


async def _run_coordinator(settings: Settings, name: str, stopping: asyncio.Event) -> None:
    from kombu.exceptions import OperationalError

    from workflows import migration
    from workflows.coordinator import Coordinator
    from workflows.foreground import connect_patiently
    from workflows.store import RecordStore

    async def launch(*moves: Move) -> None:
        try:
            async with asyncio.timeout(LAUNCH_S):
                await asyncio.to_thread(migration.launch, *moves)
        except (OperationalError, TimeoutError) as error:
            named = ", ".join(move.id for move in moves)
            raise Unavailable(f"Redis does not take the tasks of move {named}: it is sent again later") from error

    link = await connect_patiently(settings.nats_url, name=f"ferry-coordinator-{name}", stopping=stopping)
    if link is None:
        return
    store = RecordStore.connect(settings.redis_url, settings.cluster)
    process = Coordinator(settings, name=name, link=link, store=store, launch=launch)
    await _serve(process, link, settings, stopping)


async def _serve(process: Node | Coordinator, link: Link, settings: Settings, stopping: asyncio.Event) -> None:
    from routing.identity import Identity

    async def start_and_serve() -> None:
        await process.start()
        await process.serve(stopping)

    identity = await Identity.join(link, settings)
    await identity.while_same(start_and_serve())


# -- looking -----------------------------------------------------------------------------------------------------------
@cli.command()
@json_option
def status(as_json: bool) -> None:
    """Show nodes, leader, shards, moves, and problems in words."""
    from workflows.status import gather_status, to_json

    found = run(gather_status(load_settings(log_level="error")))
    document = to_json(found)
    if as_json:
        show.print_json(document)
    else:
        show.print_status(document)
    if found.nats_error is not None:
        raise click.exceptions.Exit(FAILED)


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check that everything is in place, and say how to mend it."""
    from workflows.doctor import Verdict, examine

    findings = run(examine(load_settings(log_level="error")))
    if as_json:
        show.print_json([finding.to_json() for finding in findings])
    else:
        rows = [[f.check, f.verdict, f.found, f.mend] for f in findings]
        show.print_table(["check", "verdict", "found", "mend"], rows)
    if any(finding.verdict is Verdict.FAIL for finding in findings):
        raise click.exceptions.Exit(FAILED)


@cli.command()
@click.argument("actor", metavar="TYPE/KEY")
@json_option
def where(actor: str, as_json: bool) -> None:
    """Show which node has an actor."""
    from workflows import lookup

    found = run(lookup.where(load_settings(), ActorId.parse(actor)))
    if as_json:
        show.print_json(found)
        return
    pinned = ", pinned" if found["pinned"] else ""
    line = f"{found['actor']} is at {found['node']} (shard {found['shard']}, epoch {found['epoch']}{pinned})"
    if found["move"]:
        line += f", on its way to {found['destination']} by move {found['move']}"
    elif found["incarnation"] is None:
        line += ", which is about to take it over"
    click.echo(line)


@cli.command()
@click.argument("actor", metavar="TYPE/KEY")
@click.argument("command")
@click.argument("arguments", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--message-id", metavar="ID", help="Sent again under the same id, it is applied once.")
@click.option("--timeout", "timeout_s", type=POSITIVE, default=10.0, show_default=True, metavar="SECONDS")
@json_option
def send(
    actor: str, command: str, arguments: tuple[str, ...], message_id: str | None, timeout_s: float, as_json: bool
) -> None:
    """Send COMMAND to an actor, and print its reply as JSON."""
    from routing.client import Cluster

    target, values, settings = ActorId.parse(actor), parse_arguments(arguments), load_settings()

    async def ask() -> Any:
        async with Cluster.connect(settings.nats_url, cluster=settings.cluster) as cluster:
            return await cluster.send_message(target, command, values, message_id=message_id, timeout=timeout_s)

    show.print_json(run(ask()), indent=not as_json)


@cli.command()
@click.option(
    "--status", "status_", type=click.Choice([s.value for s in MigrationStatus]), help="Only those in this status."
)
@click.option("--plan", metavar="PLAN", help="Only those of this plan.")
@click.option("--actor", metavar="ACTOR", help="Only those of this actor, written TYPE/KEY.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="At most so many.")
@json_option
def migrations(status_: str | None, plan: str | None, actor: str | None, limit: int, as_json: bool) -> None:
    """List records of migrations, those of the newest moves."""
    from workflows import lookup

    rows = run(
        lookup.migrations(
            load_settings(log_level="error"), status=status_, plan=plan,
            actor=ActorId.parse(actor) if actor is not None else None, limit=limit,
        )
    )  # fmt: skip
    if as_json:
        show.print_json(rows)
    else:
        show.print_migrations(rows)


@cli.command()
@click.argument("id_", metavar="ID")
@json_option
def migration(id_: str, as_json: bool) -> None:
    """Show one migration, or a move, with the time of each step."""
    from workflows import lookup

    record = run(lookup.record(load_settings(), id_))
    if as_json:
        show.print_json(record)
        return
    show.print_record(record)
    if "migrations" in record:
        click.echo()
        show.print_migrations(record["migrations"])


# -- moving ------------------------------------------------------------------------------------------------------------
@cli.command()
@json_option
def plan(as_json: bool) -> None:
    """Show what a rebalance would move and why; moves nothing."""
    answer = run(_ask_leader(load_settings(), "plan"))
    if as_json:
        show.print_json(answer)
    else:
        show.print_plan(answer)


@cli.command()
@wait_options()
@json_option
def rebalance(wait: bool, timeout_s: float, as_json: bool) -> None:
    """Plan and move what brings the map into balance."""
    run(_rebalance(load_settings(), wait, timeout_s, as_json))


async def _rebalance(settings: Settings, wait: bool, timeout_s: float, as_json: bool) -> None:
    from workflows.session import open_session

    async with open_session(settings) as session:
        answer = await session.ask_leader("rebalance")
        if answer["plan"] is None:
            if as_json:
                show.print_json(answer)
            else:
                show.print_nothing_to_move(answer)
            return
        await _follow_plan(session, answer["plan"], wait, timeout_s, as_json)


async def _follow_plan(session: Session, started: dict[str, Any], wait: bool, timeout_s: float, as_json: bool) -> None:
    """Say that a plan runs, or wait for its end. Raises PermanentError when moves did not go through."""
    from workflows.progress import finished_plan, moves_not_completed

    moves = show.counted(started["total"], "move")
    if not wait:
        if as_json:
            show.print_json({"plan": started})
        else:
            click.echo(f"plan {started['id']} started: {moves}; `ferry status` shows how far it is")
        return
    with show.progress(f"plan {started['id']}", quiet=as_json) as bar:
        ended = await finished_plan(session, started["id"], timeout_s=timeout_s, show=bar)
    left = await moves_not_completed(session, ended)
    if as_json:
        show.print_json({"plan": to_document(ended), "not_completed": [to_document(move) for move in left]})
    if left:
        first = left[0]
        raise PermanentError(
            f"{len(left)} of {moves} not completed: {unit_in_words(first.unit)} from {first.source} to"
            f" {first.destination} was {first.status.replace('_', ' ')} ({first.error or 'no reason recorded'})"
        )
    if not as_json:
        click.echo(f"plan {ended.id} done: {moves} completed")


@cli.command()
@click.argument("node_id", metavar="NODE")
@wait_options()
@json_option
def drain(node_id: str, wait: bool, timeout_s: float, as_json: bool) -> None:
    """Empty NODE: its shards move to the other nodes."""
    run(_drain(load_settings(), node_id, wait, timeout_s, as_json))


async def _drain(settings: Settings, node_id: str, wait: bool, timeout_s: float, as_json: bool) -> None:
    from workflows.progress import emptied
    from workflows.session import open_session
    from workflows.words import counted_units

    async with open_session(settings) as session:
        await session.follow()
        session.node(node_id)
        units = counted_units(session.owned_by(node_id))
        answer = await session.ask_node(node_id, "drain")
        if wait:
            with show.progress(f"draining {node_id}", quiet=as_json) as bar:
                await emptied(session, node_id, timeout_s=timeout_s, show=bar)
        left = 0 if wait else answer["shards"]
        suspended = bool(left) and await session.suspended()
    if as_json:
        show.print_json({"node": node_id, "state": "drained" if left == 0 else answer["state"], "shards": left})
    elif left == 0:
        click.echo(f"node {node_id} is empty: {units} moved away, safe to stop")
    else:
        click.echo(f"node {node_id} drains: {units} to go; `ferry status` shows how far it is")
        if suspended:
            click.echo("rebalancing is suspended: nothing moves until `ferry resume`")


@cli.command()
@click.argument("target", metavar="shard/N|ACTOR")
@click.option("--to", "destination", required=True, metavar="NODE", help="Where it is to go.")
@wait_options()
@json_option
def migrate(target: str, destination: str, wait: bool, timeout_s: float, as_json: bool) -> None:
    """Move one shard, or one actor, to another node by hand. An actor stays there until it is unpinned."""
    run(_migrate(load_settings(), target, destination, wait, timeout_s, as_json))


async def _migrate(
    settings: Settings, target: str, destination: str, wait: bool, timeout_s: float, as_json: bool
) -> None:
    from workflows.session import open_session

    asked: dict[str, Any] = {"destination": destination}
    if target.startswith(SHARD_PREFIX):
        number = target.removeprefix(SHARD_PREFIX)
        if not (number.isascii() and number.isdigit()):
            raise InvalidInput(f"{target!r} is malformed: write shard/N, e.g. shard/17")
        asked["shard"] = int(number)
    else:
        asked["actor"] = str(ActorId.parse(target))
    async with open_session(settings) as session:
        answer = await session.ask_leader("migrate", asked)
        told = f"{target} is at {destination} already, and pinned there now"
        await _follow_if_planned(session, answer, told, wait, timeout_s, as_json)


@cli.command()
@click.argument("actor", metavar="TYPE/KEY")
@wait_options()
@json_option
def unpin(actor: str, wait: bool, timeout_s: float, as_json: bool) -> None:
    """Let an actor that was moved by hand go back to its shard, and with it from then on."""
    run(_unpin(load_settings(), ActorId.parse(actor), wait, timeout_s, as_json))


async def _unpin(settings: Settings, actor: ActorId, wait: bool, timeout_s: float, as_json: bool) -> None:
    from workflows.session import open_session

    async with open_session(settings) as session:
        answer = await session.ask_leader("unpin", {"actor": str(actor)})
        told = f"{actor} is unpinned: it goes where its shard is"
        await _follow_if_planned(session, answer, told, wait, timeout_s, as_json)


async def _follow_if_planned(
    session: Session, answer: dict[str, Any], otherwise: str, wait: bool, timeout_s: float, as_json: bool
) -> None:
    if answer["plan"] is not None:
        await _follow_plan(session, answer["plan"], wait, timeout_s, as_json)
    elif as_json:
        show.print_json(answer)
    else:
        click.echo(otherwise)


@cli.command()
@click.argument("plan_id", metavar="PLAN")
@json_option
def cancel(plan_id: str, as_json: bool) -> None:
    """Stop PLAN: moves that have not committed roll back."""
    answer = run(_ask_leader(load_settings(), "cancel", {"plan": plan_id}))
    if as_json:
        show.print_json(answer)
    else:
        click.echo(f"plan {plan_id} cancelled: {show.counted(answer['stopped'], 'move')} stopped")


@cli.command()
def suspend() -> None:
    """Switch automatic rebalancing off, that of draining nodes too."""
    run(_ask_leader(load_settings(), "suspend"))
    click.echo("automatic rebalancing is off; `ferry resume` switches it on")


@cli.command()
def resume() -> None:
    """Switch automatic rebalancing on again."""
    run(_ask_leader(load_settings(), "resume"))
    click.echo("automatic rebalancing is on")


async def _ask_leader(settings: Settings, verb: str, message: dict[str, Any] | None = None) -> dict[str, Any]:
    from workflows.session import open_session

    async with open_session(settings) as session:
        return await session.ask_leader(verb, message)


main = cli

if __name__ == "__main__":
    main()
