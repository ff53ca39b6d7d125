"""The benchmark of large actors runs, at a tiny size: every case is there beside its floor, and no move failed."""

from __future__ import annotations

import pytest

from bench import large
from bench.results import document


@pytest.fixture(autouse=True)
def _environment_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark sets FERRY_* for its own process; the next test gets back what was there."""
    import os

    monkeypatch.setattr(os, "environ", os.environ.copy())


async def test_each_case_of_a_large_actor_is_measured_beside_its_floor() -> None:
    """Two moves a case of a state of 300 kB: large enough to be copied ahead. No time is judged."""
    found = document("large", await large.measure(300_000, runs=1, asking_s=0.05))

    assert [row["case"] for row in found["results"]] == [
        "pre-copied, blackout", "pre-copied, in use, blackout", "ask at the destination meanwhile",
        "ask at the source meanwhile", "cold, rate of the send step", "cold, blackout",
    ]  # fmt: skip
    for row in found["results"]:
        assert {"value", "unit", "floor", "ratio", "runs", "p50", "p99"} <= row.keys()
        assert row["value"] > 0
        assert row["floor"] > 0
