"""Commands, answers and control messages on the wire: exact when ours, InvalidInput when not."""

from __future__ import annotations

import contextlib
import datetime
import enum
import uuid
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from routing import control, jsonlike
from routing.address import ActorId
from routing.control import ManifestRow, MigrationRequest, StepRequest
from routing.envelope import (
    MAX_HOPS,
    MAX_MESSAGE_ID_BYTES,
    Answer,
    Command,
    decode_answer,
    decode_command,
    encode_answer,
    encode_command,
    new_command,
)
from routing.errors import Busy, FerryError, InvalidInput, Moved, PayloadTooLarge, Rejected

MAX_BYTES = 512 * 1024
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
IDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20)
NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,10}", fullmatch=True)
INTEGERS = st.integers(-(2**63), 2**64 - 1)
JSON = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
COMMANDS = st.builds(
    Command,
    actor=st.builds(ActorId, actor_type=NAMES, key=IDS),
    name=NAMES,
    arguments=st.dictionaries(NAMES, JSON, max_size=4),
    message_id=IDS,
    epoch=st.integers(0, 2**53),
    hops=st.integers(0, MAX_HOPS),
    expires_ms=st.integers(0, 2**53),
    linearizable=st.booleans(),
)
IN_SESSIONS = st.builds(
    lambda sent, number, after: replace(sent, session="5-00000000", number=number, after=after),
    COMMANDS,
    st.integers(0, 2**53),
    st.integers(0, 2**53),
)
STEPS = st.builds(
    StepRequest,
    move=NAMES,
    unit=st.integers(0, 65535).map(lambda shard: f"shard.{shard}"),
    epoch=st.integers(1, 2**53),
    source=NAMES,
    destination=NAMES,
    offset=st.integers(0, 2**31),
)
ROWS = st.builds(
    ManifestRow,
    index=st.integers(0, 2**31),
    actor_id=st.builds(lambda kind, key: f"{kind}/{key}", NAMES, IDS),
    version=st.integers(0, 2**53),
    digest=st.from_regex(r"[0-9a-f]{32}", fullmatch=True),
    state_bytes=st.integers(0, 2**40),
    transfer_bytes=st.integers(0, 2**40),
)
MIGRATIONS = st.builds(
    MigrationRequest,
    move=NAMES,
    unit=st.integers(0, 65535).map(lambda shard: f"shard.{shard}"),
    epoch=st.integers(1, 2**53),
    source=NAMES,
    destination=NAMES,
    rows=st.lists(ROWS, max_size=5).map(tuple),
)
NOT_JSON_LIKE = [
    float("nan"),
    float("inf"),
    {1: 2},
    object(),
    {1, 2},
    b"bytes",
    "\ud800",
    2**70,
    datetime.datetime(2013, 1, 1),
    uuid.UUID(int=7),
    enum.Enum("Colour", "RED").RED,  # type: ignore[attr-defined]
    StepRequest(move="m", unit="shard.1", epoch=1, source="a", destination="b"),
]


def command(**changes: Any) -> Command:
    fields: dict[str, Any] = {"actor": ActorId("cart", "7"), "name": "add", "message_id": "m-1", "expires_ms": 10}
    return Command(**{**fields, **changes})


@given(COMMANDS | IN_SESSIONS)
def test_a_command_arrives_as_it_was_sent(sent: Command) -> None:
    """Decoding is the inverse of encoding."""
    assert decode_command(encode_command(sent), max_bytes=MAX_BYTES) == sent


@given(st.builds(Answer, value=JSON, owner=st.none() | NAMES, epoch=st.integers(0, 2**53)))
def test_an_answer_arrives_as_it_was_sent(sent: Answer) -> None:
    """Decoding is the inverse of encoding."""
    assert decode_answer(encode_answer(sent)) == sent


@given(STEPS)
def test_a_step_request_arrives_as_it_was_sent(sent: StepRequest) -> None:
    """Decoding is the inverse of encoding."""
    assert control.read_step_request(control.encode(sent)) == sent


@given(MIGRATIONS)
def test_a_migration_request_arrives_as_it_was_sent(sent: MigrationRequest) -> None:
    """Decoding is the inverse of encoding."""
    assert control.read_migration_request(control.encode(sent)) == sent


