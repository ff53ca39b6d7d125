"""The destination's staging: announced, sent in pieces, verified, taken over or forgotten."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.control import ManifestRow, MigrationRequest
from routing.errors import FerryError, InvalidInput, PayloadTooLarge, StateNotPortable, Unavailable, UnknownActorType
from routing.settings import Settings
from runtime.actor import ActorClasses
from runtime.arrivals import StagedActors
from runtime.chunks import chunks_of
from runtime.memory import Limits
from runtime.portable import Portable
from tests.unit.test_portable import Jar, portable
from tests.unit.virtual_time import run_virtually

UNIT = "shard.0"
NOT_ANNOUNCED = (InvalidInput, Unavailable)  # Unavailable where announcing again would help


class Arriving:
    """Three jars on their way to a fresh node; `now_s` is its clock."""

    def __init__(self, sizes: tuple[int, ...] = (1, 50, 400), **settings: Any) -> None:
        self.now_s = 100.0
        self.settings = Settings(shards=1, max_state_bytes=2**20, **settings)
        self.staged = StagedActors(classes=ActorClasses([Jar]), settings=self.settings, clock=lambda: self.now_s)
        draw = random.Random(7)
        self.jars = [
            portable([draw.randrange(2**40) for _ in range(size)], key=f"k{index}") for index, size in enumerate(sizes)
        ]
        self.payloads = [(index, jar.encode()) for index, jar in enumerate(self.jars)]

    def manifest(self, move: str = "m", **changes: Any) -> MigrationRequest:
        rows = tuple(row(index, jar, **changes) for index, jar in enumerate(self.jars))
        return MigrationRequest(move=move, unit=UNIT, epoch=4, source="a", destination="b", rows=rows)

    def chunks(self, move: str = "m", chunk_bytes: int = 100) -> list[bytes]:
        return list(chunks_of(move, self.payloads, chunk_bytes))

    def verify(self, move: str = "m") -> int:
        ready = run_virtually(self.staged.verify(move))
        assert isinstance(ready, int)
        return ready


def row(position: int, jar: Portable, **changes: Any) -> ManifestRow:
    fields: dict[str, Any] = {
        "index": position,
        "actor_id": str(jar.actor_id),
        "version": jar.version,
        "digest": jar.frame.digest,
        "state_bytes": jar.frame.state_bytes,
        "transfer_bytes": len(jar.encode()),
    }
    return ManifestRow(**{**fields, **changes})


@given(st.integers(0, 2**32), st.integers(20, 3000), st.integers(0, 20))
def test_pieces_in_any_order_and_repeated_make_the_same_actors(seed: int, chunk_bytes: int, repeats: int) -> None:
    """Each chunk is idempotent under (move, chunk): NATS gives no order across retries."""
    draw = random.Random(seed)
    arriving = Arriving()
    assert arriving.staged.announce(arriving.manifest()) == [0, 1, 2]
    chunks = arriving.chunks(chunk_bytes=chunk_bytes)
    sent = chunks + draw.choices(chunks, k=repeats)
    draw.shuffle(sent)

    for chunk in sent:
        arriving.staged.receive(chunk)

    assert arriving.verify() == 3
    taken = {live.actor_id.key: live for live in arriving.staged.take(UNIT, "m")}
    assert {key: live.instance.coins for key, live in taken.items()} == {  # type: ignore[union-attr]
        jar.actor_id.key: jar.activate(ActorClasses([Jar]), limits=Limits(8, 8), max_state_bytes=2**20).instance.coins  # type: ignore[union-attr]
        for jar in arriving.jars
    }


@given(st.integers(1, 5000), st.lists(st.binary(max_size=300), max_size=5))
def test_chunks_carry_every_byte_and_stay_small(chunk_bytes: int, payloads: list[bytes]) -> None:
    """About `chunk_bytes` each, header aside."""
    import orjson

    parts: dict[int, dict[int, bytes]] = {}
    for chunk in chunks_of("m", list(enumerate(payloads)), chunk_bytes):
        header, body = chunk.split(b"\n", 1)
        document = orjson.loads(header)
        assert document["move"] == "m"
        assert len(body) <= chunk_bytes
        at = 0
        for index, offset, length in document["pieces"]:
            parts.setdefault(index, {})[offset] = body[at : at + length]
            at += length
        assert at == len(body)

    for index, payload in enumerate(payloads):
        assert b"".join(piece for _, piece in sorted(parts.get(index, {}).items())) == payload


def test_what_is_lacking_is_what_has_not_arrived() -> None:
    """A repeated announcement asks for the rest only: nothing is sent twice."""
    arriving = Arriving()
    assert arriving.staged.announce(arriving.manifest()) == [0, 1, 2]
    for chunk in chunks_of("m", arriving.payloads[:2], 10_000):
        arriving.staged.receive(chunk)

    assert arriving.staged.announce(arriving.manifest()) == [2]


def test_half_an_actor_is_still_lacking() -> None:
    """And cannot be verified: the source sends again."""
    arriving = Arriving()
    arriving.staged.announce(arriving.manifest())
    for chunk in arriving.chunks()[:-1]:
        arriving.staged.receive(chunk)

    assert 2 in arriving.staged.announce(arriving.manifest())
    with pytest.raises(Unavailable):
        arriving.verify()


def test_a_newer_capture_of_an_actor_replaces_the_older() -> None:
    """The source was resumed and paused again under the same move: another version, another digest."""
    arriving = Arriving()
    arriving.staged.announce(arriving.manifest())
    for chunk in arriving.chunks():
        arriving.staged.receive(chunk)
    arriving.verify()
    arriving.jars[0] = portable([5, 5, 5], key="k0", version=10)
    arriving.payloads[0] = (0, arriving.jars[0].encode())

    assert arriving.staged.announce(arriving.manifest()) == [0]
    for chunk in chunks_of("m", arriving.payloads[:1], 100):
        arriving.staged.receive(chunk)

    assert arriving.verify() == 3
    taken = {live.actor_id.key: live for live in arriving.staged.take(UNIT, "m")}
    assert (taken["k0"].version, taken["k0"].instance.coins) == (10, [5, 5, 5])  # type: ignore[union-attr]


def test_a_move_without_actors_is_ready_at_once() -> None:
    """An empty shard moves too."""
    arriving = Arriving(())
    assert arriving.staged.announce(arriving.manifest()) == []

    assert arriving.verify() == 0
    assert arriving.staged.take(UNIT, "m") == []


def test_an_unknown_type_is_refused_when_announced() -> None:
    """Before a byte is sent, naming the type."""
    arriving = Arriving()

    with pytest.raises(UnknownActorType, match="cart"):
        arriving.staged.announce(arriving.manifest(actor_id="cart/7"))


@pytest.mark.parametrize("field", ["state_bytes", "transfer_bytes"])
def test_a_size_over_the_limit_is_refused_when_announced(field: str) -> None:
    """Before anything is allocated: here for a terabyte."""
    arriving = Arriving()

    with pytest.raises(PayloadTooLarge):
        arriving.staged.announce(arriving.manifest(**dict[str, Any]({field: 2**40})))


def test_more_bytes_than_announced_are_not_taken() -> None:
    """A peer that announces little and sends much fills no memory."""
    arriving = Arriving()
    arriving.staged.announce(arriving.manifest(transfer_bytes=10))

    with pytest.raises(InvalidInput):
        for chunk in arriving.chunks():
            arriving.staged.receive(chunk)


def test_what_was_never_announced_is_refused() -> None:
    """Another move, or another index: the source is told, and announces again."""
    arriving = Arriving()
    with pytest.raises(NOT_ANNOUNCED):
        arriving.staged.receive(arriving.chunks()[0])
    arriving.staged.announce(arriving.manifest())

    with pytest.raises(NOT_ANNOUNCED):
        arriving.staged.receive(arriving.chunks("another")[0])
    with pytest.raises(InvalidInput):
        arriving.staged.receive(next(iter(chunks_of("m", [(99, b"x" * 10)], 100))))


@given(st.binary(max_size=60))
def test_a_garbage_chunk_is_invalid_input(payload: bytes) -> None:
    """Or of a move that was never announced, when it is JSON by chance; and nothing else."""
    arriving = Arriving()
    arriving.staged.announce(arriving.manifest())

    with pytest.raises(NOT_ANNOUNCED):
        arriving.staged.receive(payload)


@pytest.mark.parametrize(
    "header",
    [
        b'{"move":"m","pieces":[[0,-5,5]]}',
        b'{"move":"m","pieces":[[0,0,-5]]}',
        b'{"move":"m","pieces":[[0,0,5000]]}',
        b'{"move":"m","pieces":[[0,99999999999,5]]}',
        b'{"move":"m","pieces":[[-1,0,5]]}',
        b'{"move":"m","pieces":[[0,0]]}',
        b'{"move":"m","pieces":[5]}',
        b'{"move":"m","pieces":7}',
        b'{"move":"m"}',
    ],
)
def test_a_chunk_with_impossible_pieces_is_invalid_input(header: bytes) -> None:
    """Negative, overlong or misplaced: nothing is written anywhere it does not belong."""
    arriving = Arriving()
    arriving.staged.announce(arriving.manifest())

    with pytest.raises(InvalidInput):
        arriving.staged.receive(header + b"\nabcde")


@pytest.mark.parametrize(
    ("field", "value"), [("digest", "0" * 32), ("version", 3), ("actor_id", "jar/another"), ("state_bytes", 1)]
)
def test_what_arrived_must_be_what_was_announced(field: str, value: Any) -> None:
    """Another digest, version, name or size than in the manifest: damaged on the way, never activated."""
    arriving = Arriving((3,))
    arriving.staged.announce(arriving.manifest(**dict[str, Any]({field: value})))
    for chunk in arriving.chunks():
        arriving.staged.receive(chunk)

    with pytest.raises((StateNotPortable, Unavailable)):
        arriving.verify()
    assert arriving.staged.take(UNIT, "m") == []


def test_a_damaged_body_is_not_portable() -> None:
    """One byte of the state changed on its way."""
    arriving = Arriving((3,))
    arriving.staged.announce(arriving.manifest())
    damaged = bytearray(arriving.payloads[0][1])
    damaged[-3] ^= 1
    for chunk in chunks_of("m", [(0, bytes(damaged))], 100):
        arriving.staged.receive(chunk)

    with pytest.raises(StateNotPortable):
        arriving.verify()


def test_verifying_twice_says_the_same() -> None:
    """Celery runs steps twice."""
    arriving = Arriving()
    arriving.staged.announce(arriving.manifest())
    for chunk in arriving.chunks():
        arriving.staged.receive(chunk)

    assert (arriving.verify(), arriving.verify()) == (3, 3)


def test_a_move_nobody_announced_cannot_be_verified() -> None:
    """The staging was lost with a restart: the source sends again."""
    with pytest.raises(Unavailable):
        Arriving().verify("lost")


def test_only_verified_actors_are_handed_over_and_only_once() -> None:
    """What was not verified is left to the log."""
    arriving = Arriving()
    arriving.staged.announce(arriving.manifest())
    for chunk in arriving.chunks():
        arriving.staged.receive(chunk)
    assert arriving.staged.take(UNIT, "m") == []

    arriving.staged.announce(arriving.manifest())
    for chunk in arriving.chunks():
        arriving.staged.receive(chunk)
    arriving.verify()
    assert arriving.staged.take("shard.1", "m") == []
    assert arriving.staged.take(UNIT, "another") == []


def test_taking_over_twice_gives_nothing_the_second_time() -> None:
    """Two live instances of one actor would be one too many."""
    arriving = Arriving()
    arriving.staged.announce(arriving.manifest())
    for chunk in arriving.chunks():
        arriving.staged.receive(chunk)
    arriving.verify()

    assert len(arriving.staged.take(UNIT, "m")) == 3
    assert arriving.staged.take(UNIT, "m") == []


@pytest.mark.parametrize("named", [None, "another"])
def test_what_the_map_does_not_name_is_forgotten(named: str | None) -> None:
    """The move was aborted, or another one began."""
    arriving = Arriving()
    arriving.staged.announce(arriving.manifest())

    arriving.staged.forget_unless(UNIT, named)

    with pytest.raises(NOT_ANNOUNCED):
        arriving.staged.receive(arriving.chunks()[0])


def test_what_the_map_names_is_kept_and_other_units_are_left_alone() -> None:
    """News about one unit says nothing about the next."""
    arriving = Arriving()
    arriving.staged.announce(arriving.manifest())

    arriving.staged.forget_unless(UNIT, "m")
    arriving.staged.forget_unless("shard.1", None)

    for chunk in arriving.chunks():
        arriving.staged.receive(chunk)
    assert arriving.verify() == 3


def test_a_silent_move_is_forgotten_after_a_lock_lease_and_not_before() -> None:
    """Each sign of life starts the time again."""
    arriving = Arriving()
    arriving.staged.announce(arriving.manifest())
    chunks = arriving.chunks()
    lease_s = arriving.settings.lock_lease_s

    arriving.now_s += lease_s - 1
    arriving.staged.forget_silent()
    arriving.staged.receive(chunks[0])
    arriving.now_s += lease_s - 1
    arriving.staged.forget_silent()
    arriving.staged.receive(chunks[1])
    arriving.now_s += lease_s + 1
    arriving.staged.forget_silent()

    with pytest.raises(NOT_ANNOUNCED):
        arriving.staged.receive(chunks[2])


def test_two_moves_arrive_side_by_side() -> None:
    """Of two units; neither disturbs the other."""
    arriving = Arriving()
    one = arriving.manifest("m")
    other = MigrationRequest(move="n", unit="shard.1", epoch=9, source="c", destination="b", rows=one.rows)
    arriving.staged.announce(one)
    arriving.staged.announce(other)

    for first, second in zip(arriving.chunks("m"), arriving.chunks("n"), strict=True):
        arriving.staged.receive(first)
        arriving.staged.receive(second)

    assert (arriving.verify("m"), arriving.verify("n")) == (3, 3)
    assert len(arriving.staged.take("shard.1", "n")) == 3
    assert len(arriving.staged.take(UNIT, "m")) == 3


@given(st.sampled_from(["index", "version", "state_bytes", "transfer_bytes"]), st.integers(-5, 5))
def test_a_manifest_with_strange_numbers_is_taken_or_an_error_of_the_tree(field: str, value: int) -> None:
    """A peer's mistake is answered, not crashed on."""
    arriving = Arriving((3,))
    try:
        arriving.staged.announce(arriving.manifest(**dict[str, Any]({field: value})))
        for chunk in arriving.chunks():
            arriving.staged.receive(chunk)
        arriving.verify()
    except FerryError:
        pass
