"""Play schedules and mutants: `python -m tests.simulation --seeds 2000 --mutants`.

    --seed N            one schedule; with --trace every message, append and fault of it
    --seeds N           so many schedules, from --first on, on all cores (or --jobs)
    --mutants           each rule of the protocol switched off must be noticed within 2,000 schedules

Exit status 1 when a promise was broken or a mutant survived.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

from tests.simulation.mutants import MUTANTS
from tests.simulation.runner import MUTANT_SEEDS, Kill, Summary, hunt_all, play_all
from tests.simulation.silence import silence
from tests.simulation.world import play

SHOWN = 5  # failures in full
WIDTH = 160  # of a table, at least: a log file has no terminal's width


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description="Simulate Ferry under faults.")
    parser.add_argument("--seeds", type=int, default=0, help="how many schedules to play")
    parser.add_argument("--first", type=int, default=0, help="seed of the first one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--mutants", action="store_true", help="switch off each rule; every mutant must be noticed")
    parser.add_argument("--mutant-seeds", type=int, default=MUTANT_SEEDS, help="schedules for each mutant at most")
    parser.add_argument("--seed", type=int, help="play this one schedule")
    parser.add_argument("--mutant", choices=[mutant.name for mutant in MUTANTS], help="with --seed: of this mutant")
    parser.add_argument("--trace", action="store_true", help="with --seed: print everything that happened")
    asked = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, WIDTH)
    if asked.seed is not None:
        return _play_one(console, asked.seed, asked.mutant, trace=asked.trace)
    failed = False
    if asked.seeds or not asked.mutants:
        failed |= _play_many(console, asked.first, asked.seeds or 100, asked.jobs)
    if asked.mutants:
        failed |= _hunt(console, asked.jobs, asked.mutant_seeds)
    return int(failed)


def _play_one(console: Console, seed: int, name: str | None, *, trace: bool) -> int:
    mutant = next((mutant for mutant in MUTANTS if mutant.name == name), None)
    with silence():
        if mutant is None:
            result = play(seed, keep_lines=trace)
        else:
            with mutant.applied():
                result = play(seed, mutant.profile, keep_lines=trace)
    for line in result.lines:
        console.print(line, markup=False)
    console.print(f"seed {seed}: {result.virtual_s:.1f} s of virtual time, {result.callbacks} callbacks")
    console.print(f"trace {result.digest}")
    for violation in result.violations:
        console.print(violation, style="red", markup=False)
    return int(bool(result.violations))


def _play_many(console: Console, first: int, count: int, jobs: int) -> bool:
    total, began_s = Summary(), time.monotonic()
    for summary in play_all(first, count, jobs=jobs):
        for failure in summary.failures[: max(0, SHOWN - len(total.failures))]:
            _show_failure(console, *failure)
        total.merge(summary)
    console.print(_table(total, time.monotonic() - began_s, jobs))
    return bool(total.failures)


def _show_failure(console: Console, seed: int, violations: list[str]) -> None:
    console.print(f"seed {seed} at commit {_commit()}:", style="bold red")
    for violation in violations[:SHOWN]:
        console.print(f"  {violation}", markup=False)
    console.print(f"  replay: {sys.executable} -m tests.simulation --seed {seed} --trace")


def _table(total: Summary, elapsed_s: float, jobs: int) -> Table:
    table = Table(title=f"Simulation at commit {_commit()}", show_header=False)
    table.add_row("schedules", f"{total.schedules:,} in {elapsed_s:.0f} s on {jobs} processes")
    table.add_row("schedules per minute and core", f"{total.per_minute_and_core:,.0f} (of processor time)")
    table.add_row("virtual time", f"{total.virtual_s / 3600:.1f} h, {total.callbacks:,} callbacks")
    table.add_row("faults", f"{sum(total.faults.values()):,}")
    for kind, count in sorted(total.faults.items()):
        table.add_row(f"  {kind}", f"{count:,}")
    for outcome, count in sorted(total.moves.items()):
        table.add_row(f"moves {outcome}", f"{count:,}")
    for outcome, count in sorted(total.commands.items()):
        table.add_row(f"commands {outcome}", f"{count:,}")
    table.add_row("actors quarantined (logs that lost their end)", f"{total.quarantined:,}")
    failed = f"[red]{len(total.failures)}[/red]: seeds " + ", ".join(str(seed) for seed, _ in total.failures[:20])
    table.add_row("schedules with violations", failed if total.failures else "0")
    return table


def _hunt(console: Console, jobs: int, seeds: int) -> bool:
    table, survived = Table(title="Mutants: each rule switched off"), False
    for heading in ("", "rule", "noticed at seed", "as"):
        table.add_column(heading)
    for kill in hunt_all(jobs=jobs, seeds=seeds):
        survived |= kill.seed is None or kill.cover_survived is False
        table.add_row(kill.name, kill.rule, _fate(kill), kill.violation[:90])
    console.print(table)
    return survived


def _fate(kill: Kill) -> str:
    if kill.seed is None:
        return "[red]survived[/red]"
    if kill.cover_survived is None:
        return str(kill.seed)
    verdict = "survives" if kill.cover_survived else "[red]dies[/red]"
    return f"{kill.seed}, with its cover ({kill.covered_by}), which alone {verdict}"


def _commit() -> str:
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=5, check=True
        )
        return described.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
