"""The live map: never backwards, one compare-and-set per transition, and no garbage believed."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.address import ActorId
from routing.birth import found_or_join
from routing.directory import CAS_ATTEMPTS, Directory, MapEntry
from routing.documents import decode_ownership, encode_ownership
from routing.errors import InDoubt, InvalidInput, InvariantViolated, NotApplicable, TransientError, WrongSequence
from routing.settings import Settings
from routing.shard_map import LastMove, Outcome, Ownership, abort, assign, bind, failover, lock
from routing.subjects import kv_subject
from runtime.testing import Fault, Kind, MemoryLink, MemoryNats
from tests.unit.virtual_time import clock, until, virtually

SETTINGS = Settings(shards=2)
SUBJECTS = SETTINGS.subjects
UNIT = "shard.0"
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=10)
OWNERSHIPS = st.builds(
    Ownership,
    owner=st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True),
    incarnation=st.none() | st.from_regex(r"[0-9a-f]{8}", fullmatch=True),
    epoch=st.integers(100, 2**53),
    last=st.none() | st.builds(LastMove, move=NAMES, outcome=st.sampled_from(list(Outcome)), epoch=st.integers(1, 100)),
    fence=st.integers(0, 100),
)


class Map:
    """One server and any number of views of its map; `fault` befalls the next append to a shard's key."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.nats = MemoryNats(on_message=self._on_message, late_s=4.0)  # later than the append timeout
        self.links: list[MemoryLink] = []

    def _on_message(self, kind: Kind, subject: str) -> Fault:
        return self.faults.pop(0) if kind == "append" and "shard" in subject and self.faults else "deliver"

    async def view(self) -> Directory:
        link = self.nats.link(f"view-{len(self.links)}")
        self.links.append(link)
        await found_or_join(link, SETTINGS)
        directory = Directory(link, SUBJECTS, shards_total=SETTINGS.shards)
        await directory.start()
        return directory

    async def write(self, payload: bytes, key: str = UNIT) -> None:
        """Whatever a person with `nats kv put` could do."""
        await self.links[0].append(kv_subject(SUBJECTS.map_bucket, key), payload, expected=None, timeout_s=1)


async def bound(directory: Directory, node: str = "a") -> MapEntry:
    first = await directory.transition(UNIT, None, assign(node))
    return await directory.transition(UNIT, first, bind(first.ownership, node=node, incarnation=f"{node}-1"))


@virtually
async def test_a_transition_is_seen_by_every_view() -> None:
    """The local copies follow without being asked."""
    the_map = Map()
    one, other = await the_map.view(), await the_map.view()

    written = await bound(one)

    await until(lambda: other.get(UNIT) == written)
    assert other.entries() == {UNIT: written}


@virtually
async def test_the_writer_sees_its_own_transition_at_once() -> None:
    """What `transition` returned is not older in the writer's own view."""
    directory = await Map().view()

    written = await bound(directory)

    assert directory.get(UNIT) == written


@virtually
async def test_a_view_started_late_is_complete_when_start_returns() -> None:
    """A router that has started knows every owner there is."""
    the_map = Map()
    await bound(await the_map.view())

    late = await the_map.view()

    entry = late.get(UNIT)
    assert entry is not None
    assert entry.ownership.owner == "a"


@virtually
async def test_a_view_never_goes_back_whatever_the_watch_repeats() -> None:
    """After a reconnect the watch starts over: old entries come again and must change nothing."""
    the_map = Map()
    writer, reader = await the_map.view(), await the_map.view()
    seen: list[MapEntry] = []
    reader.on_change(lambda _unit, entry: seen.append(entry))
    entry = await bound(writer)

    for number in range(6):
        if number % 2:
            the_map.links[1].disconnect()
        entry = await writer.transition(UNIT, entry, failover(entry.ownership, to=f"n{number}"))
        the_map.links[1].reconnect()
        await reader.refresh(UNIT)
    await until(lambda: reader.get(UNIT) == entry)

    revisions = [change.revision for change in seen]
    assert revisions == sorted(set(revisions))
    assert [change.ownership.epoch for change in seen] == sorted(change.ownership.epoch for change in seen)


@virtually
async def test_a_transition_on_an_old_revision_is_refused() -> None:
    """Somebody else wrote first: exactly one of two transitions from one revision happens."""
    the_map = Map()
    one, other = await the_map.view(), await the_map.view()
    before = await bound(one)
    await one.transition(UNIT, before, lock(before.ownership, move="m", destination="b"))

    with pytest.raises(WrongSequence):
        await other.transition(UNIT, before, lock(before.ownership, move="n", destination="c"))

    entry = await other.refresh(UNIT)
    assert entry is not None
    assert entry.ownership.move == "m"


