"""A unit's gate: what waits, in what order, how much, and when all is quiet."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from routing.address import ActorId
from routing.envelope import Command
from routing.errors import Busy
from runtime.delivery import Delivery
from runtime.unit import Buffer, Unit, UnitState
from tests.unit.virtual_time import clock, virtually


def delivery(number: int, size_bytes: int = 1) -> Delivery:
    command = Command(actor=ActorId("t", "k"), name="add", message_id=f"m-{number}", expires_ms=0)
    return Delivery(command=command, size_bytes=size_bytes)


def ids(deliveries: list[Delivery]) -> list[str]:
    return [waiting.command.message_id for waiting in deliveries]


def test_what_waits_leaves_in_the_order_it_came() -> None:
    """And only once."""
    buffer = Buffer(10, 1000)
    for number in range(3):
        buffer.add(delivery(number))

    assert ids(buffer.take_all()) == ["m-0", "m-1", "m-2"]
    assert buffer.take_all() == []


def test_one_sender_does_not_take_the_room_of_the_others() -> None:
    """Its own commands over the bound are sent back; another sender's are taken."""
    buffer = Buffer(10, 1000, per_sender=2)
    mine = [replace(delivery(n), subject="to.busy") for n in range(3)]
    buffer.add(mine[0])
    buffer.add(mine[1])

    with pytest.raises(Busy, match="2 of your commands"):
        buffer.add(mine[2])
    buffer.add(replace(delivery(4), subject="to.quiet"))

    assert len(buffer.take_all()) == 3
    buffer.add(mine[2])


def test_a_buffer_is_bounded_by_count() -> None:
    """The one too many is told to come back; those before it stay."""
    buffer = Buffer(2, 1000)
    buffer.add(delivery(0))
    buffer.add(delivery(1))

    with pytest.raises(Busy) as refusal:
        buffer.add(delivery(2))

    assert refusal.value.retry_after_s > 0
    assert ids(buffer.take_all()) == ["m-0", "m-1"]


def test_a_buffer_is_bounded_by_bytes() -> None:
    """A refused large one leaves room for a small one."""
    buffer = Buffer(10, 100)
    buffer.add(delivery(0, 60))

    with pytest.raises(Busy):
        buffer.add(delivery(1, 60))
    buffer.add(delivery(2, 40))

    assert ids(buffer.take_all()) == ["m-0", "m-2"]


def test_an_emptied_buffer_has_room_again() -> None:
    """For as much as at first, however often."""
    buffer = Buffer(2, 100)
    for _ in range(5):
        buffer.add(delivery(0, 50))
        buffer.add(delivery(1, 50))
        assert len(buffer.take_all()) == 2


def test_what_was_accepted_before_the_gate_closed_goes_first_and_is_never_refused() -> None:
    """It was accepted already, so no bound applies; but it counts for those that come later."""
    buffer = Buffer(2, 100)
    buffer.add(delivery(9))

    buffer.put_first([delivery(number, 90) for number in range(4)])

    with pytest.raises(Busy):
        buffer.add(delivery(10))
    assert ids(buffer.take_all()) == ["m-0", "m-1", "m-2", "m-3", "m-9"]
    buffer.add(delivery(11, 100))


def test_a_new_unit_is_closed() -> None:
    """Nothing is served before the map said so."""
    unit = Unit("shard.0", Buffer(2, 100))

    assert unit.state is UnitState.OPENING


@virtually
async def test_a_unit_without_running_handlers_is_quiet_at_once() -> None:
    """No wait where there is nothing to wait for."""
    began_s = clock()

    await Unit("shard.0", Buffer(2, 100)).quiet(4.0)

    assert clock() == began_s


@virtually
async def test_a_unit_is_quiet_when_the_last_handler_has_ended() -> None:
    """Not when the first has."""
    unit = Unit("shard.0", Buffer(2, 100))
    unit.mailbox_started()
    unit.mailbox_started()
    waiting = asyncio.create_task(unit.quiet(4.0))

    unit.mailbox_stopped()
    await asyncio.sleep(1)
    assert not waiting.done()
    unit.mailbox_stopped()

    await waiting


@virtually
async def test_a_handler_that_does_not_end_is_busy_at_the_deadline() -> None:
    """The pause is asked for again; afterwards it still can become quiet."""
    unit = Unit("shard.0", Buffer(2, 100))
    unit.mailbox_started()
    began_s = clock()

    with pytest.raises(Busy):
        await unit.quiet(4.0)
    assert clock() - began_s == pytest.approx(4.0, abs=0.1)

    unit.mailbox_stopped()
    await unit.quiet(4.0)


@virtually
async def test_a_unit_that_was_quiet_is_not_when_a_handler_starts() -> None:
    """Quiet is a state, not an event of the past."""
    unit = Unit("shard.0", Buffer(2, 100))
    unit.mailbox_started()
    unit.mailbox_stopped()
    await unit.quiet(1.0)
    unit.mailbox_started()

    with pytest.raises(Busy):
        await unit.quiet(1.0)
