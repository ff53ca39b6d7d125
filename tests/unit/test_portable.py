"""An actor on its way: complete when it arrives, refused when it is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.address import ActorId
from routing.errors import FerryError, InvalidInput, PayloadTooLarge, StateNotPortable, UnknownActorType
from runtime.actor import Actor, ActorClasses, command, event
from runtime.codec import capture_state, pack
from runtime.memory import Limits
from runtime.portable import Portable

MAX_BYTES = 2**20
LIMITS: dict[str, Any] = {"limits": Limits(8, 8), "max_state_bytes": MAX_BYTES}


class Jar(Actor):
    actor_type = "jar"

    def __init__(self) -> None:
        self.coins: list[int] = []

    @command
    def drop(self, *, coin: int) -> int:
        self.emit("dropped", coin=coin)
        return len(self.coins)

    @event
    def dropped(self, coin: int) -> None:
        self.coins.append(coin)


CLASSES = ActorClasses([Jar])


def portable(coins: list[int], **changes: Any) -> Portable:
    jar = Jar()
    jar.coins = coins
    actor_id = ActorId("jar", changes.pop("key", "k"))
    fields: dict[str, Any] = {
        "actor_id": actor_id,
        "version": 9,
        "epoch": 4,
        "trail": (7, 8),
        "memory": {
            "commands": [["m-1", 1], ["m-2", None, {"kind": "Rejected", "message": "no"}]],
            "sessions": {"floor": 3, "known": [["5-00000000", 2, [[1, "one"], [2, None, {"kind": "Rejected"}]]]]},
        },
        "frame": pack(capture_state(jar), schema=1, max_bytes=MAX_BYTES, actor=actor_id),
    }
    return Portable(**{**fields, **changes})


@given(
    st.lists(st.integers(-(2**53), 2**53), max_size=300),
    st.integers(0, 2**53),
    st.lists(st.integers(1, 2**53), max_size=5).map(tuple),
)
def test_an_actor_arrives_as_it_left(coins: list[int], version: int, trail: tuple[int, ...]) -> None:
    """Decoding is the inverse of encoding, large or small."""
    sent = portable(coins, version=version, trail=trail)

    assert Portable.decode(sent.encode()) == sent


def test_an_activated_actor_goes_on_where_the_other_stopped() -> None:
    """State, version, and what it has answered."""
    live = portable([1, 2]).activate(CLASSES, **LIMITS)

    assert isinstance(live.instance, Jar)
    assert (live.actor_id, live.version, live.instance.coins) == (ActorId("jar", "k"), 9, [1, 2])
    assert live.instance.actor_id == ActorId("jar", "k")


def test_what_this_nodes_code_cannot_take_over_is_refused() -> None:
    """Each reason is an error of its own, found before anything is served."""
    with pytest.raises(UnknownActorType):
        portable([1]).activate(ActorClasses(), **LIMITS)
    with pytest.raises(PayloadTooLarge):
        portable([1] * 100).activate(CLASSES, **{**LIMITS, "max_state_bytes": 10})
    with pytest.raises(StateNotPortable):
        newer = portable([1])
        replace(newer, frame=replace(newer.frame, schema=2)).activate(CLASSES, **LIMITS)
    with pytest.raises(StateNotPortable):
        damaged = portable([1])
        replace(damaged, frame=replace(damaged.frame, body=b'{"coins":[2]}')).activate(CLASSES, **LIMITS)


@given(st.binary(max_size=80))
def test_garbage_is_invalid_input(payload: bytes) -> None:
    """And nothing else."""
    with pytest.raises(InvalidInput):
        Portable.decode(payload)


@given(st.data())
def test_a_cut_or_changed_transfer_is_an_error_of_the_tree_or_the_same_actor(data: st.DataObject) -> None:
    """Whatever one byte does: noticed at once or when activated; the state is never another one."""
    sent = portable([1, 2, 3])
    payload = bytearray(sent.encode())
    position = data.draw(st.integers(0, len(payload) - 1))
    if data.draw(st.booleans()):
        del payload[position:]
    else:
        payload[position] = data.draw(st.integers(0, 255))

    try:
        live = Portable.decode(bytes(payload)).activate(CLASSES, **LIMITS)
    except FerryError:
        return

    assert isinstance(live.instance, Jar)
    assert live.instance.coins == [1, 2, 3]


@pytest.mark.parametrize(
    "field", ["actor", "memory", "trail", "version", "epoch", "schema", "codec", "bytes", "digest"]
)
def test_a_header_with_a_wrong_field_is_an_error_of_the_tree(field: str) -> None:
    """What a buggy or newer peer may send must not be an AttributeError in the node."""
    header, body = portable([1]).encode().split(b"\n", 1)
    escaped = []

    values: tuple[Any, ...] = (None, 7.5, "x", [[]], [[1]], [["m"]], {"a": 1}, True)
    for value in values:
        document = {**orjson.loads(header), field: value}
        try:
            Portable.decode(orjson.dumps(document) + b"\n" + body).activate(CLASSES, **LIMITS)
        except FerryError:
            continue
        except Exception as error:
            escaped.append((value, repr(error)))

    assert escaped == []
