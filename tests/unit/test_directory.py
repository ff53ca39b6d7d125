"""The live map: never backwards, one compare-and-set per transition, and no garbage believed."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.address import ActorId, shard_of
from routing.birth import found_or_join
from routing.directory import CAS_ATTEMPTS, Directory, MapEntry
from routing.documents import decode_ownership, encode_ownership
from routing.errors import InDoubt, InvalidInput, InvariantViolated, NotApplicable, TransientError, WrongSequence
from routing.settings import Settings
from routing.shard_map import (
    ITS_SHARD,
    LastMove,
    Outcome,
    Ownership,
    abort,
    assign,
    bind,
    failover,
    lock,
    pin,
    retire,
    set_apart,
    take_back,
    take_out,
)
from routing.subjects import actor_key, kv_stream, kv_subject
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
    apart=st.dictionaries(
        st.builds(ActorId, st.sampled_from("tu"), NAMES).map(str), st.integers(1, 2**53), max_size=3
    ).map(lambda apart: tuple(sorted(apart.items()))),
    taken_out=st.integers(0, 100),
    pinned=st.booleans(),
)
X, MATE, STRANGER = (
    next(ActorId("t", key) for key in map(str, range(start, 1000)) if shard_of(ActorId("t", key), 2) == shard)
    for start, shard in ((0, 0), (500, 0), (0, 1))
)
OWN = actor_key(X)


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


async def apart(directory: Directory) -> tuple[MapEntry, MapEntry]:
    """X with a key of its own, as `ferry migrate` writes it; returns its entry and its shard's."""
    shard = directory.get(UNIT) or await bound(directory)
    known = directory.get(OWN)
    own = await directory.transition(
        OWN, known, take_out(shard.ownership, str(X), known.ownership if known is not None else None)
    )
    return own, await directory.transition(UNIT, shard, set_apart(shard.ownership, str(X), own.ownership))


async def retired(directory: Directory) -> MapEntry:
    """X's own key as it is once X has been unpinned at home, and before its shard has it back."""
    await directory.decide(OWN, lambda view: pin(view, pinned=False))
    return await directory.decide(OWN, lambda view: retire(view, incarnation="a-1"))


async def taken_back(directory: Directory, own: MapEntry) -> MapEntry:
    """The shard's key, which owns X again."""
    return await directory.decide(UNIT, lambda view: take_back(view, str(X), own.ownership, incarnation="a-1"))


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


# -- actors with a key of their own ------------------------------------------------------------------------------------
@virtually
async def test_an_actors_unit_is_its_own_while_its_shard_names_it_apart() -> None:
    """Its own key alone changes nothing, and neither does its end: the value of its shard decides, for X alone."""
    directory = await Map().view()
    await bound(directory)
    shard = directory.get(UNIT)
    assert shard is not None

    own = await directory.transition(OWN, None, take_out(shard.ownership, str(X), None))
    assert (directory.unit_of(X), directory.counts(OWN)) == (UNIT, False)

    await directory.transition(UNIT, shard, set_apart(shard.ownership, str(X), own.ownership))
    assert (directory.unit_of(X), directory.counts(OWN)) == (OWN, True)
    assert (directory.unit_of(MATE), directory.counts(actor_key(MATE))) == (UNIT, False)
    assert (directory.shard_unit_of(X), directory.counts(UNIT)) == (UNIT, True)
    assert directory.get(OWN) == own

    await taken_back(directory, await retired(directory))
    assert (directory.unit_of(X), directory.counts(OWN)) == (UNIT, False)


@virtually
async def test_only_a_key_that_counts_is_among_the_entries() -> None:
    """Who plans or fails over sees shards and actors apart, each where the map says who owns it."""
    directory = await Map().view()
    await bound(directory)
    own, shard = await apart(directory)
    await directory.transition(actor_key(MATE), None, take_out(shard.ownership, str(MATE), None))

    assert directory.shards() == {UNIT: shard}
    assert directory.apart() == {OWN: own}
    assert directory.entries() == {UNIT: shard, OWN: own}
    assert directory.actors_apart() == [X]

    waiting = await retired(directory)
    assert directory.entries() == {UNIT: shard}
    assert directory.actors_apart() == [X]
    assert directory.get(OWN) == waiting

    back = await taken_back(directory, waiting)
    assert directory.entries() == {UNIT: back}
    assert directory.actors_apart() == []


@virtually
async def test_an_actor_that_waits_to_be_taken_back_has_no_owner() -> None:
    """Nobody may answer for it; the epoch is told, so that nobody goes back to an older answer."""
    directory = await Map().view()
    assert directory.owner_of(OWN) == (None, 0)
    own, _ = await apart(directory)
    assert (directory.owner_of(OWN), directory.get_actor_node(X)) == (("a", own.ownership.epoch), "a")

    waiting = await retired(directory)
    assert directory.owner_of(OWN) == (None, waiting.ownership.epoch)
    assert (directory.get_actor_node(X), directory.get_actor_node(MATE)) == (None, "a")

    back = await taken_back(directory, waiting)
    assert directory.get_actor_node(X) == "a"
    assert directory.owner_of(directory.unit_of(X)) == ("a", back.ownership.epoch)


