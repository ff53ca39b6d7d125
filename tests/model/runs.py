"""One exploration by name, as a process of its own may be asked for it."""

from __future__ import annotations

from collections.abc import Iterator

from tests.model import key_runs
from tests.model.decisions import replaced
from tests.model.explorer import Exploration, explore
from tests.model.key_runs import KeyMutant
from tests.model.keys import TwoKeys
from tests.model.mutants import MUTANTS, Mutant
from tests.model.variants import COMPLETE, QUICK
from tests.model.world import World

VARIANTS: dict[str, World | TwoKeys] = {
    **{name: World(scope=scope) for name, scope in {**QUICK, **COMPLETE}.items()},
    **key_runs.QUICK,
    **key_runs.COMPLETE,
}
MUTATIONS: dict[str, Mutant | KeyMutant] = {
    f"{mutant.name}: {mutant.what}": mutant for mutant in (*MUTANTS, *key_runs.MUTANTS)
}


def names() -> Iterator[str]:
    """Every exploration there is: the protocol in its scopes, then the mutants."""
    yield from VARIANTS
    yield from MUTATIONS


def run(name: str) -> Exploration:
    """Explore a scope of the protocol, or a mutant in its own scope."""
    if name in VARIANTS:
        return explore(VARIANTS[name])
    mutant = MUTATIONS[name]
    with replaced(mutant.replaces):
        if isinstance(mutant, KeyMutant):
            return explore(mutant.world)
        return explore(World(scope=mutant.scope, without=mutant.without))
