"""The benchmarks of moves run at tiny sizes: their shape is right and nothing fails on the way. Never a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench import placement, plots, report
from bench.results import Result, document
from bench.sender import Sent

FEW_SHARDS, SHORT_LEASE = {"FERRY_SHARDS": "16"}, {"FERRY_NODE_LEASE_S": "2"}


def measured(name: str, **options: Any) -> dict[str, dict[str, Any]]:
    """case -> row of one benchmark, in a process of its own as `python -m bench all` runs it.

    A benchmark points its process at its own servers: the environment, and Celery's connections.
    """
    program = (
        "import asyncio, json, sys; from importlib import import_module; from bench.results import document;"
        "name, options = sys.argv[1], json.loads(sys.argv[2]);"
        "found = asyncio.run(import_module(f'bench.{name}').measure(**options));"
        "print(json.dumps(document(name, found)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, name, json.dumps(options)], stdout=subprocess.PIPE, check=True, timeout=100
    )
    return {row["case"]: row for row in json.loads(done.stdout.splitlines()[-1])["results"]}


def test_a_join_under_load_moves_a_share_and_fails_no_command() -> None:
    """`rebalance` at 60 actors: every row has its floor, and a third of the actors moved."""
    results = measured("rebalance", actors=60, runs=1, rate=50.0, idle_moves=1, chains=4, env=FEW_SHARDS)

    moved = results["60 actors, moved"]
    assert moved["value"] > 0
    assert moved["floor"] > 0
    assert results["60 actors, blackout p99"]["floor"] > 0
    assert results["60 actors, blackout p99, all joins together"]["runs"] >= 5  # shards: a third of 16
    assert results["60 actors, slowest command"]["runs"] > 0
    memory = {f"60 actors, memory of {process}, join 1" for process in ("coordinator-1", "worker-1")}
    assert memory < results.keys()


def test_a_killed_node_costs_map_writes_and_no_append() -> None:
    """`failover` with three nodes: unused actors append nothing, each shard is given and taken once at most."""
    results = measured("failover", nodes="abc", actors=20, env=FEW_SHARDS | SHORT_LEASE)

    assert results["20 actors unused: appends"]["value"] == 0
    writes = results["20 actors unused: map writes"]
    assert writes["floor"] <= writes["value"] <= 2 * writes["floor"]
    assert results["kill -9 to first answer"]["runs"] == 1


def test_ids_that_were_asked_for_leave_no_map_entry() -> None:
    """`memory`: as many entries as shards, before and after."""
    results = measured("memory", actors=50, ids=200)

    entries = results["map entries after that"]
    assert entries["value"] == entries["floor"] == results["router's map entries after that"]["value"]


async def test_placement_is_measured_beside_the_optimum() -> None:
    """`placement` at 8 nodes and 64 shards: as few moves as counting allows."""
    results = await placement.measure(8, 64, 1)

    moved = [row for row in results if row.case.endswith(": moved")]
    assert len(moved) == 4
    assert all(row.value == row.floor for row in moved)


def test_a_curve_is_measured_and_drawn(tmp_path: Path) -> None:
    """One point a curve is enough to draw it, and what is drawn is well-formed SVG with the value in it."""
    rows = measured("curves", per_shard=[1, 2], state_bytes=[1024], actors=[], moves=1)

    drawn = plots.draw([{"name": "curves", "results": list(rows.values())}], tmp_path)

    assert [path.name for path in drawn] == ["blackout-over-actors-per-shard.svg", "blackout-over-bytes-of-state.svg"]
    for path in drawn:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


def figures() -> list[dict[str, Any]]:
    results = [
        Result(case="pre-copied, blackout", value=2, unit="ms", floor=1, runs=5),
        Result(case="bare", value=1234.5, unit="x"),
    ]
    return [json.loads(json.dumps(document("large", results)))]


def test_the_report_replaces_what_is_between_the_markers_and_nothing_else(tmp_path: Path) -> None:
    """README.md lists the headlines, docs/performance.md everything; prose around the tables stays."""
    (tmp_path / "docs").mkdir()
    for path in ("README.md", "docs/performance.md"):
        (tmp_path / path).write_text(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")

    report.write(figures(), tmp_path)

    readme, performance = ((tmp_path / path).read_text() for path in ("README.md", "docs/performance.md"))
    assert readme.startswith("before\n")
    assert readme.endswith("\nafter\n")
    assert "stale" not in readme
    assert "| `large` | pre-copied, blackout | 2 ms | 1 | 2 |" in readme
    assert "bare" not in readme
    assert "| `large` | bare | 1,234 x |" in performance


def test_a_document_without_markers_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("prose")

    with pytest.raises(ValueError, match="lacks the markers"):
        report.write(figures(), tmp_path)

    assert (tmp_path / "README.md").read_text() == "prose"


@pytest.mark.parametrize(("value", "ceiling"), [(0.3, 0.5), (1, 1), (11, 20), (2, 2), (700, 1000), (0, 1)])
def test_an_axis_ends_at_a_round_number(value: float, ceiling: float) -> None:
    """It is never below the highest point."""
    assert plots.nice_ceiling(value) == pytest.approx(ceiling)


def test_a_command_counts_where_it_was_under_way() -> None:
    """One that began before the moves and ended among them waited because of them, too."""
    sent = Sent(began_at=[0.0, 5.0, 20.0], took_ms=[6_000.0, 10.0, 10.0])

    assert sent.during(5.5, 10.0) == [6_000.0]
    assert sent.during(4.0, 30.0) == [6_000.0, 10.0, 10.0]
