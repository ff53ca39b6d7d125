"""`python -m tests.model [NAME ...] [-v] [--jobs N]`: explore the protocol, and kill every mutant of it.

NAME is a part of the name of a scope or a mutant. Exits with 1 when the protocol fails or a mutant survives.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time

from tests.model.explorer import Exploration
from tests.model.runs import MUTATIONS, names, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only what has this in its name")
    parser.add_argument("-v", "--verbose", action="store_true", help="print the trace that kills each mutant")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    asked = parser.parse_args()
    chosen = [name for name in names() if not asked.names or any(part in name for part in asked.names)]
    if not chosen:
        parser.error("no scope and no mutant has that in its name")
    return explore_all(chosen, jobs=asked.jobs, verbose=asked.verbose)


def explore_all(chosen: list[str], *, jobs: int, verbose: bool) -> int:
    """Print a line per exploration, and what they come to. Returns the exit status."""
    began_s, states, steps, failed = time.perf_counter(), 0, 0, 0
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:  # memory is given back each time
        for name, found in zip(chosen, pool.imap(run, chosen), strict=True):
            good = bool(found.violation) == (name in MUTATIONS)
            states, steps, failed = states + found.states, steps + found.steps, failed + (not good)
            print(_line(name, found), flush=True)
            if found.trace and (verbose or not good):
                print(_trace(found), flush=True)
    killed = sum(name in MUTATIONS for name in chosen)
    print(
        f"{states:,} states and {steps:,} steps in {time.perf_counter() - began_s:.0f} s:"
        f" {len(chosen) - killed} scopes, {killed} mutants, {failed} not as they should be"
    )
    return 1 if failed else 0


def _line(name: str, found: Exploration) -> str:
    if name in MUTATIONS:
        result = f"killed in {len(found.trace)}: {found.violation}" if found.violation else "SURVIVES"
    else:
        result = f"VIOLATION: {found.violation}" if found.violation else "holds, nothing stuck"
    return f"{name:68} {found.states:>9,} states {found.steps:>10,} steps {found.elapsed_s:6.1f} s  {result}"


def _trace(found: Exploration) -> str:
    return "\n".join(f"    {number:2} {what}" for number, what in enumerate(found.trace, start=1))


if __name__ == "__main__":
    sys.exit(main())
