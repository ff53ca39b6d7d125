"""`python -m bench NAME [--json]` measures one thing; `all` measures everything, writes bench/results.json and draws.

`report` writes the tables of README.md and docs/performance.md from that file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import uvloop

from bench import plots, report
from bench.results import document, table
from routing.logs import configure_logging

NAMES = (
    "chain", "blackout", "rebalance", "large", "ask", "append", "activate", "failover", "placement", "memory",
)  # fmt: skip
LARGER = (("rebalance", "--actors", "100000"),)
RESULTS = Path("bench/results.json")


@click.command()
@click.argument("name", type=click.Choice([*NAMES, "curves", "all", "report"]))
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("--actors", type=click.IntRange(1), help="How many, where a benchmark lets you choose.")
def main(name: str, as_json: bool, actors: int | None) -> None:
    """Measure NAME beside its floor, taken in the same run."""
    configure_logging("warning")
    if name == "report":
        report.write(json.loads(RESULTS.read_text()))
    elif name == "all":
        _measure_all(as_json)
    else:
        os.sync()  # what was written before, an installation say, must not hold up what is to reach the disk now
        found = document(name, uvloop.run(_measure(name, actors)))
        click.echo(json.dumps(found) if as_json else table(found))


async def _measure(name: str, actors: int | None) -> Any:
    measure = import_module(f"bench.{name}").measure  # imported here: each needs what the others do not
    if actors is None:
        return await measure()
    if name not in ("rebalance", "failover", "memory"):
        raise click.UsageError(f"{name} has no number of actors to choose")
    return await measure(actors=actors)


def _measure_all(as_json: bool) -> None:
    """A process each: Celery keeps connections to the servers of the one before. What fails is left out, loudly."""
    documents, failed = [], []
    for asked in (*((name,) for name in NAMES), *LARGER, ("curves",)):
        done = subprocess.run([sys.executable, "-m", "bench", *asked, "--json"], stdout=subprocess.PIPE, check=False)
        if done.returncode:
            failed.append(" ".join(asked))
            continue
        documents.append(json.loads(done.stdout))
        if not as_json:
            click.echo(table(documents[-1]))
    if as_json:
        click.echo(json.dumps(documents))
    RESULTS.write_text(json.dumps(documents, indent=1) + "\n")
    plots.draw(documents, RESULTS.parent)
    if failed:
        raise click.ClickException(f"these failed, see above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
