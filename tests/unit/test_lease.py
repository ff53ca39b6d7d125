"""Leases: one holder, trusted for less time than the server gives, on the holder's own clock."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.birth import found_or_join
from routing.errors import InDoubt, InvalidInput, Timeout, Unavailable
from routing.lease import RENEWALS_PER_LEASE, TRUSTED_SHARE, Lease, decode_lease
from routing.settings import Settings
from routing.subjects import kv_subject
from runtime.testing import Fault, Kind, MemoryLink, MemoryNats
from tests.unit.virtual_time import clock, virtually

SETTINGS = Settings(shards=1)
BUCKET = SETTINGS.subjects.lease_bucket
KEY = "leader"
TTL_S = 5.0
MARKER_DELAY_S = 0.5  # a server may notice an expiry a little late


class Server:
    def __init__(self, latency_s: float = 0.0) -> None:
        self.latency_s = latency_s
        self.faults: list[Fault] = []
        self.nats = MemoryNats(latency=lambda: self.latency_s, on_message=self._on_message, late_s=4.0)

    def _on_message(self, kind: Kind, subject: str) -> Fault:
        return self.faults.pop(0) if kind == "append" and subject.endswith(KEY) and self.faults else "deliver"

    async def contender(self, incarnation: str) -> tuple[Lease, MemoryLink]:
        link = self.nats.link(incarnation)
        await found_or_join(link, SETTINGS)
        return Lease(link, BUCKET, KEY, incarnation=incarnation, ttl_s=TTL_S, clock=clock), link


@virtually
async def test_of_two_contenders_exactly_one_holds() -> None:
    """However close together they ask."""
    server = Server()
    (one, _), (other, _) = await server.contender("one"), await server.contender("other")

    held = await asyncio.gather(one.hold({"name": "one"}), other.hold({"name": "other"}))

    assert sorted(held) == [False, True]
    assert [one.is_trusted(), other.is_trusted()] == list(held)


@virtually
async def test_a_renewed_lease_is_kept_for_as_long_as_it_is_renewed() -> None:
    """At the pace it asks for itself, nobody else ever gets in."""
    server = Server()
    (one, _), (other, _) = await server.contender("one"), await server.contender("other")

    for _ in range(RENEWALS_PER_LEASE * 4):
        assert await one.hold({"name": "one"})
        await asyncio.sleep(one.renew_every_s)
        assert one.is_trusted()
        assert not await other.hold({"name": "other"})
        assert not other.is_trusted()


@virtually
async def test_a_lease_is_renewed_several_times_within_the_trusted_part() -> None:
    """One lost renewal alone does not stop a holder."""
    (lease, _) = await Server().contender("one")

    assert lease.renew_every_s * 2 < TTL_S * TRUSTED_SHARE


@virtually
async def test_a_holder_that_stops_renewing_loses_it_to_the_next() -> None:
    """After the lease, and not before; the old holder has long stopped trusting it."""
    server = Server()
    (one, _), (other, _) = await server.contender("one"), await server.contender("other")
    await one.hold({})

    await asyncio.sleep(TTL_S - 0.1)
    assert not await other.hold({})
    assert not one.is_trusted()

    await asyncio.sleep(0.1 + MARKER_DELAY_S)
    assert await other.hold({})
    assert not await one.hold({})
    assert not one.is_trusted()


@virtually
async def test_trust_is_counted_from_before_the_sending() -> None:
    """A slow network shortens what is left: never is the lease trusted while another may already hold it."""
    server = Server()
    (lease, _) = await server.contender("one")
    await lease.hold({})
    server.latency_s = 0.4

    asked_s = clock()
    assert await lease.hold({})
    answered_s = clock()

    last_possible_send_s = answered_s - 2 * server.latency_s
    await asyncio.sleep(asked_s + TTL_S * TRUSTED_SHARE - 0.01 - clock())
    assert lease.is_trusted()
    await asyncio.sleep(last_possible_send_s + TTL_S * TRUSTED_SHARE + 0.01 - clock())
    assert not lease.is_trusted()


@pytest.mark.parametrize("fault", ["drop_request", "drop_reply", "late"])
def test_a_renewal_without_an_answer_extends_nothing(fault: Fault) -> None:
    """Whichever way it was lost, trust runs from the renewal before; the next one goes on."""

    @virtually
    async def check() -> None:
        server = Server()
        (lease, _) = await server.contender("one")
        await lease.hold({})
        held_s = clock()
        await asyncio.sleep(0.5)
        server.faults = [fault]

        with pytest.raises((Timeout, Unavailable)):
            await lease.hold({})

        assert server.faults == []
        await asyncio.sleep(max(0, held_s + TTL_S * TRUSTED_SHARE + 0.01 - clock()))
        assert not lease.is_trusted()
        assert await lease.hold({})
        assert lease.is_trusted()

    check()


@pytest.mark.parametrize("fault", ["drop_reply", "late"])
def test_a_first_acquisition_of_unknown_fate_is_recognised_as_ones_own(fault: Fault) -> None:
    """It landed unnoticed: asking again finds oneself as the holder, not a stranger."""

    @virtually
    async def check() -> None:
        server = Server()
        (lease, _) = await server.contender("one")
        server.faults = [fault]

        with pytest.raises((Timeout, Unavailable)):
            await lease.hold({})
        assert not lease.is_trusted()
        await asyncio.sleep(2.0)  # a late one has landed by now, and has not expired yet

        assert await lease.hold({})
        assert lease.is_trusted()

    check()


@virtually
async def test_one_lost_renewal_costs_no_trust() -> None:
    """Renewing five times a lease is for exactly this: a single lost message must not stop a holder."""
    server = Server()
    (lease, _) = await server.contender("one")
    await lease.hold({})
    await asyncio.sleep(lease.renew_every_s)
    server.faults = ["drop_request"]

    async def renew() -> None:
        while True:
            with contextlib.suppress(Timeout, Unavailable, InDoubt):
                await lease.hold({})
            await asyncio.sleep(lease.renew_every_s)

    renewing = asyncio.create_task(renew())
    distrusted_s = []
    began_s = clock()
    while clock() < began_s + 2 * TTL_S:
        await asyncio.sleep(0.05)
        if not lease.is_trusted():
            distrusted_s.append(round(clock() - began_s, 2))
    renewing.cancel()

    assert server.faults == []
    assert distrusted_s == []


@virtually
async def test_without_a_link_nothing_is_held() -> None:
    """Unavailable or Timeout, and the trust that is left is not extended."""
    server = Server()
    lease, link = await server.contender("one")
    await lease.hold({})
    link.disconnect()

    with pytest.raises((Timeout, Unavailable)):
        await lease.hold({})

    await asyncio.sleep(TTL_S * TRUSTED_SHARE)
    assert not lease.is_trusted()


@virtually
async def test_a_released_lease_is_free_at_once() -> None:
    """A planned stop costs no expiry."""
    server = Server()
    (one, _), (other, _) = await server.contender("one"), await server.contender("other")
    await one.hold({})

    await one.release()

    assert not one.is_trusted()
    assert await other.holder() == (None, (await other.holder())[1])
    assert await other.hold({})


@virtually
async def test_releasing_what_another_holds_changes_nothing() -> None:
    """A holder that overslept gives away what is no longer its own: it must not."""
    server = Server()
    (one, _), (other, _) = await server.contender("one"), await server.contender("other")
    await one.hold({})
    await asyncio.sleep(TTL_S + MARKER_DELAY_S)
    await other.hold({"name": "other"})

    await one.release()

    holder, _ = await one.holder()
    assert holder is not None
    assert holder["incarnation"] == "other"
    assert await other.hold({})


@virtually
async def test_a_released_lease_can_be_taken_again_by_the_same_holder() -> None:
    """The removal marker is no holder."""
    (lease, _) = await Server().contender("one")
    await lease.hold({})
    await lease.release()
    await lease.release()

    assert await lease.hold({})
    assert lease.is_trusted()


@virtually
async def test_an_expired_lease_that_nobody_took_is_acquired_again_at_the_first_asking() -> None:
    """After an outage: False would mean that another holds it, and its holder would give up for good."""
    (lease, _) = await Server().contender("one")

    for away_s in (TTL_S, TTL_S + MARKER_DELAY_S, TTL_S * 20):
        assert await lease.hold({})
        await asyncio.sleep(away_s)
        assert not lease.is_trusted()

        assert await lease.hold({}), away_s
        assert lease.is_trusted()


@virtually
async def test_a_new_life_under_the_same_name_waits_for_the_old_one() -> None:
    """The incarnation holds, not the name."""
    server = Server()
    (old, _), (new, _) = await server.contender("a-1"), await server.contender("a-2")
    await old.hold({"name": "a"})

    assert not await new.hold({"name": "a"})
    await asyncio.sleep(TTL_S + MARKER_DELAY_S)
    assert await new.hold({"name": "a"})


@virtually
async def test_the_document_is_what_others_read() -> None:
    """With the incarnation added; a renewal replaces it."""
    server = Server()
    (one, _), (other, _) = await server.contender("one"), await server.contender("other")
    await one.hold({"state": "up"})
    await one.hold({"state": "draining"})

    holder, sequence = await other.holder()

    assert holder == {"state": "draining", "incarnation": "one"}
    assert sequence > 0


@virtually
async def test_garbage_under_the_key_does_not_crash_a_contender() -> None:
    """Somebody wrote by hand: an error of the tree, or a takeover, but nothing else."""
    server = Server()
    lease, link = await server.contender("one")
    await link.append(kv_subject(BUCKET, KEY), b"garbage", expected=None, timeout_s=1)

    try:
        held = await lease.hold({})
    except (InvalidInput, InDoubt, Timeout, Unavailable):
        held = False

    assert held == lease.is_trusted()


@virtually
async def test_a_suspended_machine_stops_trusting() -> None:
    """The clock runs during suspend: the first look after waking says no."""
    now_s = [100.0]
    link = Server().nats.link("one")
    await found_or_join(link, SETTINGS)
    lease = Lease(link, BUCKET, KEY, incarnation="one", ttl_s=TTL_S, clock=lambda: now_s[0])
    await lease.hold({})
    assert lease.is_trusted()

    now_s[0] += 3600

    assert not lease.is_trusted()


@given(st.binary(max_size=40))
def test_a_lease_that_is_none_is_invalid_input(payload: bytes) -> None:
    """And nothing but InvalidInput."""
    with pytest.raises(InvalidInput):
        decode_lease(payload)
