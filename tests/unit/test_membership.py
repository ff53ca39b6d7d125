"""Who is there, as seen by one observer's own clock."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from routing.birth import found_or_join
from routing.errors import InvalidInput
from routing.lease import Lease
from routing.membership import OBSERVER_MARGIN_S, SILENCE_RENEWALS, Membership, NodeState, member_of, reads
from routing.settings import Settings
from routing.subjects import LEADER_KEY, kv_subject, node_key
from runtime.testing import MemoryLink, MemoryNats
from tests.unit.virtual_time import clock, until, virtually

SETTINGS = Settings(shards=1)
BUCKET = SETTINGS.subjects.lease_bucket
LEASE_S = 5.0
DOCUMENT: dict[str, Any] = {
    "state": "up", "weight": 2.0, "role": "blue", "types": ["cart"], "host": "h", "pid": 7, "version": "0.1.0",
    "schemas": {"cart": 3},
}  # fmt: skip


class Leases:
    def __init__(self) -> None:
        self.nats = MemoryNats()
        self.link = self.nats.link("writer")
        self.observer_link = self.nats.link("observer")

    async def observer(self, link: MemoryLink | None = None) -> Membership:
        await found_or_join(self.link, SETTINGS)
        membership = Membership(link or self.observer_link, SETTINGS.subjects, node_lease_s=LEASE_S, clock=clock)
        await membership.start()
        return membership

    async def node(self, name: str, incarnation: str = "", **changes: Any) -> Lease:
        lease = Lease(
            self.link, BUCKET, node_key(name), incarnation=incarnation or f"{name}-1", ttl_s=LEASE_S, clock=clock
        )
        assert await lease.hold({**DOCUMENT, **changes})
        return lease


@virtually
async def test_a_node_is_there_from_its_lease_on() -> None:
    """With what it said about itself."""
    leases = Leases()
    membership = await leases.observer()

    await leases.node("a")
    member = await until(lambda: membership.alive().get("a"))

    assert (member.id, member.incarnation, member.state) == ("a", "a-1", NodeState.UP)
    assert (member.weight, member.role, member.types) == (2.0, "blue", ("cart",))
    assert member.schemas == {"cart": 3}
    assert member.takes_shards


@virtually
async def test_nodes_that_were_there_before_are_seen_when_start_returns() -> None:
    """A coordinator that just became leader must not take living nodes for dead."""
    leases = Leases()
    await found_or_join(leases.link, SETTINGS)
    await leases.node("a")
    await leases.node("b")

    membership = await leases.observer()

    assert set(membership.alive()) == {"a", "b"}


@virtually
async def test_a_node_that_leaves_is_gone_at_once() -> None:
    """A released lease needs no expiry."""
    leases = Leases()
    membership = await leases.observer()
    lease = await leases.node("a")
    await until(membership.alive)
    began_s = clock()

    await lease.release()
    await until(lambda: not membership.alive())

    assert clock() - began_s < LEASE_S / 2


@virtually
async def test_a_node_that_renews_stays() -> None:
    """For many leases."""
    leases = Leases()
    membership = await leases.observer()
    lease = await leases.node("a")

    for _ in range(20):
        await asyncio.sleep(lease.renew_every_s)
        await lease.hold(DOCUMENT)
        assert set(membership.alive()) == {"a"}


@virtually
async def test_a_silent_node_is_gone_after_its_lease_and_not_before() -> None:
    """The observer counts on its own clock."""
    leases = Leases()
    membership = await leases.observer()
    await leases.node("a")
    await until(membership.alive)
    seen_s = clock()

    await asyncio.sleep(LEASE_S - 0.2)
    assert set(membership.alive()) == {"a"}
    await asyncio.sleep(seen_s + LEASE_S + OBSERVER_MARGIN_S + 0.1 - clock())
    assert membership.alive() == {}


@virtually
async def test_an_observer_that_hears_no_more_counts_by_itself() -> None:
    """Even when the removal never reaches it: the lease and a margin, and the node is gone for this observer."""
    leases = Leases()
    membership = await leases.observer()
    lease = await leases.node("a")
    await until(membership.alive)
    leases.observer_link.disconnect()

    await asyncio.sleep(LEASE_S + OBSERVER_MARGIN_S - 0.5)
    await lease.hold(DOCUMENT)
    assert set(membership.alive()) == {"a"}
    await asyncio.sleep(1)

    assert membership.alive() == {}


@virtually
async def test_what_a_reconnected_watch_repeats_is_no_renewal() -> None:
    """A dead node's last lease, delivered again after a reconnect, does not bring it back to life."""
    leases = Leases()
    membership = await leases.observer()
    await leases.node("a")
    await until(membership.alive)
    began_s = clock()

    while clock() - began_s < LEASE_S + OBSERVER_MARGIN_S + 0.2:
        leases.observer_link.disconnect()
        leases.observer_link.reconnect()
        await asyncio.sleep(0.5)

    assert membership.alive() == {}


@virtually
async def test_a_silence_of_all_is_the_observers_own_and_is_noticed_when_it_is_over_as_well() -> None:
    """An observer that was stopped did not see the silence pass: the first entry after it begins the count anew."""
    leases = Leases()
    membership = await leases.observer()
    lease = await leases.node("a")
    for _ in range(10):
        await asyncio.sleep(lease.renew_every_s)
        await lease.hold(DOCUMENT)
    assert membership.listening_for_s() > LEASE_S + OBSERVER_MARGIN_S

    leases.observer_link.disconnect()
    for _ in range(3):
        await asyncio.sleep(lease.renew_every_s)
        await lease.hold(DOCUMENT)
    assert membership.listening_for_s() == 0

    leases.observer_link.reconnect()
    began_s = clock()
    await until(membership.listening_for_s)
    assert membership.listening_for_s() <= clock() - began_s


