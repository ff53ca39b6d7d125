"""The main job, end to end, on another month in the same format: nothing may be tuned to January."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from examples.flight_file import january

ROWS = 4_000
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def another_month(tmp_path: Path) -> Path:
    """Rows of January told as a February: other days, other tail numbers, missing values written as NA."""
    with gzip.open(january(), "rt", newline="") as file:
        rows = list(csv.DictReader(file))[5_000 : 5_000 + ROWS]
    path = tmp_path / "flights-2014-02.csv.gz"
    with gzip.open(path, "wt", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=rows[0].keys())
        writer.writeheader()
        for row in rows:
            tail = f"X{row['tailnum'][1:]}" if row["tailnum"] else "NA"
            writer.writerow(
                {**row, "year": "2014", "month": "2", "tailnum": tail, "arr_delay": row["arr_delay"] or "NA"}
            )
    return path


@pytest.mark.timeout(240)
def test_a_month_of_flights_survives_a_join_a_drain_a_kill_and_a_rollback(another_month: Path, tmp_path: Path) -> None:
    """Every acknowledged flight is applied exactly once, every record is terminal, and no process is left behind."""
    # given a month that Ferry has never seen, and what a group-by says of it
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    # when the demo runs on it
    done = subprocess.run(
        [sys.executable, "-m", "workflows.cli", "demo", "--flights", str(another_month), "--rate", "500", "--json"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=220,
    )  # fmt: skip

    # then it verifies itself, in one JSON document
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["verified"] is True
    assert (report["lost"], report["duplicated"], report["mismatched"], report["unfinished"]) == (0, 0, 0, 0)
    assert report["flights"] == ROWS
    assert report["acknowledged"] + report["rejected"] == ROWS
    assert report["rejected"] == sum(report["rejected_reasons"].values()) > 0

    # and actors really moved, one move really rolled back, and a killed node's actors answered again
    assert report["migrations"] > 0
    assert report["rolled_back"] >= 1
    assert report["blackout_ms"]["p50"] > 0
    assert [event["what"] for event in report["events"] if "answers again" in event["what"]]

    # and nothing of it is left running
    left = [p.info for p in psutil.process_iter(["cmdline", "cwd"]) if p.info["cwd"] == str(tmp_path)]
    assert left == []
