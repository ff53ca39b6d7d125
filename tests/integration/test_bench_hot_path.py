"""The benchmarks of the hot path run, and say what they promise: sizes are tiny, and no time is asserted."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from bench import activate, append, ask
from bench.results import Result, document, table


def check_shape(name: str, results: Sequence[Result]) -> None:
    found = document(name, results)
    assert set(found) == {"name", "machine", "results"}
    for row in found["results"]:
        assert set(row) == {"case", "value", "unit", "floor", "ratio", "runs", "p50", "p99"}
        assert row["value"] > 0
    assert all(result.case in table(found) for result in results)


def test_ask_measures_remote_and_local_beside_their_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case of Ferry's own has a floor, taken in the same run."""
    monkeypatch.setattr(ask, "PEERS", ())

    results = asyncio.run(ask.measure(runs=1, seconds=0.1, latencies=10))

    check_shape("ask", results)
    assert len(results) == 3
    assert all(result.floor for result in results)


def test_append_measures_both_ways_of_syncing() -> None:
    """Commands from another process, beside bare publishes."""
    results = asyncio.run(append.measure(runs=1, seconds=0.1))

    check_shape("append", results)
    assert len(results) == 2
    assert all(result.floor for result in results)


def test_activate_brings_every_actor_back_in_a_short_and_a_longer_log() -> None:
    """The longer log's floor is the shorter one's rate."""
    results = asyncio.run(activate.measure(runs=1, actors=20, rounds=2, messages=(500, 2_000)))

    check_shape("activate", results)
    assert [result.floor is None for result in results] == [True, False]