@given(st.binary(max_size=60) | JSON.map(orjson.dumps))
def test_garbage_instead_of_a_message_is_invalid_input_and_nothing_else(payload: bytes) -> None:
    """Any other error in a subscription's handler would be a bug in the reader."""
    with pytest.raises(InvalidInput):
        decode_command(payload, max_bytes=MAX_BYTES)
    for read in (control.read_step_request, control.read_migration_request):
        with pytest.raises(InvalidInput):
            read(payload)


def damaged(document: dict[str, Any], field: str, value: Any, drop: bool) -> bytes:
    changed = {**document, field: value}
    if drop:
        del changed[field]
    return orjson.dumps(changed)


@given(st.data(), COMMANDS | IN_SESSIONS, JSON, st.booleans())
def test_a_command_with_one_damaged_field_is_invalid_input_or_well_formed(
    data: st.DataObject, sent: Command, value: Any, drop: bool
) -> None:
    """What passes the door has the types inside relies on."""
    document = orjson.loads(encode_command(sent))
    payload = damaged(document, data.draw(st.sampled_from(sorted(document))), value, drop)

    try:
        read = decode_command(payload, max_bytes=MAX_BYTES)
    except InvalidInput:
        return

    assert isinstance(read.actor, ActorId)
    assert isinstance(read.name, str)
    assert isinstance(read.message_id, str)
    assert isinstance(read.arguments, dict)
    assert [type(number) for number in (read.epoch, read.hops, read.expires_ms)] == [int, int, int]
    assert read.epoch >= 0
    assert read.hops >= 0
    assert isinstance(read.session, str)
    assert [type(number) for number in (read.number, read.after)] == [int, int]
    assert min(read.number, read.after) >= 0
    assert read.session or not (read.number or read.after)
    assert type(read.linearizable) is bool


@pytest.mark.parametrize(
    ("field", "value"),
    [("epoch", 2**63), ("hops", -1), ("expires_ms", 1.5), ("number", 3), ("after", 3), ("session", None),
     ("session", "mine"), ("linearizable", "x")],
)  # fmt: skip
def test_a_field_that_says_nothing_is_invalid_input(field: str, value: Any) -> None:
    """Whatever is not understood is not done in part: a number without its session would be applied out of order."""
    document = orjson.loads(encode_command(command()))

    with pytest.raises(InvalidInput):
        decode_command(orjson.dumps({**document, field: value}), max_bytes=MAX_BYTES)


def test_arguments_are_as_deep_as_what_carries_them_can_be() -> None:
    """What is let in is forwarded, and stored, inside something larger."""
    document = orjson.loads(encode_command(command()))
    deepest: Any = {}
    for _ in range(jsonlike.MAX_NESTING - 2):
        deepest = {"x": deepest}

    assert decode_command(orjson.dumps({**document, "arguments": deepest}), max_bytes=MAX_BYTES).arguments == deepest
    with pytest.raises(InvalidInput, match="nested"):
        decode_command(orjson.dumps({**document, "arguments": {"x": deepest}}), max_bytes=MAX_BYTES)


@pytest.mark.parametrize(
    ("also", "error"), [({"moved": "to b"}, Moved), ({"error": {"kind": "Rejected", "message": "no"}}, Rejected)]
)
def test_an_answer_that_says_two_things_is_no_reply(also: dict[str, Any], error: type[FerryError]) -> None:
    """Nobody writes one; whoever reads it must not take a command for applied."""
    answer = decode_answer(orjson.dumps({"value": 1, **also, "owner": "b", "epoch": 3}))

    assert type(answer.error) is error
    assert answer.value is None


@given(st.data(), JSON, st.booleans(), st.sampled_from([Answer(value=1), Answer(error=Rejected("no")),
       Answer(error=Busy("full")), Answer(error=Moved("to b", owner="b", epoch=3), owner="b", epoch=3)]))  # fmt: skip
def test_an_answer_with_one_damaged_field_is_invalid_input_or_well_formed(
    data: st.DataObject, value: Any, drop: bool, sent: Answer
) -> None:
    """Nobody crashes on what a peer answers."""
    document = orjson.loads(encode_answer(sent))

    try:
        read = decode_answer(damaged(document, data.draw(st.sampled_from(sorted(document))), value, drop))
    except InvalidInput:
        return

    assert read.error is None or isinstance(read.error, FerryError)
    assert read.owner is None or isinstance(read.owner, str)
    assert type(read.epoch) is int


@given(st.binary(max_size=40).filter(lambda payload: payload != b"{}"))
def test_garbage_instead_of_an_answer_is_invalid_input(payload: bytes) -> None:
    """The router translates that; anything else would surprise the caller."""
    with pytest.raises(InvalidInput):
        decode_answer(payload)


