"""A sample of the simulation: whole schedules of production code under faults, and the mutants it has to notice.

`make simulate` plays thousands. A failure prints its seed; `python -m tests.simulation --seed N --trace` replays it.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.simulation.mutants import MUTANTS, Mutant
from tests.simulation.profile import Profile
from tests.simulation.silence import silence
from tests.simulation.world import Result, play

ROOT = Path(__file__).parents[2]
SEEDS = range(90)
SEEDS_AT_MOST = 600  # for a mutant, when its known seed does not notice it any more because production code changed
CALM = Profile(fault_every_s=float("inf"))


@pytest.fixture(scope="module", autouse=True)
def undisturbed() -> Iterator[None]:
    """Nothing is logged, and the collector does not look at what other tests have left."""
    gc.collect()
    gc.freeze()
    with silence():
        yield
    gc.unfreeze()


def explained(result: Result) -> str:
    replay = f"python -m tests.simulation --seed {result.seed} --trace"
    return "\n".join([f"seed {result.seed}, replay: {replay}", *result.violations[:5]])


@pytest.mark.parametrize("seed", SEEDS)
def test_no_promise_breaks_and_everything_comes_to_rest(seed: int) -> None:
    """Property: whatever the seed does to messages, processes, clocks and tasks, the checker finds nothing."""
    result = play(seed)

    assert result.violations == [], explained(result)


def test_calm_weather_moves_shards_and_answers_every_command() -> None:
    """Without any fault every command has an outcome; the schedules are no empty stage."""
    result = play(1, CALM)

    assert result.violations == [], explained(result)
    assert result.faults.total() == 0
    assert result.moves["committed"] > 0
    assert set(result.commands) <= {"acknowledged", "rejected"}


def test_the_weather_of_a_few_seeds_has_every_kind_of_fault() -> None:
    """Property: a sample reaches all of what the simulation can do, an actor in quarantine included."""
    results = [play(seed) for seed in range(160, 190)]

    assert [explained(result) for result in results if result.violations] == []
    faults = {kind for result in results for kind in result.faults}
    assert faults >= {
        "kill", "stop", "partition", "cut", "clock", "redis", "join", "drain", "lease", "message lost",
        "message answer lost", "message late", "message doubled", "message stale", "message slow", "watch lags",
        "task lost, doubled or late", "save lost or unanswered",
    }  # fmt: skip
    assert sum(result.quarantined for result in results) > 0
    assert sum(result.moves["committed"] for result in results) > 0
    assert sum(result.moves["aborted"] for result in results) > 0


@pytest.mark.parametrize("seed", [3, 11, 29])
def test_the_same_seed_plays_the_same_run(seed: int) -> None:
    """Property: every message, append and fault at the same virtual time again."""
    first, second = play(seed, keep_lines=True), play(seed, keep_lines=True)

    assert first.lines == second.lines
    assert first.digest == second.digest


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_another_process_plays_the_same_run(hash_seed: str) -> None:
    """Property: neither the order of sets nor anything else of a process shows in a run."""
    command = [sys.executable, "-m", "tests.simulation", "--seed", "17"]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}

    played = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True
    )  # fmt: skip

    assert f"trace {play(17).digest}" in played.stdout


@pytest.mark.timeout(400)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_rule_that_is_switched_off_is_noticed(mutant: Mutant) -> None:
    """Property: the simulation would find a regression of any rule of the protocol."""
    for seed in (mutant.seed, *range(SEEDS_AT_MOST)):
        with mutant.applied():
            found = play(seed, mutant.profile).violations
        if mutant.notices(found):
            return
    pytest.fail(
        f"{mutant.name} ({mutant.rule}) survived {SEEDS_AT_MOST} schedules: see python -m tests.simulation --mutants"
    )
