"""All that can happen next in a state of the model."""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.moving import moving
from tests.model.ownership import ownership
from tests.model.serving import serving
from tests.model.state import State
from tests.model.world import Step, World, tidy


def steps(world: World, state: State) -> Iterator[Step]:
    """What may happen next, in an order that depends on the state alone."""
    for family in (serving, ownership, moving):
        for what, lucky, after in family(world, state):
            yield what, lucky, tidy(world, after)
