"""State to bytes and back: what is carried, what is refused, and what is noticed."""

from __future__ import annotations

import collections
import contextlib
import enum
import os
import random
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from marshmallow import Schema, fields

from routing.address import ActorId
from routing.errors import FerryError, InvalidInput, PayloadTooLarge, StateNotPortable
from routing.typed import reader
from runtime.actor import Actor
from runtime.codec import (
    COMPRESS_FROM_BYTES,
    Frame,
    FrameHeader,
    bytes_of_plain,
    capture_state,
    digest_of,
    frame_header,
    frame_of,
    join,
    pack,
    restore_state,
    split,
    unpack,
)

ACTOR = ActorId("bag", "7")
MAX_BYTES = 2**20
read_header = reader(FrameHeader, "header")
TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


class Bag(Actor):
    actor_type = "bag"

    def __init__(self) -> None:
        self.content: Any = None
        self.count = 0
        self._cache = "not state"


PLAIN = JSON | st.integers(-(2**70), 2**70) | st.text(max_size=4) | st.just(object()) | st.just(1j)


class Loose(Actor):
    """Whatever attributes it is given."""

    actor_type = "loose"


@given(st.dictionaries(st.text(max_size=4), PLAIN, max_size=4))
def test_a_state_that_a_look_finds_plain_can_be_captured(attributes: dict[str, Any]) -> None:
    """It stands in for encoding it after every command: what it lets through must not fail later, in a move."""
    loose = Loose()
    vars(loose).update(attributes)

    size = bytes_of_plain(loose)

    if size is not None:
        state = capture_state(loose)
        assert abs(len(state) - size) <= 12 * len(attributes) + 2


def test_numbers_and_text_are_found_plain_and_nothing_else_is() -> None:
    """Otherwise the look would be in vain."""
    bag = Bag()

    for content, plain in (
        (7, True),
        ("tea", True),
        (None, True),
        (True, True),
        ([], False),
        ({}, False),
        (1.5, False),
    ):
        bag.content = content
        assert (bytes_of_plain(bag) is not None) == plain


class Point:
    def __init__(self, x: int) -> None:
        self.x = x


class PointSchema(Schema):
    x = fields.Integer(required=True)


class TrackSchema(Schema):
    points = fields.List(fields.Nested(PointSchema), required=True)
    at = fields.AwareDateTime(allow_none=True)


class Track(Actor):
    actor_type = "track"
    state_schema = TrackSchema

    def __init__(self) -> None:
        self.points: list[dict[str, int]] = []
        self.at = None


class Blob(Actor):
    actor_type = "blob"

    def __init__(self) -> None:
        self.pixels = bytearray()

    def capture(self) -> bytes:
        return bytes(self.pixels)

    def restore(self, data: bytes) -> None:
        self.pixels = bytearray(data)


class Account(Actor):
    """Version 3 of a class: cents instead of euros since 2, a currency since 3."""

    actor_type = "account"
    schema_version = 3

    def __init__(self) -> None:
        self.cents = 0
        self.currency = "EUR"

    def upgrade(self, state: Any, from_version: int) -> Any:
        if from_version < 2:
            state = {"cents": state["euros"] * 100}
        return {**state, "currency": "EUR"}


def round_trip(instance: Actor) -> Actor:
    return restore_state(type(instance), capture_state(instance), type(instance).schema_version)


def bag(content: Any) -> Bag:
    filled = Bag()
    filled.content = content
    return filled


@given(JSON)
def test_public_attributes_are_the_state(content: Any) -> None:
    """What JSON can say comes back as it was; private attributes are as a fresh instance has them."""
    filled = bag(content)
    filled._cache = "changed"

    again = round_trip(filled)

    assert isinstance(again, Bag)
    assert (again.content, again.count, again._cache) == (content, 0, "not state")
    assert capture_state(again) == capture_state(filled)


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, b"bytes", {1: "a"}, Point(1), "\ud800", 2**80, lambda: None, float("nan"), float("inf")],
    ids=lambda value: type(value).__name__ + str(value)[:4].encode("ascii", "replace").decode(),
)
def test_state_that_cannot_be_encoded_names_the_attribute(value: Any) -> None:
    """Also when it would only be changed on the way: a NaN that arrives as None is lost state."""
    for content in (value, [value], {"deep": [value]}):
        with pytest.raises(StateNotPortable, match="content"):
            capture_state(bag(content))


