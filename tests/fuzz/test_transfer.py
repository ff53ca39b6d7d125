"""Chunks of state on their way: whatever arrives between them, a destination refuses it in order and stays usable."""

from __future__ import annotations

import asyncio
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.address import ActorId
from routing.control import ManifestRow, MigrationRequest
from routing.errors import InvalidInput, StateNotPortable, Unavailable
from routing.settings import Settings
from runtime.actor import ActorClasses
from runtime.arrivals import StagedActors
from runtime.chunks import chunks_of
from runtime.codec import digest_of, join, pack
from runtime.memory import Limits, Memory
from runtime.portable import Portable
from tests.fuzz.effort import fuzz
from tests.fuzz.refusals import assert_orderly
from tests.fuzz.strategies import garbage
from tests.fuzz.tally import TALLY
from tests.unit.cluster import UNIT, Ledger

MOVE, CHUNK_BYTES = "m1", 200
STATES = [
    b'{"entries":[],"closed":false}', b'{"entries":["' + b"x" * 500 + b'"],"closed":true}',
    b'{"entries":[1],"closed":false}',
]  # fmt: skip


def _portable(index: int) -> Portable:
    actor, state = ActorId("ledger", f"k{index}"), STATES[index]
    frame = pack(state, schema=1, max_bytes=10_000, actor=actor)
    memory = Memory(Limits(8, 8)).to_document()
    return Portable(actor_id=actor, version=index + 1, epoch=1, trail=(index + 1,), memory=memory, frame=frame)


PAYLOADS = [_portable(index).encode() for index in range(len(STATES))]
CHUNKS = list(chunks_of(MOVE, list(enumerate(PAYLOADS)), CHUNK_BYTES))
ROWS = tuple(
    ManifestRow(
        index=index, actor_id=f"ledger/k{index}", version=index + 1, digest=digest_of(state), state_bytes=len(state),
        transfer_bytes=len(PAYLOADS[index]),
    )
    for index, state in enumerate(STATES)
)  # fmt: skip
MANIFEST = MigrationRequest(move=MOVE, unit=UNIT, epoch=1, source="a", destination="b", rows=ROWS)


def _announced() -> StagedActors:
    staged = StagedActors(classes=ActorClasses([Ledger]), settings=Settings(), clock=lambda: 0.0)
    assert staged.announce(MANIFEST) == [0, 1, 2]
    return staged


@fuzz
@given(st.lists(garbage(st.sampled_from(CHUNKS)), min_size=1, max_size=3))
def test_garbage_among_the_chunks_is_refused_and_never_becomes_an_actor(
    runner: asyncio.Runner, rubbish: list[bytes]
) -> None:
    """Each piece of rubbish is refused or fits what was announced; then the real chunks come.

    Either every actor is ready with its own state, or the whole move is refused: nothing damaged is ever taken over.
    """
    TALLY.tried("chunks damaged")
    staged = _announced()

    tracemalloc.start()
    for payload in rubbish:
        try:
            staged.receive(payload)
        except (InvalidInput, Unavailable) as error:
            TALLY.refused(error)
            assert_orderly(error)
        else:
            TALLY.read += 1
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most_bytes < 2**20
    for chunk in CHUNKS:
        staged.receive(chunk)

    whole = True
    try:
        assert runner.run(staged.verify(MOVE)) == len(STATES)
    except (StateNotPortable, Unavailable) as error:
        assert_orderly(error)
        whole = False

    taken = {live.actor_id.key: vars(live.instance)["entries"] for live in staged.take(UNIT, MOVE)}
    sent = {"k0": [], "k1": ["x" * 500], "k2": [1]}
    assert taken == sent if whole else all(sent[key] == entries for key, entries in taken.items())


def test_the_chunks_alone_become_the_actors(runner: asyncio.Runner) -> None:
    """What the test above disturbs works when nothing disturbs it."""
    staged = _announced()

    for chunk in CHUNKS:
        staged.receive(chunk)

    assert runner.run(staged.verify(MOVE)) == len(STATES)


def test_a_piece_of_no_bytes_does_not_take_the_memory_of_a_whole_actor() -> None:
    """An actor's memory is taken with its first bytes: an empty piece brings none, however large the actor."""
    row = ManifestRow(index=0, actor_id="ledger/k", version=1, digest="x", state_bytes=2**27, transfer_bytes=2**27)
    staged = StagedActors(classes=ActorClasses([Ledger]), settings=Settings(), clock=lambda: 0.0)
    staged.announce(MigrationRequest(move=MOVE, unit=UNIT, epoch=1, source="a", destination="b", rows=(row,)))

    tracemalloc.start()
    with pytest.raises(InvalidInput):
        staged.receive(join({"move": MOVE, "pieces": [[0, 0, 0]]}, b""))
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert most_bytes < 2**20


@fuzz
@given(garbage(st.just(PAYLOADS[1])))
def test_a_damaged_transfer_is_never_an_actor_with_another_state(runner: asyncio.Runner, payload: bytes) -> None:
    """What arrives whole but damaged is refused when it is verified, before it could be taken over."""
    TALLY.tried("transfers damaged")
    row = ManifestRow(
        index=0, actor_id="ledger/k1", version=2, digest=digest_of(STATES[1]), state_bytes=len(STATES[1]),
        transfer_bytes=len(payload),
    )  # fmt: skip
    staged = StagedActors(classes=ActorClasses([Ledger]), settings=Settings(), clock=lambda: 0.0)
    staged.announce(MigrationRequest(move=MOVE, unit=UNIT, epoch=1, source="a", destination="b", rows=(row,)))
    for chunk in chunks_of(MOVE, [(0, payload)], CHUNK_BYTES):
        staged.receive(chunk)

    try:
        runner.run(staged.verify(MOVE))
    except StateNotPortable as error:
        TALLY.refused(error)
        assert_orderly(error)
    except Unavailable:
        assert payload == b""
    else:
        TALLY.read += 1
        [live] = staged.take(UNIT, MOVE)
        assert (vars(live.instance)["entries"], live.version) == (["x" * 500], 2)