@virtually
async def test_what_a_watch_repeats_does_not_end_a_silence() -> None:
    """It was written before, so it tells nothing of who lives."""
    leases = Leases()
    membership = await leases.observer()
    lease = await leases.node("a")
    await until(membership.alive)

    await asyncio.sleep(SILENCE_RENEWALS * lease.renew_every_s + 0.1)
    leases.observer_link.disconnect()
    leases.observer_link.reconnect()
    await asyncio.sleep(0.5)

    assert membership.listening_for_s() == 0


@virtually
async def test_one_node_that_is_heard_is_no_silence() -> None:
    """Nor is the leader alone: whoever else does not renew is gone."""
    leases = Leases()
    membership = await leases.observer()
    await leases.node("a")
    leader = Lease(leases.link, BUCKET, LEADER_KEY, incarnation="c-1", ttl_s=LEASE_S, clock=clock)

    for _ in range(8):
        await leader.hold({"name": "c"})
        await asyncio.sleep(leader.renew_every_s)

    assert membership.alive() == {}
    assert membership.listening_for_s() > LEASE_S + OBSERVER_MARGIN_S


@virtually
async def test_a_draining_node_is_there_but_takes_no_shards() -> None:
    """It is alive until it is empty."""
    leases = Leases()
    membership = await leases.observer()
    lease = await leases.node("a")
    await until(membership.alive)

    await lease.hold({**DOCUMENT, "state": "draining"})

    member = await until(lambda: [m for m in membership.alive().values() if m.state is NodeState.DRAINING])
    assert not member[0].takes_shards


@virtually
async def test_observers_are_called_for_news_and_not_for_renewals() -> None:
    """O(all) work on every renewal is how herds begin."""
    leases = Leases()
    membership = await leases.observer()
    calls: list[float] = []
    membership.on_change(lambda: calls.append(clock()))

    lease = await leases.node("a")
    await until(lambda: calls)
    came = len(calls)
    for _ in range(5):
        await lease.hold(DOCUMENT)
        await asyncio.sleep(0.1)
    assert len(calls) == came

    await lease.hold({**DOCUMENT, "state": "draining"})
    await until(lambda: len(calls) > came)
    changed = len(calls)
    await lease.release()
    await until(lambda: len(calls) > changed)


@virtually
async def test_a_new_life_of_a_node_is_news() -> None:
    """Its shards have lost what the old life held in memory."""
    leases = Leases()
    membership = await leases.observer()
    lease = await leases.node("a")
    await until(membership.alive)
    calls: list[float] = []
    membership.on_change(lambda: calls.append(clock()))

    await lease.release()
    await leases.node("a", incarnation="a-2")

    await until(lambda: calls and membership.alive()["a"].incarnation == "a-2")


@virtually
async def test_garbage_under_a_nodes_key_harms_nobody() -> None:
    """Ignored; the others are still followed."""
    leases = Leases()
    membership = await leases.observer()

    for payload in (b"garbage", b"{}", b"[]", b'{"incarnation":7}', b'{"incarnation":"x","state":"flying"}', b"\xff"):
        await leases.link.append(kv_subject(BUCKET, node_key("bad")), payload, expected=None, timeout_s=1)
        await asyncio.sleep(0.1)
        assert "bad" not in membership.alive(), payload
    await leases.node("a")

    await until(lambda: set(membership.alive()) == {"a"})


@virtually
async def test_the_leader_is_known_by_name() -> None:
    """None before there is one, and after it has gone."""
    leases = Leases()
    membership = await leases.observer()
    assert membership.leader is None
    lease = Lease(leases.link, BUCKET, LEADER_KEY, incarnation="c-1", ttl_s=LEASE_S, clock=clock)

    await lease.hold({"name": "coordinator-1"})
    await until(lambda: membership.leader == "coordinator-1")
    await lease.release()

    await until(lambda: membership.leader is None)


@virtually
async def test_a_stopped_observer_calls_nobody() -> None:
    """Nothing is called back after `stop`."""
    leases = Leases()
    membership = await leases.observer()
    calls: list[int] = []
    membership.on_change(lambda: calls.append(1))

    await membership.stop()
    await leases.node("a")
    await asyncio.sleep(LEASE_S * 2)

    assert calls == []


# -- which code a node has ---------------------------------------------------------------------------------------------
def test_code_reads_what_no_newer_code_has_written() -> None:
    """By the types that both have: what is not told stands in nobody's way."""
    assert reads({"cart": 2}, {"cart": 2, "room": 5})
    assert reads({"cart": 3, "bag": 1}, {"cart": 2})
    assert reads({}, {"cart": 2})
    assert reads({"cart": 1}, {})
    assert not reads({"cart": 2, "room": 1}, {"cart": 1, "room": 2})


def test_a_node_of_an_earlier_version_does_not_tell() -> None:
    """It is there all the same."""
    before = {name: value for name, value in DOCUMENT.items() if name != "schemas"}

    assert member_of("a", {**before, "incarnation": "a-1"}).schemas == {}


@pytest.mark.parametrize("schemas", [None, [], {"cart": "3"}, {"cart": True}, {"cart": None}])
def test_schema_versions_are_whole_numbers(schemas: Any) -> None:
    with pytest.raises(InvalidInput, match="lease of node a is malformed: schemas"):
        member_of("a", {**DOCUMENT, "incarnation": "a-1", "schemas": schemas})
