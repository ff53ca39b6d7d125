"""`python -m bench NAME [--json]`; `all` runs every benchmark and writes bench/results.json."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click

from bench.results import document, table

NAMES = (
    "chain", "blackout", "rebalance", "large", "ask", "append", "activate", "failover", "placement", "memory",
)  # fmt: skip


@click.command()
@click.argument("name", type=click.Choice([*NAMES, "all"]))
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def main(name: str, as_json: bool) -> None:
    """Measure NAME beside its floor, taken in the same run."""
    documents = []
    for each in NAMES if name == "all" else (name,):
        if name == "all":  # a process each: Celery keeps connections to the servers of the one before
            done = subprocess.run([sys.executable, "-m", "bench", each, "--json"], stdout=subprocess.PIPE, check=True)
            documents.append(json.loads(done.stdout))
        else:
            documents.append(document(each, asyncio.run(import_module(f"bench.{each}").measure())))
        if not as_json:
            click.echo(table(documents[-1]))
    if as_json:
        click.echo(json.dumps(documents if name == "all" else documents[0]))
    if name == "all":
        Path("bench/results.json").write_text(json.dumps(documents, indent=1) + "\n")


if __name__ == "__main__":
    main()
