"""Frames of several messages: nothing is lost, reordered or invented, and what is cut short is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.errors import InvalidInput
from routing.nats_packing import FRAME_BYTES, FRAME_MESSAGES, INBOX_MARK, Outbox, Parcel, parcels, unpack

TOKENS = st.integers(0, 2**63)
MESSAGES = st.lists(st.tuples(TOKENS, st.binary(max_size=50)), min_size=1, max_size=200)


def contents(parcel: Parcel) -> list[tuple[int, bytes]]:
    return unpack(parcel.payload) if parcel.is_frame else [(parcel.tokens[0], parcel.payload)]


@given(MESSAGES)
def test_what_is_packed_comes_out_in_its_order(messages: list[tuple[int, bytes]]) -> None:
    """A forwarded command that overtook another would break its sender's order."""
    packed = list(parcels(messages))

    assert [message for parcel in packed for message in contents(parcel)] == messages
    assert [token for parcel in packed for token in parcel.tokens] == [token for token, _ in messages]


@given(st.lists(st.integers(0, FRAME_BYTES + 1), min_size=1, max_size=12))
def test_a_frame_keeps_its_bounds(sizes: list[int]) -> None:
    """One is handled in one go, and must fit into a NATS message; a long payload goes as it is."""
    packed = list(parcels([(token, bytes(size)) for token, size in enumerate(sizes)]))

    for parcel in packed:
        assert len(parcel.tokens) <= FRAME_MESSAGES
        if parcel.is_frame:
            assert sum(len(payload) for _, payload in unpack(parcel.payload)) <= FRAME_BYTES


def test_as_many_as_fit_go_together() -> None:
    """That is what packing is for."""
    packed = list(parcels([(token, b"x") for token in range(FRAME_MESSAGES + 1)]))

    assert [len(parcel.tokens) for parcel in packed] == [FRAME_MESSAGES, 1]


@given(MESSAGES.filter(lambda messages: len(messages) > 1), st.data())
def test_a_frame_cut_short_is_refused(messages: list[tuple[int, bytes]], data: st.DataObject) -> None:
    """Never a message that nobody sent: one that ends too early is refused with all of its frame."""
    (frame, *_) = [parcel.payload for parcel in parcels(messages)]
    whole = unpack(frame)
    ends = {0}
    for _, payload in whole:
        ends.add(max(ends) + 12 + len(payload))
    cut = data.draw(st.integers(0, len(frame)).filter(lambda size: size not in ends))

    with pytest.raises(InvalidInput, match="ends within"):
        unpack(frame[:cut])


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_read(garbage: bytes) -> None:
    """Nothing else than InvalidInput may come of it: a dead subscription would be worse."""
    try:
        messages = unpack(garbage)
    except InvalidInput:
        return

    assert sum(12 + len(payload) for _, payload in messages) == len(garbage)


def test_the_outbox_sorts_by_where_messages_go_and_is_empty_afterwards() -> None:
    """Answers to two inboxes must not share a frame; what has no token goes alone."""
    outbox = Outbox()
    outbox.add("cmd.a", 1, b"one")
    outbox.add("cmd.b", 2, b"two")
    outbox.add("cmd.a", 3, b"three")
    outbox.add(f"inbox{INBOX_MARK}", 4, b"four")
    outbox.add_alone("other", b"five")

    sent = outbox.take()

    assert [(subject, parcel.tokens) for subject, parcel in sent] == [
        ("cmd.a", (1, 3)), ("cmd.b", (2,)), (f"inbox{INBOX_MARK}", (4,)), ("other", ()),
    ]  # fmt: skip
    assert outbox.take() == []
    assert outbox.waiting_bytes == 0