@virtually
async def test_an_observer_is_told_of_an_actors_key_again_when_that_begins_or_ends_to_count() -> None:
    """Its value is the same and means something else: whoever serves the actor has to look at it once more."""
    the_map = Map()
    one, other = await the_map.view(), await the_map.view()
    shard = await bound(one)
    await until(lambda: other.get(UNIT) == shard)
    told: list[tuple[str, int, bool]] = []
    other.on_change(lambda unit, entry: told.append((unit, entry.ownership.epoch, other.counts(OWN))))

    await apart(one)
    await asyncio.sleep(1)
    assert told == [(OWN, 2, False), (UNIT, 1, True), (OWN, 2, True)]
    told.clear()

    await taken_back(one, await retired(one))
    await asyncio.sleep(1)
    assert told == [(OWN, 2, True), (OWN, 3, True), (UNIT, 4, False), (OWN, 3, False)]
    told.clear()

    await one.decide(UNIT, lambda view: failover(view, to="b"))
    await asyncio.sleep(1)
    assert told == [(UNIT, 5, False)]


@virtually
async def test_a_shard_may_name_an_actor_before_that_actors_key_is_known() -> None:
    """A view that reads keys one at a time sees them in any order; until it knows more, the actor has no owner."""
    the_map = Map()
    one, other = await the_map.view(), await the_map.view()
    await bound(one)
    await other.stop()
    own, shard = await apart(one)

    await other.locate(MATE)  # which reads its shard's key alone
    assert (other.unit_of(X), other.owner_of(OWN), other.get_actor_node(X)) == (OWN, (None, 0), None)
    assert (other.entries(), other.actors_apart()) == ({UNIT: shard}, [X])

    assert await other.refresh(OWN) == own
    assert other.entries() == {UNIT: shard, OWN: own}


@virtually
async def test_refreshing_an_actors_key_reads_its_shards_too() -> None:
    """Whether it counts stands there; it is read after the key itself, which `take_out` relies on."""
    the_map = Map()
    one, other = await the_map.view(), await the_map.view()
    await bound(one)
    await other.stop()
    own, shard = await apart(one)
    told: list[str] = []
    other.on_change(lambda unit, _entry: told.append(unit))

    assert await other.refresh(OWN) == own

    assert (other.get(UNIT), other.counts(OWN)) == (shard, True)
    assert told == [OWN, UNIT, OWN]


@virtually
async def test_an_actor_is_located_by_the_key_that_counts() -> None:
    """Read from the leader, however little this view has heard."""
    the_map = Map()
    one, other = await the_map.view(), await the_map.view()
    await other.stop()
    assert await other.locate(X) == (UNIT, None)

    shard = await bound(one)
    assert await other.locate(X) == (UNIT, shard)

    own, _ = await apart(one)
    assert await other.locate(X) == (OWN, own)
    unit, entry = await other.locate(MATE)
    assert (unit, entry is not None and entry.ownership.owner) == (UNIT, "a")

    back = await taken_back(one, await retired(one))
    assert await other.locate(X) == (UNIT, back)


@virtually
async def test_an_actor_can_be_taken_out_again_and_again() -> None:
    """Each time above all that was; every view ends with the same units."""
    the_map = Map()
    one, other = await the_map.view(), await the_map.view()
    epochs = []
    for _ in range(3):
        own, _ = await apart(one)
        back = await taken_back(one, await retired(one))
        epochs += [own.ownership.epoch, back.ownership.epoch]

    assert epochs == sorted(set(epochs))
    await until(lambda: other.get(UNIT) == one.get(UNIT) and other.get(OWN) == one.get(OWN))
    assert other.unit_of(X) == UNIT


@virtually
async def test_an_actors_keys_end_and_begin_are_not_written_without_a_fence() -> None:
    """A bug in a caller stops at the map's door."""
    directory = await Map().view()
    await bound(directory)
    _, shard = await apart(directory)

    with pytest.raises(InvariantViolated):
        await directory.transition(UNIT, shard, replace(shard.ownership, apart=()))

    assert await directory.refresh(UNIT) == shard
    waiting = await retired(directory)
    with pytest.raises(InvariantViolated):
        await directory.transition(OWN, waiting, replace(waiting.ownership, owner="a", incarnation="a-1"))

    assert await directory.refresh(OWN) == waiting


