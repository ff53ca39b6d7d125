"""Valid values of every message and stored document, made from their classes; and bytes that are anything but.

A field is drawn by its name where the name says more than its type, so that a new field of a message is covered here
as soon as it exists.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from enum import StrEnum
from typing import Any

import orjson
from hypothesis import strategies as st
from msgspec import Struct, structs

from routing import errors
from routing.address import ActorId
from routing.control import ManifestRow
from routing.envelope import Answer, Command
from routing.errors import FerryError
from routing.settings import Settings
from routing.shard_map import LastMove, Ownership
from runtime.codec import Frame, digest_of, pack
from runtime.journal import Kind, Record
from runtime.memory import Limits, Memory
from workflows.records import STEPS

MOST = 2**53  # beyond it JSON readers of other languages round; ours take 64 bits

# Drawn from lists rather than made letter by letter: a draw costs more than most readers take to read.
TEXT = st.sampled_from(["", "a", "é/ü", "\x00", "\n", "\r\n", "𝄞", "\u2028", '"', "\\", "x" * 200, "null", "𐀀" * 50])
NAMES = st.sampled_from(["a", "b", "n_7", "flight", "m0123456789ab", "p0123456789ab", "shard.0", "x" * 60])
ACTOR_TYPES = st.sampled_from(["a", "ledger", "n_7", "x" * 63])
NODES = st.sampled_from(["a", "b", "node-1", "N14228"])
SESSIONS = st.sampled_from(["0-00000000", "7-0123456789abcdef", "1764000000000-3f9c2a71d5e80b46", f"9-{'f' * 32}"])
ACTOR_IDS = st.builds(ActorId, ACTOR_TYPES, st.sampled_from(["k", "N14228", "é/ü.*>", " ", "x" * 128]))
COUNTS = st.integers(0, MOST)
NUMBERS = st.floats(0, 1e15, allow_nan=False)
_DEEP: list[Any] = []
for _ in range(100):
    _DEEP = [_DEEP]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False, allow_infinity=False), TEXT
)
JSON = st.one_of(
    SCALARS, SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(TEXT, SCALARS, max_size=2),
    st.just({"a": [{"b": [[], {}, None]}]}), st.just(_DEEP),
)  # fmt: skip


# -- valid values ----------------------------------------------------------------------------------------------------
@st.composite
def _errors(draw: st.DrawFn) -> FerryError:
    kind = draw(st.sampled_from(sorted(errors._BY_NAME)))
    message = draw(TEXT.filter(bool))
    match kind:
        case "Busy":
            return errors.Busy(message, retry_after_s=draw(NUMBERS))
        case "Moved":
            return errors.Moved(message, owner=draw(st.none() | NODES), epoch=draw(COUNTS))
        case "InDoubt":
            return errors.InDoubt(message, message_id=draw(NAMES))
        case _:
            return errors._BY_NAME[kind](message)


ERRORS = _errors()


@st.composite
def _memories(draw: st.DrawFn) -> dict[str, Any]:
    """What an actor remembers, remembered as in life: by adding answers."""
    memory = Memory(Limits(4, 2))
    numbers: dict[str, int] = {}
    for session in draw(st.lists(st.just("") | SESSIONS, max_size=6)):
        numbers[session] = numbers.get(session, 0) + 1
        error = draw(st.none() | ERRORS)
        answer = (None, errors.to_wire(error)) if error else (draw(JSON), None)
        if session:
            memory.sessions.add(session, numbers[session], *answer)
        else:
            memory.commands.add(draw(NAMES), *answer)
    document: dict[str, Any] = orjson.loads(orjson.dumps(memory.to_document()))  # lists, as it is read
    return document


@st.composite
def _frames(draw: st.DrawFn) -> Frame:
    state = draw(st.binary(max_size=30) | st.integers(1, 3_000).map(lambda size: b"state " * size))
    return pack(state, schema=draw(st.integers(1, 9)), max_bytes=len(state), actor=ActorId("a", "k"))


MEMORIES, FRAMES = _memories(), _frames()

# By field name, then by type. What depends on another field is set right afterwards, in `_consistent`.
_OF_FIELD: dict[str, st.SearchStrategy[Any]] = {
    "actor": ACTOR_IDS,
    "apart": st.dictionaries(ACTOR_IDS.map(str), st.integers(1, 2**53), max_size=3).map(
        lambda apart: tuple(sorted(apart.items()))
    ),
    "arguments": st.dictionaries(TEXT, JSON, max_size=2),
    "destination": st.sampled_from(["c", "d"]),
    "events": st.lists(st.tuples(NAMES, st.dictionaries(NAMES, JSON, max_size=2)).map(list), max_size=3),
    "message_id": NAMES, "name": NAMES, "owner": NODES, "session": st.just("") | SESSIONS, "source": NODES,
    "step": st.none() | st.sampled_from(STEPS), "value": JSON, "reply": JSON, "memory": MEMORIES,
    "trail": st.lists(COUNTS, max_size=4).map(tuple), "frame": FRAMES,
}  # fmt: skip
_ACTOR_ID_TEXT = ACTOR_IDS.map(str)


def valid(cls: type) -> st.SearchStrategy[Any]:
    """Instances of a message or record that its own code can have made."""
    hints = typing.get_type_hints(cls)
    names = cls.__struct_fields__ if issubclass(cls, Struct) else [field.name for field in fields(cls)]
    drawn = {name: _field(name, hints[name]) for name in names}
    return st.fixed_dictionaries(drawn).map(lambda values: _consistent(cls(**values)))


def _field(name: str, hint: Any) -> st.SearchStrategy[Any]:
    if name == "actor_id":
        return ACTOR_IDS if hint is ActorId else _ACTOR_ID_TEXT
    if name in _OF_FIELD:
        return st.none() | _OF_FIELD[name] if type(None) in typing.get_args(hint) else _OF_FIELD[name]
    return _of_type(hint)


def _of_type(hint: Any) -> st.SearchStrategy[Any]:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(_of_type(one) for one in inner))
    if origin is tuple:
        return st.lists(_of_type(inner[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(_of_type(inner[0]), _of_type(inner[1]), max_size=2)
    if is_dataclass(hint) or (isinstance(hint, type) and issubclass(hint, Struct)):
        return valid(typing.cast("type", hint))
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return st.sampled_from(list(hint))
    simple: dict[Any, st.SearchStrategy[Any]] = {
        int: COUNTS, float: NUMBERS, bool: st.booleans(), str: NAMES, type(None): st.none(), ActorId: ACTOR_IDS,
        FerryError: ERRORS, bytes: st.binary(max_size=8), Any: JSON,
    }  # fmt: skip
    return simple[hint]


def _consistent(value: Any) -> Any:
    """The fields that only make sense together."""
    match value:
        case Command():
            return value if value.session else structs.replace(value, number=0, after=0)
        case Answer(error=errors.Moved() as moved):
            return structs.replace(value, value=None, owner=moved.owner, epoch=moved.epoch)
        case Answer():
            return structs.replace(value, value=None) if value.error else value
        case Ownership():
            epoch = max(1, value.epoch)
            last = value.last and replace(value.last, epoch=1 + value.last.epoch % epoch)
            locked = value.move is not None and value.destination is not None
            return replace(
                value, epoch=epoch, fence=value.fence % (epoch + 1), last=last, move=value.move if locked else None,
                destination=value.destination if locked else None, taken_out=value.taken_out % (epoch + 1),
            )  # fmt: skip
        case LastMove():
            return replace(value, epoch=max(1, value.epoch))
        case Record():
            return _record(value)
        case _:
            return value


def _record(value: Record) -> Record:
    """Each kind of log entry has fields of its own; the others are left at their defaults."""
    kept = {
        Kind.COMMAND: ("message_id", "session", "number", "events", "reply"),
        Kind.REJECTION: ("message_id", "session", "number", "error"),
        Kind.CLAIM: (),
        Kind.SNAPSHOT: ("pieces",) if value.pieces else ("memory", "frame"),
        Kind.PIECE: ("piece",),
    }[value.kind]
    common = {name: getattr(value, name) for name in ("kind", "epoch", "incarnation", "trail", *kept)}
    if value.kind is Kind.REJECTION:
        common["error"] = errors.to_wire(errors.Rejected("no"))
    if "session" in common:  # its commands are numbered from 1
        common["number"] = max(1, value.number) if common["session"] else 0
    if "frame" in common and value.frame is None:
        common["frame"] = Frame(schema=1, codec="raw", state_bytes=0, digest=digest_of(b""), body=b"")
    return Record(**common)


LEASES = st.fixed_dictionaries(
    {
        "incarnation": NAMES, "state": st.sampled_from(["up", "draining", "drained"]), "weight": st.floats(0.1, 100),
        "role": NAMES, "types": st.lists(NAMES, max_size=3), "host": TEXT, "pid": st.integers(1, 2**22),
        "version": NAMES,
    },
    optional={"schemas": st.dictionaries(NAMES, st.integers(0, 9), max_size=3)},  # earlier versions do not say
)  # fmt: skip
BIRTHS = st.fixed_dictionaries(
    {"shards": st.integers(1, 65_536), "logs": st.integers(1, 64), "wire": st.just(1)}, optional={"id": st.text()}
)
MANIFEST_ROWS = valid(ManifestRow)
SETTINGS = Settings()


# -- what nobody would send --------------------------------------------------------------------------------------------
def _nested(levels: int, inside: bytes = b"") -> bytes:
    return b"[" * levels + inside + b"]" * levels


# Values that a reader may fall over: types, sizes, depths and texts. Written as JSON text, for some of it is none.
ODD_VALUES = [
    b"null", b"true", b"false", b"0", b"-1", b"1.5", b"1e308", b"1e400", b"-0.0", b"9223372036854775808",
    b"18446744073709551615", b"18446744073709551616", b"1" * 400, b"1" * 5_000, b"NaN", b"Infinity", b'"NaN"', b'"inf"',
    b'""', b'"0"', b'"1"', b'"\\ud800"', b'"\\u0000"', b'"\\r\\nPUB x 1\\r\\n"', b'"*"', b'">"', b'"a b"', b'"\xff"',
    b'"\xed\xa0\x80"', b'"' + b"x" * 5_000 + b'"', b'"' + b"\\n" * 2_000 + b'"', b"[]", b"[[]]", b"[0]", b"{}",
    b"[[0,0,0]]", b'{"":null}', b'{"kind":"Busy","retry_after_s":1e308}', b'{"__class__":1}', _nested(100),
    _nested(130), _nested(200), _nested(254), _nested(500), _nested(1_023), _nested(1_030),
    b'{"a":' * 600 + b"1" + b"}" * 600,
    b"[" + b",".join([b"[]"] * 3_000) + b"]", b'{"' + b"k" * 3_000 + b'":1}',
]  # fmt: skip


def _odd(index: int) -> bytes:
    return ODD_VALUES[index]


ODD = st.integers(0, len(ODD_VALUES) - 1).map(_odd)  # a failure shows the strategy, and this one is short


@st.composite
def damaged(draw: st.DrawFn, payload: bytes) -> bytes:
    """`payload` after one to three accidents."""
    for _ in range(draw(st.integers(1, 3))):
        payload = _ACCIDENTS[draw(st.integers(0, len(_ACCIDENTS) - 1))](draw, payload)
    return payload


def _flipped(draw: st.DrawFn, payload: bytes) -> bytes:
    if not payload:
        return b"\x00"
    at, bit = draw(st.integers(0, len(payload) - 1)), draw(st.integers(0, 7))
    return payload[:at] + bytes([payload[at] ^ 1 << bit]) + payload[at + 1 :]


def _cut(draw: st.DrawFn, payload: bytes) -> bytes:
    at, to = draw(st.integers(0, len(payload))), draw(st.integers(0, len(payload)))
    return payload[:at] + payload[max(at, to) :]


def _doubled(draw: st.DrawFn, payload: bytes) -> bytes:
    at, size = draw(st.integers(0, len(payload))), draw(st.integers(0, 20))
    return payload[:at] + payload[at : at + size] + payload[at:]


def _odd_bytes(draw: st.DrawFn, payload: bytes) -> bytes:
    at = draw(st.integers(0, len(payload)))
    return payload[:at] + draw(_ODD_BYTES) + payload[at:]


def _odd_field(draw: st.DrawFn, payload: bytes) -> bytes:
    """One value anywhere in the JSON becomes something else, goes, or comes twice: most of what is interesting."""
    line, newline, body = payload.partition(b"\n")
    try:
        document = orjson.loads(line)
        orjson.dumps(document)
    except (ValueError, TypeError):
        return draw(ODD)  # no JSON any more, or nested deeper than orjson writes
    places = list(_places(document))
    if not places:
        return draw(ODD) + newline + body
    holder, key = places[draw(st.integers(0, len(places) - 1))]
    match draw(st.integers(0, 5)):
        case 0 if isinstance(holder, dict):
            del holder[key]
        case 1:
            other, its_key = places[draw(st.integers(0, len(places) - 1))]
            taken = orjson.loads(orjson.dumps(other[its_key]))  # a copy: a document must not hold itself
            holder[key] = taken
        case 2 if isinstance(holder, dict):
            holder[draw(st.sampled_from(["", "extra", "x" * 3_000, "a\nb", "moved", "error", "session", "number"]))] = 1
        case _:
            holder[key] = _MARK
    try:
        text = orjson.dumps(document)
    except TypeError:
        return draw(ODD) + newline + body  # what was copied into it nests it deeper than orjson writes
    return text.replace(_MARK_TEXT, draw(ODD)) + newline + body


_MARK = "here stands what nobody expects"
_MARK_TEXT = orjson.dumps(_MARK)
_ODD_BYTES = st.sampled_from([b"\xff\xfe", b"\xc0\x80", b"\x00", b"\n", b"{", b'"', b"\xed\xa0\x80"])
_ACCIDENTS: list[Callable[[st.DrawFn, bytes], bytes]] = [
    _odd_field, _odd_field, _odd_field, _flipped, _cut, _doubled, _odd_bytes,
]  # fmt: skip


def with_each_field_odd(payload: bytes) -> typing.Iterator[bytes]:
    """`payload` with each value of its JSON, of a large one every few, replaced by every odd one."""
    line, newline, body = payload.partition(b"\n")
    document = orjson.loads(line)
    places = list(_places(document))
    for holder, key in places[:: 1 + len(places) // 30]:
        value, holder[key] = holder[key], _MARK
        text = orjson.dumps(document)
        holder[key] = value
        for odd in ODD_VALUES:
            yield text.replace(_MARK_TEXT, odd) + newline + body


def _places(document: Any) -> typing.Iterator[tuple[Any, Any]]:
    waiting = [document]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in keys:
            yield holder, key
            waiting.append(holder[key])


def garbage(payloads: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Well-formed bytes that were damaged, or not at all now and then; odd JSON, and noise."""
    hurt = payloads.flatmap(damaged)
    return st.one_of(hurt, hurt, hurt, payloads, ODD, st.binary(max_size=60))