def test_state_that_json_would_turn_into_something_else_is_refused_or_comes_back_equal() -> None:
    """A date, a tuple, an enum member or a dataclass that silently becomes a string changes under the actor's feet."""
    import datetime
    import enum
    import uuid

    colour = enum.Enum("colour", "RED")
    frame = Frame(schema=1, codec="raw", state_bytes=0, digest="", body=b"")
    for value in (
        datetime.datetime(2013, 1, 1),
        datetime.date(2013, 1, 1),
        uuid.UUID(int=1),
        colour["RED"],
        replace(frame, schema=2),
    ):
        try:
            again = round_trip(bag(value))
        except StateNotPortable:
            continue
        assert isinstance(again, Bag)
        assert again.content == value, type(value)


class Phase(enum.StrEnum):
    RUNNING = "running"


@pytest.mark.parametrize("value", [(1, 2), Phase.RUNNING, collections.defaultdict(list), collections.Counter("ab")])
def test_state_that_would_only_look_the_same_is_refused(value: Any) -> None:
    """It compares equal after JSON, or nearly, but the same code behaves otherwise: `is`, a default, a comparison."""
    for content in (value, [value], {"deep": [value]}):
        with pytest.raises(StateNotPortable, match="content"):
            capture_state(bag(content))


def test_state_that_its_own_schema_would_refuse_is_found_out_at_the_source() -> None:
    """Not at the destination, or after a crash, when nobody has the instance any more."""

    class OneWaySchema(Schema):
        total = fields.Integer(dump_only=True)

    class OneWay(Actor):
        actor_type = "one_way"
        state_schema = OneWaySchema

        def __init__(self) -> None:
            self.total = 1

    with pytest.raises(StateNotPortable, match="total"):
        capture_state(OneWay())


def test_an_upgraded_class_keeps_its_defaults_for_what_older_state_lacks() -> None:
    """`upgrade` need not repeat what `__init__` says about an attribute that is new."""

    class Grown(Bag):
        actor_type = "grown"
        schema_version = 2

        def __init__(self) -> None:
            super().__init__()
            self.added = "default"

        def upgrade(self, state: Any, from_version: int) -> Any:
            return state

    again = restore_state(Grown, b'{"content":1,"count":2}', 1)

    assert vars(again) == {"content": 1, "count": 2, "_cache": "not state", "added": "default"}


def test_a_deeply_nested_state_is_carried_or_refused_but_does_not_crash() -> None:
    """Recursion limits are an error of the tree here, not a RecursionError in the mailbox."""
    deep: Any = []
    for _ in range(5000):
        deep = [deep]

    with pytest.raises(StateNotPortable):
        capture_state(bag(deep))
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(StateNotPortable):
        capture_state(bag(circle))


def test_equal_state_has_equal_bytes_whatever_the_order_of_attributes() -> None:
    """Otherwise digests of the live and of the replayed instance would differ."""
    one, other = Bag(), Bag()
    one.content, one.count = {"a": 1, "b": 2}, 3
    other.count, other.content = 3, {"b": 2, "a": 1}
    del other.__dict__["content"]
    other.content = {"b": 2, "a": 1}

    assert capture_state(one) == capture_state(other)


def test_an_attribute_added_later_is_state_too() -> None:
    """Set by an event, not by __init__."""
    filled = Bag()
    filled.extra = [1]  # type: ignore[attr-defined]

    assert round_trip(filled).extra == [1]  # type: ignore[attr-defined]


def test_an_attribute_the_class_gained_keeps_its_default() -> None:
    """State captured before `content` existed is taken over by the class that has it; deleting is not how to say so."""
    older = Bag()
    older.count = 3
    del older.content

    again = round_trip(older)

    assert (again.count, again.content) == (3, Bag().content)


def test_a_schema_says_what_the_state_is() -> None:
    """Types JSON does not have travel through it."""
    import datetime

    track = Track()
    track.points = [{"x": 1}, {"x": 2}]
    track.at = datetime.datetime(2013, 1, 1, tzinfo=datetime.UTC)  # type: ignore[assignment]

    again = round_trip(track)

    assert isinstance(again, Track)
    assert (again.points, again.at) == (track.points, track.at)
    assert capture_state(again) == capture_state(track)


def test_state_that_its_schema_refuses_is_not_portable() -> None:
    """On the way in: damaged, or of another class."""
    for state in (b'{"points":[{"x":"no"}]}', b"{}", b"[]", b'{"points":[],"surprise":1}'):
        with pytest.raises(StateNotPortable):
            restore_state(Track, state, 1)


