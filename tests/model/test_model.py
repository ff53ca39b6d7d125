"""The protocol in small worlds, explored to their end, and every mutant found. `python -m tests.model` has more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from runtime import rules
from runtime.rules import Admission, Standing, Verdict
from tests.model import key_runs
from tests.model.decisions import replaced
from tests.model.explorer import explore
from tests.model.mutants import MUTANTS
from tests.model.runs import MUTATIONS, VARIANTS, run
from tests.model.scopes import ONE, TWO_SESSIONS, scope
from tests.model.variants import COMPLETE, QUICK
from tests.model.world import Without, World
from workflows import settlement
from workflows.settlement import Settlement


@pytest.mark.parametrize("name", [*QUICK, *key_runs.QUICK])
def test_the_protocol_keeps_its_promises_and_is_never_stuck(name: str) -> None:
    """In every state that faults, delays, duplicates and reordering can lead to, safety holds and a way out exists."""
    found = run(name)

    assert not found.violation, f"{found.violation}: " + "; ".join(found.trace)


@pytest.mark.parametrize("name", MUTATIONS, ids=lambda name: name.partition(":")[0])
def test_a_protocol_without_one_of_its_rules_is_found_to_fail(name: str) -> None:
    """Otherwise the rule would be needless, or the model blind."""
    found = run(name)

    assert found.violation
    assert found.trace


def test_a_gap_answered_from_memory_alone_is_what_leaves_senders_stuck() -> None:
    """T15's mutant has two rules off; with only the other one off, senders are not sent away for ever."""
    (mutant,) = (mutant for mutant in MUTANTS if mutant.name == "T15")

    assert not explore(World(scope=mutant.scope, without=mutant.without - {Without.READING_BEFORE_GAP})).violation


def test_every_verdict_of_every_rule_occurs() -> None:
    """A model in which some verdict is never reached would say nothing about it."""
    seen: set[object] = set()

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            verdict = function(*args, **kwargs)
            seen.add(verdict)
            return verdict

        return noted

    watched = [(rules, name) for name in ("judge", "compare", "admit")] + [(settlement, "settlement")]
    with replaced([(module, name, noting(getattr(module, name))) for module, name in watched]):
        explore(World(scope=scope(ONE, moves=2, stale_reads=1)))
        explore(World(scope=scope(ONE, crashes=1)))
        explore(World(scope=scope(TWO_SESSIONS, sessions=1, failovers=1)))

    never = {*Verdict, *Standing, *Admission, *Settlement} - seen
    assert never == {Standing.SHORTER}, never  # a log that loses its end is the simulation's, not the model's


def test_scopes_and_mutants_have_names_of_their_own() -> None:
    assert len(VARIANTS) == sum(map(len, (QUICK, COMPLETE, key_runs.QUICK, key_runs.COMPLETE)))
    assert len({name.partition(":")[0] for name in MUTATIONS}) == len(MUTATIONS) == len(MUTANTS) + len(key_runs.MUTANTS)
    assert {f"T{number}" for number in range(1, 16)} | {"S1", "S2", "S3"} <= {mutant.name for mutant in MUTANTS}