@virtually
async def test_a_unit_is_assigned_once() -> None:
    """Two coordinators at the cluster's birth: the second finds the key taken."""
    the_map = Map()
    one, other = await the_map.view(), await the_map.view()
    await one.transition(UNIT, None, assign("a"))

    with pytest.raises(WrongSequence):
        await other.transition(UNIT, None, assign("b"))


@virtually
async def test_an_illegal_step_is_never_written() -> None:
    """A bug in a caller stops at the map's door."""
    directory = await Map().view()
    before = await bound(directory)

    for after in (
        replace(before.ownership, epoch=before.ownership.epoch + 2),
        replace(before.ownership, owner="b"),
        replace(before.ownership, move="m"),
        replace(before.ownership, epoch=before.ownership.epoch - 1),
    ):
        with pytest.raises(InvariantViolated):
            await directory.transition(UNIT, before, after)

    assert await directory.refresh(UNIT) == before


@virtually
async def test_a_decision_is_made_again_when_somebody_wrote_first() -> None:
    """Several deciders at once: each one's change lands exactly once, on what it has really read."""
    the_map = Map()
    views = [await the_map.view() for _ in range(CAS_ATTEMPTS // 2)]
    before = await bound(views[0])

    await asyncio.gather(
        *(view.decide(UNIT, lambda own, n=n: failover(own, to=f"n{n}")) for n, view in enumerate(views))  # type: ignore[misc]
    )

    after = await views[0].refresh(UNIT)
    assert after is not None
    assert after.ownership.epoch == before.ownership.epoch + len(views)


@virtually
async def test_of_two_locks_exactly_one_is_taken() -> None:
    """The loser learns who holds it, instead of overwriting."""
    the_map = Map()
    one, other = await the_map.view(), await the_map.view()
    await bound(one)

    results = await asyncio.gather(
        one.decide(UNIT, lambda own: lock(own, move="m", destination="b")),
        other.decide(UNIT, lambda own: lock(own, move="n", destination="c")),
        return_exceptions=True,
    )

    refused = [result for result in results if isinstance(result, NotApplicable)]
    written = [result for result in results if isinstance(result, MapEntry)]
    assert (len(refused), len(written)) == (1, 1)
    assert await one.refresh(UNIT) == written[0]


@pytest.mark.parametrize("fault", ["drop_request", "drop_reply", "late"])
def test_a_decision_of_unknown_fate_is_settled_by_reading(fault: Fault) -> None:
    """Lost, landed unnoticed, or late: the change is in the map once, and `change` sees it there."""

    @virtually
    async def check() -> None:
        # given
        the_map = Map()
        directory = await the_map.view()
        before = await bound(directory)
        the_map.faults = [fault]
        seen: list[Ownership] = []

        def change(own: Ownership) -> Ownership:
            seen.append(own)
            if own.move == "m":
                raise NotApplicable("done already")
            return lock(own, move="m", destination="b")

        # when
        try:
            await directory.decide(UNIT, change)
            settled = True
        except NotApplicable:
            settled = seen[-1].move == "m"

        # then
        assert settled
        await asyncio.sleep(10)
        after = await directory.refresh(UNIT)
        assert after is not None
        assert (after.ownership.move, after.ownership.epoch) == ("m", before.ownership.epoch)
        assert the_map.faults == []

    check()


@virtually
async def test_an_abort_of_unknown_fate_is_not_taken_for_somebody_elses() -> None:
    """The acknowledgement is lost: the decider reads its own effect and does not abort a second time."""
    the_map = Map()
    directory = await the_map.view()
    entry = await bound(directory)
    locked = await directory.transition(UNIT, entry, lock(entry.ownership, move="m", destination="b"))
    the_map.faults = ["drop_reply"]

    with pytest.raises(NotApplicable, match="aborted"):
        await directory.decide(UNIT, lambda own: abort(own, move="m"))

    after = await directory.refresh(UNIT)
    assert after is not None
    assert after.ownership.outcome_of("m") is Outcome.ABORTED
    assert after.ownership.epoch == locked.ownership.epoch + 1


@virtually
async def test_a_transition_says_when_its_fate_is_unknown() -> None:
    """`transition` itself settles nothing: InDoubt, and it may land later."""
    the_map = Map()
    directory = await the_map.view()
    the_map.faults = ["late"]

    with pytest.raises(InDoubt):
        await directory.transition(UNIT, None, assign("a"))

    await until(lambda: directory.get(UNIT))


@virtually
async def test_a_decision_ends_even_when_every_write_is_lost() -> None:
    """Every retry has a bound: a caller is not kept for ever."""
    the_map = Map()
    directory = await the_map.view()
    await bound(directory)
    the_map.faults = ["drop_request"] * 1000
    began_s = clock()

    with pytest.raises((InDoubt, TransientError)):
        await directory.decide(UNIT, lambda own: lock(own, move="m", destination="b"))

    assert clock() - began_s < 60


@virtually
async def test_a_decision_about_a_unit_nobody_has_is_not_applicable() -> None:
    """`decide` changes what is there; the first owner comes through `transition`."""
    directory = await Map().view()

    with pytest.raises((NotApplicable, TransientError)):
        await directory.decide(UNIT, lambda own: lock(own, move="m", destination="b"))


GARBAGE = [
    b"",
    b"garbage",
    b"{}",
    b"[]",
    b'{"owner":7}',
    b'{"owner":"a","incarnation":null,"epoch":"x"}',
    b'{"owner":"a","incarnation":null,"epoch":-1}',
    b'{"owner":"a.b","incarnation":null,"epoch":1}',
    b"\xff\xfe",
]


@virtually
async def test_garbage_in_the_map_changes_no_view() -> None:
    """What no transition wrote is ignored, and the next good value is followed again."""
    the_map = Map()
    one, other = await the_map.view(), await the_map.view()
    good = await bound(one)
    await until(lambda: other.get(UNIT) == good)

    for payload in GARBAGE:
        await the_map.write(payload)
        await asyncio.sleep(0.1)
        assert other.get(UNIT) == good, payload
        assert other.get_actor_node(ActorId("t", "k")) in {"a", None}
    await the_map.write(encode_ownership(replace(good.ownership, epoch=9)))

    await until(lambda: (entry := other.get(UNIT)) and entry.ownership.epoch == 9)


@pytest.mark.parametrize("payload", GARBAGE)
def test_a_decision_over_garbage_ends_with_an_error_of_the_tree(payload: bytes) -> None:
    """An operator's slip of the hand must not crash the coordinator, nor keep it trying for ever."""

    @virtually
    async def check() -> None:
        the_map = Map()
        directory = await the_map.view()
        await bound(directory)
        await the_map.write(payload)

        with pytest.raises((TransientError, NotApplicable, InvalidInput, InDoubt)):
            await directory.decide(UNIT, lambda own: lock(own, move="m", destination="b"))

    check()


@virtually
async def test_keys_that_are_no_units_of_this_cluster_are_ignored() -> None:
    """Other keys share the bucket; a shard beyond the cluster's number is nobody's."""
    the_map = Map()
    directory = await the_map.view()

    for key in ("suspended", "shard.x", "shard.99", "other"):
        await the_map.write(encode_ownership(assign("a")), key=key)
    written = await bound(directory)

    assert directory.entries() == {UNIT: written}


@virtually
async def test_a_removed_key_leaves_the_last_owner_in_place() -> None:
    """A deletion by hand gives the unit to nobody new: a view that forgot the epoch could accept a lower one."""
    the_map = Map()
    one, other = await the_map.view(), await the_map.view()
    good = await bound(one)
    await until(lambda: other.get(UNIT) == good)

    await the_map.links[0].append(kv_subject(SUBJECTS.map_bucket, UNIT), b"", expected=None, timeout_s=1, discard=True)
    await asyncio.sleep(0.5)

    assert other.get(UNIT) == good


@virtually
async def test_an_actor_is_found_through_its_unit() -> None:
    """None before the first assignment."""
    directory = await Map().view()
    actor = next(ActorId("t", str(n)) for n in range(100) if directory.unit_of(ActorId("t", str(n))) == UNIT)
    assert directory.get_actor_node(actor) is None

    await bound(directory, "b")

    assert directory.get_actor_node(actor) == "b"


@virtually
async def test_a_stopped_view_follows_no_more() -> None:
    """Nothing is called back after `stop`."""
    the_map = Map()
    one, other = await the_map.view(), await the_map.view()
    seen: list[str] = []
    other.on_change(lambda unit, _entry: seen.append(unit))

    await other.stop()
    await bound(one)
    await asyncio.sleep(1)

    assert seen == []


@given(OWNERSHIPS, st.none() | st.from_regex(r"[a-z0-9-]{1,8}", fullmatch=True))
def test_a_map_value_is_read_as_it_was_written(value: Ownership, move: str | None) -> None:
    """Decoding is the inverse of encoding."""
    if move is not None:
        value = replace(value, move=move, destination="somewhere-else")

    assert decode_ownership(encode_ownership(value)) == value


@given(st.binary(max_size=50))
def test_a_map_value_that_is_none_is_invalid_input(payload: bytes) -> None:
    """And nothing but InvalidInput."""
    with pytest.raises(InvalidInput):
        decode_ownership(payload)