def test_a_schema_that_cannot_dump_the_state_is_not_portable() -> None:
    """On the way out."""
    track = Track()
    track.points = [object()]  # type: ignore[list-item]

    with pytest.raises(StateNotPortable):
        capture_state(track)


@given(st.binary(max_size=3000))
def test_a_class_may_carry_its_own_bytes(pixels: bytes) -> None:
    """Any bytes, newlines and all."""
    blob = Blob()
    blob.pixels = bytearray(pixels)

    again = round_trip(blob)

    assert isinstance(again, Blob)
    assert again.pixels == pixels


class Broken(Blob):
    """Its own code fails, or captures something else than bytes."""

    actor_type = "broken"
    captured: Any = None

    def capture(self) -> bytes:
        if self.captured is None:
            raise ZeroDivisionError("a mistake in capture")
        return self.captured  # type: ignore[no-any-return]

    def restore(self, data: bytes) -> None:
        raise ZeroDivisionError("a mistake in restore")


@pytest.mark.parametrize("captured", ["not bytes", 7, None])
def test_a_capture_that_fails_is_not_portable(captured: Any) -> None:
    """Whatever the actor's own code raises, or returns instead of bytes."""
    broken = Broken()
    broken.captured = captured

    with pytest.raises(StateNotPortable):
        capture_state(broken)


def test_a_restore_that_fails_is_not_portable() -> None:
    """Whatever the actor's own code raises."""
    with pytest.raises(StateNotPortable):
        restore_state(Broken, b"", 1)


@pytest.mark.parametrize(
    ("state", "version", "cents"),
    [(b'{"euros":3}', 1, 300), (b'{"cents":7}', 2, 7), (b'{"cents":8,"currency":"CHF"}', 3, 8)],
)
def test_a_newer_class_takes_over_older_state(state: bytes, version: int, cents: int) -> None:
    """`upgrade` runs for older versions only."""
    account = restore_state(Account, state, version)

    assert isinstance(account, Account)
    assert account.cents == cents
    assert account.currency == ("CHF" if version == 3 else "EUR")


@pytest.mark.parametrize("version", [4, 100])
def test_state_of_a_newer_class_is_refused(version: int) -> None:
    """A destination that was not deployed yet says so in `verify`, before anything is lost."""
    with pytest.raises(StateNotPortable, match=str(version)):
        restore_state(Account, b'{"cents":1,"currency":"EUR"}', version)


def test_an_upgrade_that_fails_is_not_portable() -> None:
    """Whatever it raises."""
    with pytest.raises(StateNotPortable):
        restore_state(Account, b'{"pounds":3}', 1)


def test_a_class_without_upgrade_refuses_older_state_or_takes_it_as_it_is() -> None:
    """It never half-applies it."""

    class Later(Bag):
        actor_type = "later"
        schema_version = 2

    try:
        again = restore_state(Later, b'{"content":1,"count":2}', 1)
    except StateNotPortable:
        return
    assert (again.content, again.count) == (1, 2)  # type: ignore[attr-defined]


@given(st.binary(max_size=40))
def test_damaged_state_is_not_portable_or_a_whole_instance(state: bytes) -> None:
    """No other error escapes."""
    with contextlib.suppress(StateNotPortable):
        assert isinstance(restore_state(Bag, state, 1), Bag)


@given(st.binary(max_size=200) | st.binary(min_size=1, max_size=8).map(lambda piece: piece * 1000))
def test_a_frame_is_unpacked_to_the_state_that_was_packed(state: bytes) -> None:
    """Compressed or not, over the wire or not."""
    frame = pack(state, schema=2, max_bytes=MAX_BYTES, actor=ACTOR)

    line, body = split(join(frame_header(frame), frame.body))

    assert frame_of(read_header(line), body) == frame
    assert unpack(frame, max_bytes=MAX_BYTES) == state
    assert (frame.schema, frame.state_bytes, frame.digest) == (2, len(state), digest_of(state))


def test_compression_happens_where_it_pays() -> None:
    """Large and regular shrinks; small or random stays as it is."""
    regular, random = b"ab" * 50_000, os.urandom(100_000)

    assert len(pack(regular, schema=1, max_bytes=MAX_BYTES, actor=ACTOR).body) < len(regular) / 10
    assert len(pack(random, schema=1, max_bytes=MAX_BYTES, actor=ACTOR).body) <= len(random)
    assert pack(b"a" * (COMPRESS_FROM_BYTES - 1), schema=1, max_bytes=MAX_BYTES, actor=ACTOR).codec == "raw"


