"""Many schedules on all cores, and the mutants: what `python -m tests.simulation` runs."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

from tests.simulation.mutants import MUTANTS, Mutant
from tests.simulation.silence import silence
from tests.simulation.world import Result, play

SEEDS_AT_ONCE = 25
MUTANT_SEEDS = 2_000  # within which every mutant has to die


@dataclass(slots=True)
class Summary:
    """Many results added up."""

    schedules: int = 0
    cpu_s: float = 0.0
    virtual_s: float = 0.0
    callbacks: int = 0
    quarantined: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    moves: Counter[str] = field(default_factory=Counter)
    commands: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, list[str]]] = field(default_factory=list)

    def add(self, result: Result) -> None:
        self.schedules += 1
        self.virtual_s += result.virtual_s
        self.callbacks += result.callbacks
        self.quarantined += result.quarantined
        self.faults += result.faults
        self.moves += result.moves
        self.commands += result.commands
        if result.violations:
            self.failures.append((result.seed, result.violations))

    def merge(self, other: Summary) -> None:
        self.schedules += other.schedules
        self.cpu_s += other.cpu_s
        self.virtual_s += other.virtual_s
        self.callbacks += other.callbacks
        self.quarantined += other.quarantined
        self.faults += other.faults
        self.moves += other.moves
        self.commands += other.commands
        self.failures += other.failures

    @property
    def per_minute_and_core(self) -> float:
        return self.schedules * 60 / self.cpu_s if self.cpu_s else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """How a mutant fared. `seed` is None when it survived; `cover_survived` is None when it has no cover."""

    name: str
    rule: str
    seed: int | None
    violation: str = ""
    covered_by: str = ""
    cover_survived: bool | None = None


def play_seeds(seeds: Iterable[int]) -> Summary:
    """Play schedules one after the other in this process."""
    summary, began_s = Summary(), time.process_time()
    with silence():
        for seed in seeds:
            summary.add(play(seed))
    summary.cpu_s = time.process_time() - began_s
    return summary


def hunt(mutant: Mutant, seeds: Iterable[int]) -> Kill:
    """Play a mutant until a schedule notices; then its cover alone, if it has one, on the same schedules."""
    played: list[int] = []
    with silence():
        for seed in seeds:
            played.append(seed)
            with mutant.applied():
                found = mutant.notices(play(seed, mutant.profile).violations)
            if found:
                survived = _cover_survives(mutant, played) if mutant.cover is not None else None
                return Kill(
                    name=mutant.name, rule=mutant.rule, seed=seed, violation=found, covered_by=mutant.covered_by,
                    cover_survived=survived,
                )  # fmt: skip
    return Kill(name=mutant.name, rule=mutant.rule, seed=None, covered_by=mutant.covered_by)


def _cover_survives(mutant: Mutant, seeds: Iterable[int]) -> bool:
    for seed in seeds:
        with mutant.cover_applied():
            if mutant.notices(play(seed, mutant.profile).violations):
                return False
    return True


# -- on all cores ------------------------------------------------------------------------------------------------------
def play_all(first: int, count: int, *, jobs: int) -> Iterator[Summary]:
    """Summaries of a few schedules each, in the order of the seeds."""
    batches = [
        range(start, min(start + SEEDS_AT_ONCE, first + count)) for start in range(first, first + count, SEEDS_AT_ONCE)
    ]
    with _pool(jobs) as pool:
        yield from pool.map(play_seeds, batches)


def hunt_all(*, jobs: int, seeds: int = MUTANT_SEEDS) -> Iterator[Kill]:
    with _pool(jobs) as pool:
        yield from pool.map(_hunt_by_name, [(mutant.name, seeds) for mutant in MUTANTS])


def _hunt_by_name(asked: tuple[str, int]) -> Kill:
    name, seeds = asked
    return hunt(next(mutant for mutant in MUTANTS if mutant.name == name), range(seeds))


def _pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_prepare)


def _prepare() -> None:
    """What is loaded by now stays: the collector need not look at it after every schedule."""
    gc.collect()
    gc.freeze()
