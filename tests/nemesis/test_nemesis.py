"""One fault case of each party, on real processes under load. `make nemesis` runs all of them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.nemesis.cases import Case, Fault, Marker, Party, Point, Strike, by_chance, directed
from tests.nemesis.fleet import Fleet
from tests.nemesis.run import Nemesis, Tally
from tests.nemesis.view import View
from workflows.local import EmbeddedServers

# Each party once, at the moment that asks the most of it; all three kinds of fault.
CASES = [
    (Party.SOURCE, Point.AFTER_COMMIT, Fault.KILL),
    (Party.DESTINATION, Point.AWAIT_ACK, Fault.RESTART),
    (Party.WORKER, Point.CAPTURE, Fault.KILL),
    (Party.COORDINATOR, Point.SEND, Fault.STOP),
    (Party.REDIS, Point.SERIALIZE, Fault.KILL),
    (Party.NATS, Point.BEFORE_COMMIT, Fault.STOP),
]


ALONE = [(Party.SOURCE, Point.BEFORE_COMMIT, Fault.KILL), (Party.DESTINATION, Point.AFTER_COMMIT, Fault.KILL)]


def _case(party: Party, point: Point, fault: Fault, *, alone: bool = False) -> Case:
    [case] = directed(points=(point,), parties=(party,), faults=(fault,), alone=alone)
    return case


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nemesis(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Nemesis]:
    """One fleet for all cases: starting it takes longer than a case."""
    with Fleet(EmbeddedServers(tmp_path_factory.mktemp("nemesis"))) as fleet:
        async with View(fleet.settings) as view:
            ready = Nemesis(fleet, view, Tally())
            await ready.ready()
            yield ready


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "case", [*(_case(*chosen) for chosen in CASES), *(_case(*chosen, alone=True) for chosen in ALONE)],
    ids=lambda case: case.name.replace(", ", "-").replace(" ", "-"),
)  # fmt: skip
async def test_every_promise_is_kept_when_a_party_fails_in_the_middle_of_a_move(nemesis: Nemesis, case: Case) -> None:
    """Nothing acknowledged is lost, nothing is applied twice, everything comes to rest, and every record says how."""
    # when a move is under way, and the fault strikes exactly at its point
    result = await nemesis.run(case, run=f"t{nemesis.tally.cases}")

    # then it has ended one way or the other, senders were served, and the checker finds nothing
    assert result.found == [], f"again: python -m tests.nemesis {case.again}"
    assert result.ended in ("completed", "rolled_back")
    assert len(result.operations) > 20


def test_directed_cases_are_all_combinations_once() -> None:
    """Seven points, six parties, three faults."""
    cases = list(directed())

    assert len(cases) == len({case.name for case in cases}) == 144
    assert all(len(case.strikes) == 1 for case in cases)


def test_a_random_case_is_the_same_whenever_its_number_is_run() -> None:
    """What a failure prints repeats it, however many cases the failing run had."""
    several = list(by_chance(7, first=0, count=20))

    [again] = by_chance(7, first=13, count=1)

    assert again == several[13]
    assert len({case.name for case in several}) == 20


def test_random_cases_strike_two_parties_at_times_and_never_one_twice() -> None:
    """Two faults on one process would undo each other."""
    struck = [[strike.party for strike in case.strikes] for case in by_chance(1, first=0, count=50)]

    assert {len(parties) for parties in struck} == {1, 2}
    assert all(len(set(parties)) == len(parties) for parties in struck)


def test_a_case_can_be_read() -> None:
    """Its line in a log says what was done to whom, and when."""
    case = _case(Party.NATS, Point.BEFORE_COMMIT, Fault.STOP)

    assert case == Case(
        name="stop nats at before_commit", marker=Marker(Party.SOURCE, "commit"),
        strikes=(Strike(Party.NATS, Fault.STOP, 2.5),), again="--party nats --point before_commit --fault stop",
    )  # fmt: skip
