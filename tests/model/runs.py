"""One exploration by name, as a process of its own may be asked for it."""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.decisions import replaced
from tests.model.explorer import Exploration, explore
from tests.model.mutants import MUTANTS
from tests.model.variants import COMPLETE, QUICK
from tests.model.world import World

VARIANTS = {**QUICK, **COMPLETE}
MUTATIONS = {f"{mutant.name}: {mutant.what}": mutant for mutant in MUTANTS}


def names() -> Iterator[str]:
    """Every exploration there is: the protocol in its scopes, then the mutants."""
    yield from VARIANTS
    yield from MUTATIONS


def run(name: str) -> Exploration:
    """Explore a scope of the protocol, or a mutant in its own scope."""
    if name in VARIANTS:
        return explore(World(scope=VARIANTS[name]))
    mutant = MUTATIONS[name]
    with replaced(mutant.replaces):
        return explore(World(scope=mutant.scope, without=mutant.without))