@virtually
async def test_a_key_without_a_value_that_can_be_read_is_remembered_until_it_has_one() -> None:
    """Over a good value, which stays known, and where there never was one; a deleted key is no free one either."""
    the_map = Map()
    directory = await the_map.view()
    await bound(directory)
    own, shard = await apart(directory)

    for key in (UNIT, OWN, actor_key(STRANGER), "shard.2", "suspended"):
        await the_map.write(b"junk", key=key)
    await the_map.links[0].append(
        kv_subject(SUBJECTS.map_bucket, "shard.1"), b"", expected=None, timeout_s=1, discard=True
    )
    late = await the_map.view()
    await until(lambda: "shard.1" in directory.unreadable())

    assert {*directory.unreadable()} == {UNIT, OWN, "shard.1"}  # no shard names the stranger, and shard.2 is none
    assert directory.get(UNIT) == shard
    assert {*late.unreadable()} == {UNIT, "shard.1"}
    assert late.get(UNIT) is None

    await the_map.write(encode_ownership(shard.ownership))
    await the_map.write(encode_ownership(assign("a")), key="shard.1")
    await until(lambda: directory.unreadable() == [OWN] and late.unreadable() == [OWN])
    assert directory.get(OWN) == own


@virtually
async def test_a_stale_read_of_junk_does_not_make_a_good_value_unreadable() -> None:
    """A leader that was deposed answers with what stood there before."""
    the_map = Map()
    directory = await the_map.view()
    await the_map.write(b"junk")
    await until(lambda: directory.unreadable() == [UNIT])
    junk = await the_map.links[0].last(
        kv_stream(SUBJECTS.map_bucket), kv_subject(SUBJECTS.map_bucket, UNIT), timeout_s=1
    )
    await the_map.write(encode_ownership(assign("a")))
    await until(lambda: directory.unreadable() == [])

    assert junk is not None
    directory._on_entry(junk)

    assert directory.unreadable() == []


MISPLACED = {
    "an actor of another shard": (UNIT, Ownership(owner="a", incarnation="a-1", epoch=9, apart=((str(STRANGER), 3),))),
    "one of each": (UNIT, Ownership(owner="a", incarnation="a-1", epoch=9, apart=((str(X), 3), (str(STRANGER), 3)))),
    "a shard that its shard owns": (UNIT, Ownership(owner=ITS_SHARD, incarnation=None, epoch=9)),
    "a shard that was taken out of one": (UNIT, Ownership(owner="a", incarnation="a-1", epoch=9, taken_out=9)),
    "a pinned shard": (UNIT, Ownership(owner="a", incarnation="a-1", epoch=9, pinned=True)),
    "an actor with actors apart": (OWN, Ownership(owner="a", incarnation="a-1", epoch=9, apart=((str(X), 3),))),
}


@pytest.mark.parametrize("what", MISPLACED)
def test_a_value_that_its_key_cannot_have_is_counted_and_ignored(what: str) -> None:
    """What nobody but a person could have written: the last good value stays."""

    @virtually
    async def check() -> None:
        the_map = Map()
        directory = await the_map.view()
        await bound(directory)
        own, shard = await apart(directory)
        key, value = MISPLACED[what]

        await the_map.write(encode_ownership(value), key=key)
        await asyncio.sleep(0.1)

        assert directory.counters["malformed"] == 1
        assert directory.entries() == {UNIT: shard, OWN: own}
        assert (directory.unit_of(X), directory.unit_of(STRANGER)) == (OWN, "shard.1")
        good = replace(own.ownership, epoch=own.ownership.epoch + 1)
        await the_map.write(encode_ownership(good), key=OWN)
        await until(lambda: directory.owner_of(OWN) == ("a", good.epoch))

    check()


@pytest.mark.parametrize(
    "changes",
    [
        b'"apart":"t/k"',
        b'"apart":["t/k"]',
        b'"apart":{"t/k":0}',
        b'"apart":{"t/k":"1"}',
        b'"apart":{"t/k":true}',
        b'"apart":{"no actor":1}',
        b'"apart":{"":1}',
        b'"apart":{' + b",".join(b'"t/%d":1' % n for n in range(257)) + b"}",
        b'"taken_out":4',
        b'"taken_out":-1',
        b'"taken_out":"1"',
        b'"pinned":1',
        b'"pinned":"yes"',
        b'"pinned":null',
        b'"owner":"_shard","incarnation":"a-1"',
        b'"owner":"_shard","move":"m","destination":"b"',
        b'"owner":"_other"',
        b'"move":"m","destination":"_shard"',
    ],
)
def test_a_map_value_about_actors_that_no_transition_writes_is_invalid_input(changes: bytes) -> None:
    """The later of two equal names in a JSON object counts, so these replace what is good."""
    good = b'{"owner":"a","incarnation":null,"epoch":3,"fence":0,"move":null,"destination":null,"last":null,'
    assert decode_ownership(good + b'"apart":{"t/k":3},"pinned":true}').apart == (("t/k", 3),)

    with pytest.raises(InvalidInput):
        decode_ownership(good + changes + b"}")


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