@pytest.mark.parametrize("payload", [b"{}", b'{"owner":"a","epoch":3}', b'{"ok":{}}'])
def test_an_object_with_neither_value_nor_error_is_no_answer(payload: bytes) -> None:
    """Reading it as the reply None would report success for a command nobody ran."""
    with pytest.raises(InvalidInput):
        decode_answer(payload)


@pytest.mark.parametrize("retry_after_s", ["soon", [], {}])
def test_an_answer_with_a_damaged_error_is_invalid_input_or_an_error_of_the_tree(retry_after_s: Any) -> None:
    """Also one level deeper: the error within the answer."""
    payload = orjson.dumps({"error": {"kind": "Busy", "message": "full", "retry_after_s": retry_after_s}, "epoch": 0})

    with contextlib.suppress(InvalidInput):
        assert isinstance(decode_answer(payload).error, FerryError)


@given(st.data(), STEPS, JSON, st.booleans())
def test_a_step_request_with_one_damaged_field_is_invalid_input_or_well_formed(
    data: st.DataObject, sent: StepRequest, value: Any, drop: bool
) -> None:
    """A verb's code need not check its request again."""
    document = orjson.loads(control.encode(sent))
    try:
        read = control.read_step_request(damaged(document, data.draw(st.sampled_from(sorted(document))), value, drop))
    except InvalidInput:
        return

    assert all(isinstance(text, str) for text in (read.move, read.unit, read.source, read.destination))
    assert [type(number) for number in (read.epoch, read.offset)] == [int, int]
    assert read.offset >= 0


@given(st.data(), MIGRATIONS.filter(lambda request: request.rows), JSON, st.booleans())
def test_a_manifest_row_with_one_damaged_field_is_invalid_input_or_well_formed(
    data: st.DataObject, sent: MigrationRequest, value: Any, drop: bool
) -> None:
    """Sizes are what the destination allocates by: never negative, never another type."""
    document = orjson.loads(control.encode(sent))
    row = document["rows"][0]
    document["rows"][0] = orjson.loads(damaged(row, data.draw(st.sampled_from(sorted(row))), value, drop))
    try:
        read = control.read_migration_request(orjson.dumps(document))
    except InvalidInput:
        return

    for checked in read.rows:
        numbers = (checked.index, checked.version, checked.state_bytes, checked.transfer_bytes)
        assert [type(number) for number in numbers] == [int] * 4
        assert min(numbers) >= 0


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"state_bytes": -1}, "rows[0].state_bytes: Expected `int` >= 0"),
        ({"version": True}, "rows[0].version: Expected `int`, got `bool`"),
        ({"digest": ""}, "rows[0].digest: Expected `str` of length >= 1"),
        ({"surplus": 1}, "rows[0]: Object contains unknown field `surplus`"),
    ],
)
def test_what_is_wrong_in_a_request_is_told_with_its_place(row: dict[str, Any], told: str) -> None:
    """In one line, after which nobody has to look at the request itself."""
    manifest = {"index": 0, "actor_id": "a/k", "version": 1, "digest": "d", "state_bytes": 1, "transfer_bytes": 1}
    request = {"move": "m", "unit": "shard.1", "epoch": 1, "source": "a", "destination": "b", "rows": [manifest | row]}

    with pytest.raises(InvalidInput) as refusal:
        control.read_migration_request(orjson.dumps(request))

    assert str(refusal.value) == f"request is malformed: {told}"


@pytest.mark.parametrize(
    "value", NOT_JSON_LIKE, ids=lambda value: type(value).__name__ + str(value)[:8].encode("ascii", "replace").decode()
)
def test_arguments_that_json_would_change_or_lose_are_refused(value: Any) -> None:
    """An argument that arrives as something else than was sent is a silent corruption: nan would become None."""
    with pytest.raises(InvalidInput, match="add"):
        new_command(ActorId("cart", "7"), "add", {"x": value}, message_id="m", max_bytes=MAX_BYTES)


@given(size=st.integers(0, 400), spare=st.integers(-3, 3))
def test_a_command_is_refused_before_it_is_sent_when_no_node_could_receive_it(size: int, spare: int) -> None:
    """Whatever is around the arguments counts: the limit is the same as where it is read."""
    arguments = {"x": "y" * size}
    limit = len(encode_command(command(arguments=arguments, expires_ms=0))) + spare

    if spare < 0:
        with pytest.raises(PayloadTooLarge):
            new_command(ActorId("cart", "7"), "add", arguments, message_id="m-1", max_bytes=limit)
    else:
        assert (
            new_command(ActorId("cart", "7"), "add", arguments, message_id="m-1", max_bytes=limit).arguments
            == arguments
        )


