"""Single records that are asked for at the same time: one round trip, and each as it is now."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from tests.unit.virtual_time import virtually
from workflows.store_reads import Reads

TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Note:
    id: str
    text: str


@dataclass
class Shelf:
    """Notes by id, and what was asked for in each round trip; one takes a second."""

    notes: dict[str, str] = field(default_factory=dict)
    trips: list[list[str]] = field(default_factory=list)
    away: Exception | None = None

    async def read(self, ids: Sequence[str]) -> list[Note]:
        self.trips.append(list(ids))
        found = [Note(name, self.notes[name]) for name in ids if name in self.notes]
        await asyncio.sleep(1)
        if self.away is not None:
            raise self.away
        return found


@virtually
async def test_what_is_asked_for_at_the_same_time_is_one_round_trip() -> None:
    """Each asker gets its own; who asks for the same asks once."""
    shelf = Shelf({"a": "one", "b": "two"})
    reads = Reads(shelf.read, timeout_s=TIMEOUT_S)

    found = await asyncio.gather(*(reads.one(name) for name in ("a", "b", "a", "nobody")))

    assert found == [Note("a", "one"), Note("b", "two"), Note("a", "one"), None]
    assert shelf.trips == [["a", "b", "nobody"]]


@virtually
async def test_a_record_is_never_older_than_the_question() -> None:
    """Who asks while a round trip is under way does not get what that one brings."""
    shelf = Shelf({"a": "old"})
    reads = Reads(shelf.read, timeout_s=TIMEOUT_S)
    early = asyncio.create_task(reads.one("a"))
    await asyncio.sleep(0.5)
    shelf.notes["a"] = "new"

    late = await reads.one("a")

    assert (await early, late) == (Note("a", "old"), Note("a", "new"))
    assert shelf.trips == [["a"], ["a"]]


@virtually
async def test_an_asker_that_goes_takes_nothing_from_the_others() -> None:
    """A caller's deadline is its own."""
    shelf = Shelf({"a": "one"})
    reads = Reads(shelf.read, timeout_s=TIMEOUT_S)
    impatient, patient = (asyncio.create_task(reads.one("a")) for _ in range(2))
    await asyncio.sleep(0.5)

    impatient.cancel()

    assert await patient == Note("a", "one")
    assert impatient.cancelled()


@virtually
async def test_whatever_keeps_the_records_away_is_told_to_everybody_who_asked() -> None:
    """And to nobody who asks afterwards."""
    shelf = Shelf({"a": "one"}, away=ConnectionError("gone"))
    reads = Reads(shelf.read, timeout_s=TIMEOUT_S)

    outcomes = await asyncio.gather(reads.one("a"), reads.one("b"), return_exceptions=True)

    assert [str(outcome) for outcome in outcomes] == ["gone", "gone"]
    shelf.away = None
    assert await reads.one("a") == Note("a", "one")


@virtually
async def test_a_round_trip_that_nobody_waits_for_any_more_ends_at_its_deadline() -> None:
    """Or a Redis that is silent would keep a connection, and one more for each who asks."""
    ended = asyncio.Event()

    async def silent(_: Sequence[str]) -> list[Note]:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return []

    reads = Reads(silent, timeout_s=TIMEOUT_S)
    asking = asyncio.create_task(reads.one("a"))
    await asyncio.sleep(0)
    asking.cancel()

    async with asyncio.timeout(TIMEOUT_S + 1):
        await ended.wait()
    with pytest.raises(asyncio.CancelledError):
        await asking


@virtually
async def test_a_reading_that_was_cancelled_before_it_began_is_in_nobodys_way() -> None:
    """Whoever ends everything that runs on a loop may go on with the store."""
    shelf = Shelf({"a": "one"})
    reads = Reads(shelf.read, timeout_s=TIMEOUT_S)
    asking = asyncio.create_task(reads.one("a"))
    await asyncio.sleep(0)
    assert reads._reading is not None
    reads._reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking

    assert await reads.one("a") == Note("a", "one")