def test_the_digest_is_of_the_state_whatever_the_codec() -> None:
    """Equal state, equal digest; one byte more, another."""
    state = b"ab" * 5000

    assert digest_of(state) == digest_of(bytes(state)) != digest_of(state + b"a")
    assert len(digest_of(b"")) == 32


def test_a_state_over_the_limit_is_refused_on_both_sides() -> None:
    """At the limit is fine; the message names the actor."""
    state = b"a" * 5000
    frame = pack(state, schema=1, max_bytes=5000, actor=ACTOR)

    assert unpack(frame, max_bytes=5000) == state
    with pytest.raises(PayloadTooLarge, match="bag/7"):
        pack(state, schema=1, max_bytes=4999, actor=ACTOR)
    with pytest.raises(PayloadTooLarge):
        unpack(frame, max_bytes=4999)


def test_a_bomb_is_refused_however_small_it_claims_to_be() -> None:
    """A header that lies about the size must not make the destination allocate what the body expands to."""
    frame = pack(b"\0" * MAX_BYTES, schema=1, max_bytes=MAX_BYTES, actor=ACTOR)
    assert len(frame.body) < 1000

    for lie in (0, 10, 1000):
        with pytest.raises((StateNotPortable, PayloadTooLarge)):
            unpack(replace(frame, state_bytes=lie), max_bytes=1000)


def test_a_body_that_claims_an_impossible_size_is_refused_before_anything_is_allocated() -> None:
    """zstandard's own header says an exabyte, ours says little: a flipped bit must not be a MemoryError."""
    claims_an_exabyte = b"\x28\xb5\x2f\xfd\xe0" + (2**60).to_bytes(8, "little") + b"\x01\x00\x00"
    frame = Frame(schema=1, codec="zstd", state_bytes=10, digest=digest_of(b""), body=claims_an_exabyte)

    with pytest.raises((StateNotPortable, PayloadTooLarge)):
        unpack(frame, max_bytes=MAX_BYTES)


@given(st.data())
def test_a_damaged_frame_is_noticed(data: st.DataObject) -> None:
    """One bit anywhere in the body, or a wrong digest, size or codec: never a wrong state."""
    state = b"some state " * data.draw(st.sampled_from([3, 300]))
    frame = pack(state, schema=1, max_bytes=MAX_BYTES, actor=ACTOR)
    position = data.draw(st.integers(0, len(frame.body) * 8 - 1))
    flipped = bytearray(frame.body)
    flipped[position // 8] ^= 1 << position % 8

    for damaged in (
        replace(frame, body=bytes(flipped)),
        replace(frame, body=frame.body[:-1]),
        replace(frame, body=frame.body + b"x"),
        replace(frame, digest=digest_of(b"other")),
        replace(frame, state_bytes=frame.state_bytes + 1),
        replace(frame, codec="zstd" if frame.codec == "raw" else "raw"),
        replace(frame, codec="brotli"),
    ):
        try:
            read = unpack(damaged, max_bytes=MAX_BYTES)
        except (StateNotPortable, PayloadTooLarge):
            continue
        assert read == state, "a wrong state went unnoticed"


@given(st.binary(max_size=60))
def test_garbage_instead_of_a_frame_is_invalid_input(payload: bytes) -> None:
    """And nothing else."""
    try:
        line, body = split(payload)
        frame_of(read_header(line), body)
    except InvalidInput:
        return
    raise AssertionError("accepted")


@given(st.sampled_from(["schema", "codec", "bytes", "digest"]), JSON, st.booleans())
def test_a_header_with_one_damaged_field_is_an_error_of_the_tree(field: str, value: Any, drop: bool) -> None:
    """Whether it is noticed when read or when unpacked."""
    state = b"some state"
    header = {**frame_header(pack(state, schema=1, max_bytes=MAX_BYTES, actor=ACTOR)), field: value}
    if drop:
        del header[field]

    with contextlib.suppress(FerryError):
        assert unpack(frame_of(read_header(orjson.dumps(header)), state), max_bytes=MAX_BYTES) == state


@pytest.mark.parametrize("size_bytes", [0, 1, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20 + 17])
def test_a_large_body_survives_join_and_split(size_bytes: int) -> None:
    """It is copied in pieces; none is lost or doubled at their seams, from bytes or from a bytearray."""
    body = random.Random(size_bytes).randbytes(size_bytes)

    joined = join({"a": 1}, body)

    assert joined == b'{"a":1}\n' + body
    assert split(joined) == split(bytearray(joined)) == (b'{"a":1}\n', body)
    assert type(split(bytearray(joined))[1]) is bytes