def test_a_command_shares_nothing_with_its_caller() -> None:
    """What the caller changes afterwards must not change what is sent again."""
    arguments: dict[str, Any] = {"legs": [1, 2], "note": "x"}
    made = new_command(ActorId("cart", "7"), "add", arguments, message_id="m-1", max_bytes=MAX_BYTES)

    arguments["legs"].append(3)
    arguments["note"] = "y"

    assert made.arguments == {"legs": [1, 2], "note": "x"}


@pytest.mark.parametrize(
    ("name", "message_id"), [(1, "m"), ("add", 1), ("\ud800", "m"), ("add", "\ud800"), ("x" * 201, "m")]
)
def test_names_that_no_node_would_take_are_refused_before_they_are_sent(name: Any, message_id: Any) -> None:
    """A local actor refuses what a remote one would."""
    with pytest.raises(InvalidInput):
        new_command(ActorId("cart", "7"), name, {}, message_id=message_id, max_bytes=MAX_BYTES)


def test_a_command_over_the_limit_is_refused_before_it_is_read() -> None:
    """The limit counts the bytes on the wire; at the limit is fine."""
    payload = encode_command(command(arguments={"x": "y" * 100}))

    assert decode_command(payload, max_bytes=len(payload))
    with pytest.raises(PayloadTooLarge):
        decode_command(payload, max_bytes=len(payload) - 1)


@pytest.mark.parametrize("message_id", ["", "x" * (MAX_MESSAGE_ID_BYTES + 1), "ä" * (MAX_MESSAGE_ID_BYTES // 2 + 1)])
def test_a_message_id_has_a_length_in_bytes(message_id: str) -> None:
    """Ids are kept in every snapshot: an unbounded one is a way to fill the log."""
    document = orjson.loads(encode_command(command()))

    with pytest.raises(InvalidInput):
        decode_command(orjson.dumps({**document, "id": message_id}), max_bytes=MAX_BYTES)


def test_forwarding_counts_a_hop_and_names_the_epoch_it_goes_by() -> None:
    """All else stays: above all the message id and the deadline."""
    sent = command(arguments={"x": 1}, epoch=3, hops=1)

    assert sent.forwarded(9) == command(arguments={"x": 1}, epoch=9, hops=2)


def test_forwarding_never_lowers_the_epoch() -> None:
    """Routes only ever go to higher epochs, whoever forwards."""
    assert command(epoch=9).forwarded(3).epoch == 9


def test_moved_arrives_with_the_owner_and_its_epoch() -> None:
    """That is all a router needs to go on."""
    read = decode_answer(encode_answer(Answer(error=Moved("ask b", owner="b", epoch=4), owner="b", epoch=4)))

    assert isinstance(read.error, Moved)
    assert (read.error.owner, read.error.epoch, read.owner, read.epoch) == ("b", 4, "b", 4)


def test_a_result_or_the_error_comes_back_from_a_verb() -> None:
    """`{"ok"}` is returned, `{"error"}` is raised as what it was."""
    assert control.result_of(control.encode_result({"actors": 3})) == {"actors": 3}
    with pytest.raises(Busy) as refusal:
        control.result_of(control.encode_result(Busy("later", retry_after_s=2.0)))
    assert refusal.value.retry_after_s == 2.0


@given(st.binary(max_size=40) | st.dictionaries(st.sampled_from(["ok", "error"]), JSON).map(orjson.dumps))
def test_whatever_a_verb_answers_is_a_result_or_an_error_of_the_tree(payload: bytes) -> None:
    """A step must be able to tell "retry" from "roll back" whatever the peer sent."""
    with contextlib.suppress(FerryError):
        assert isinstance(control.result_of(payload), dict)


@pytest.mark.parametrize("error", [{"kind": "Busy", "retry_after_s": "soon"}, {"kind": "Busy", "retry_after_s": []}])
def test_a_verbs_damaged_error_is_an_error_of_the_tree(error: dict[str, Any]) -> None:
    """The example that a random search finds too seldom."""
    with pytest.raises(FerryError):
        control.result_of(orjson.dumps({"error": error}))
