"""`python -m tests.nemesis`: real processes under directed faults; a line for each case, a table at the end.

The exit status is 0 when every promise was kept, 1 otherwise; then the logs stay, and the line above names them.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import click
import structlog
from rich.console import Console
from rich.table import Table

from tests.nemesis.cases import Case, Fault, Party, Point, by_chance, directed
from tests.nemesis.fleet import Fleet
from tests.nemesis.run import Nemesis, Result, Tally
from tests.nemesis.three import run_three
from tests.nemesis.view import View
from workflows.local import EmbeddedServers

E = TypeVar("E", Point, Party, Fault)
F = TypeVar("F", bound=Callable[..., None])

RANDOM_CASES = 24
FORGETFUL = tuple(
    replace(case, name=f"{case.name}, all forgotten", again="--forgetful")
    for case in directed(parties=(Party.REDIS,), faults=(Fault.KILL,))
)

console = Console(highlight=False, width=140)


def _one_of(option: str, kind: type[E], what: str) -> Callable[[F], F]:
    return click.option(
        option, type=click.Choice([each.value for each in kind]), multiple=True, help=f"Only {what}; may be repeated."
    )


@click.command(help=__doc__)
@_one_of("--party", Party, "cases that hit this party")
@_one_of("--point", Point, "cases at this point")
@_one_of("--fault", Fault, "this kind of fault")
@click.option("--random", "count", type=click.IntRange(1), help="Random cases instead of directed ones: how many.")
@click.option("--seed", type=int, help="Of the random cases; one by the clock when left out.")
@click.option("--first", type=click.IntRange(0), default=0, help="The number of the first random case.")
@click.option("--alone", is_flag=True, help="Directed cases in which one actor is moved instead of its shard.")
@click.option("--r3", is_flag=True, help="Three NATS servers, three replicas: one dies during a rebalance.")
@click.option("--forgetful", is_flag=True, help="Redis without a file: killed at each point, it comes back empty.")
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help=f"The directed cases, those --alone that kill, {RANDOM_CASES} random ones, --forgetful, --r3.",
)
@click.option("--keep", is_flag=True, help="Keep the logs though nothing was found.")
def main(
    party: tuple[str, ...], point: tuple[str, ...], fault: tuple[str, ...], count: int | None, seed: int | None,
    first: int, alone: bool, r3: bool, forgetful: bool, everything: bool, keep: bool,
) -> None:  # fmt: skip
    # Our own connections are cut as well; that is no news.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    cases: list[Case] = []
    if everything or not (r3 or forgetful or count):
        chosen = _chosen(Point, point), _chosen(Party, party), _chosen(Fault, fault)
        cases += directed(points=chosen[0], parties=chosen[1], faults=chosen[2], alone=alone)
    if everything:
        cases += directed(faults=(Fault.KILL,), alone=True)
    if everything or count:
        cases += by_chance(seed if seed is not None else int(time.time()), first=first, count=count or RANDOM_CASES)
    folder, tally = Path(tempfile.mkdtemp(prefix="ferry-nemesis-")), Tally()
    console.print(f"{len(cases)} cases; files in {folder}")
    try:
        if cases:
            asyncio.run(_run(cases, EmbeddedServers(folder / "cases"), tally))
        if forgetful or everything:
            asyncio.run(_run(FORGETFUL, EmbeddedServers(folder / "forgetful", aof=False), tally))
        if r3 or everything:
            asyncio.run(run_three(folder / "three", tally, tell=console.print))
    finally:  # however far it has come
        console.print(table(tally))
    if tally.violations:
        console.print(f"[red]{tally.violations} violations[/red]; the logs are under {folder}")
    elif not keep:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if tally.violations else 0)


async def _run(cases: Sequence[Case], servers: EmbeddedServers, tally: Tally) -> None:
    with Fleet(servers) as fleet:
        async with View(fleet.settings) as view:
            nemesis = Nemesis(fleet, view, tally)
            await nemesis.ready()
            for number, case in enumerate(cases, start=1):
                result = await nemesis.run(case, run=f"c{number}")
                tell(result, f"{number}/{len(cases)}")
                if result.found:  # its traces must not be taken for the next case's
                    fleet.mend()
                    await nemesis.ready()


def tell(result: Result, number: str) -> None:
    verdict = "ok" if not result.found else f"[red]{len(result.found)} VIOLATIONS[/red]"
    console.print(
        f"{time.strftime('%H:%M:%S')} {number:>7}  {result.case.name:<44} {result.ended:<12}"
        f" {len(result.operations):>4} operations {result.took_s:5.1f} s  {verdict}"
    )
    for what in result.found:
        console.print(f"          - {what}", markup=False)
    if result.found:
        console.print(f"          again: python -m tests.nemesis {result.case.again}")


def table(tally: Tally) -> Table:
    """The figures of a run."""
    shown = Table(show_header=False, title="nemesis")
    shown.add_row("cases", str(tally.cases))
    for fault in Fault:
        of_kind = {name: times for name, times in tally.faults.items() if name.startswith(f"{fault} ")}
        by_party = ", ".join(f"{name.split()[1]} {times}" for name, times in sorted(of_kind.items()))
        shown.add_row(f"{fault} faults", f"{sum(of_kind.values())} ({by_party})" if of_kind else "0")
    shown.add_row("moves committed, aborted", f"{tally.moves['committed']}, {tally.moves['aborted']}")
    shown.add_row("records lost by Redis", str(tally.lost_records))
    shown.add_row("workers ended by Celery, started again", str(tally.workers_ended))
    outcomes = ("acknowledged", "rejected", "not applied", "unknown")
    shown.add_row(f"commands {', '.join(outcomes)}", ", ".join(str(tally.commands[each]) for each in outcomes))
    shown.add_row("queries", str(tally.queries))
    shown.add_row("violations", str(tally.violations))
    return shown


def _chosen(kind: type[E], names: tuple[str, ...]) -> tuple[E, ...]:
    return tuple(each for each in kind if not names or each.value in names)


if __name__ == "__main__":
    main()
