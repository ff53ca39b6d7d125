"""State to bytes and back: schema version, compression, digest, limits.

A frame is one line of JSON, a newline, and the body:

    {"schema": 1, "codec": "zstd", "bytes": 5120, "digest": "…"}\n<body>

`bytes` and `digest` (BLAKE2b, 128 bits) are of the state before compression, so equal state has an equal digest
whatever the codec.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
import zstandard
from marshmallow import Schema
from msgspec import Struct

from routing import jsonlike
from routing.address import ActorId
from routing.errors import HANDLER_ERRORS, PayloadTooLarge, StateNotPortable
from routing.jsonlike import SMALL
from routing.typed import Count
from runtime.actor import Actor

INLINE_BYTES = 64 * 1024  # digested and compressed in the time that handing over to a thread and back takes
PLAIN_BYTES = 8  # of JSON for a number, or around an attribute's name and value
PIECE_BYTES = 2**20  # copied at once; a few hundred microseconds
T = TypeVar("T")

COMPRESS_FROM_BYTES = 1024  # below this zstd saves less than a JSON header costs


class FrameHeader(Struct, kw_only=True):
    """What a header says of the state in its body."""

    schema: Count
    codec: str
    bytes: Count
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A state on its way: what it is, and its bytes as they travel."""

    schema: int
    codec: str
    state_bytes: int
    digest: str
    body: bytes


def capture_state(instance: Actor) -> bytes:
    """The actor's state as bytes; equal state gives equal bytes.

    Raises StateNotPortable naming the attribute that cannot be encoded without changing, and for whatever the actor's
    own `capture()` or schema raises.
    """
    own = getattr(instance, "capture", None)
    try:
        if own is not None:
            state = own()
            if not isinstance(state, bytes):
                raise TypeError(f"capture() returned {type(state).__name__}: return bytes")
            return state
        if instance.state_schema is not None:
            return _dump(instance, instance.state_schema())
        return _attributes(instance)
    except StateNotPortable:
        raise
    except HANDLER_ERRORS as error:
        raise StateNotPortable(f"state of {_name(instance)}: {type(error).__name__}: {error}") from error


def _dump(instance: Actor, schema: Schema) -> bytes:
    """What the schema makes of the state, and would take back: found out here, not where the actor is to go on."""
    state = jsonlike.dumps(schema.dump(instance), sort_keys=True)
    schema.load(orjson.loads(state))
    return state


def _attributes(instance: Actor) -> bytes:
    attributes = {name: value for name, value in vars(instance).items() if not name.startswith("_")}
    try:
        return jsonlike.dumps(attributes, tuples=False, sort_keys=True)
    except TypeError:
        for name, value in attributes.items():
            try:
                jsonlike.dumps({name: value}, tuples=False)
            except TypeError as error:
                raise StateNotPortable(
                    f"state of {_name(instance)}: attribute {name!r} is not JSON-like ({error}): use JSON values, a"
                    " state_schema, or capture() and restore()"
                ) from error
        raise


def bytes_of_plain(instance: Actor) -> int | None:
    """About how many bytes `capture_state` would give, where a look at the attributes tells that it would give some.

    None for all that only encoding can tell: whatever is not a small number, ASCII text, a bool or None. The instance
    has no `capture()` of its own.
    """
    if instance.state_schema is not None:
        return None
    size = 0
    for name, value in vars(instance).items():
        if name[:1] == "_":
            continue
        kind = type(value)
        if kind is int:
            if not -SMALL < value < SMALL:
                return None
        elif kind is str and value.isascii():
            size += len(value)
        elif not (value is None or kind is bool):
            return None
        size += len(name) + PLAIN_BYTES
    return size


def _name(instance: Actor) -> str:
    actor_id = instance._actor_id
    return type(instance).__name__ if actor_id is None else f"{actor_id} ({type(instance).__name__})"


def restore_state(actor_class: type[Actor], state: bytes, schema: int) -> Actor:
    """A fresh instance with that state. Raises StateNotPortable when this code cannot take it over.

    What `__init__` sets and the state lacks stays: a class may gain an attribute with a default and take over its own
    older state without a new `schema_version`.
    """
    if schema > actor_class.schema_version:
        raise StateNotPortable(
            f"{actor_class.actor_type} state of version {schema} is newer than this node's code"
            f" (version {actor_class.schema_version}): deploy the newer code here first"
        )
    try:
        instance = actor_class()
        own = getattr(instance, "restore", None)
        if own is not None:
            own(instance.upgrade(state, schema) if schema < actor_class.schema_version else state)
            return instance
        values: Any = orjson.loads(state)
        if schema < actor_class.schema_version:
            values = instance.upgrade(values, schema)
        if actor_class.state_schema is not None:
            values = actor_class.state_schema().load(values)
        for name, value in values.items():
            setattr(instance, name, value)
    except StateNotPortable:
        raise
    except HANDLER_ERRORS as error:
        raise StateNotPortable(
            f"{actor_class.actor_type} state cannot be restored by {actor_class.__name__}:"
            f" {type(error).__name__}: {error}"
        ) from error
    return instance


def digest_of(state: bytes) -> str:
    return hashlib.blake2b(state, digest_size=16).hexdigest()


def pack(state: bytes, *, schema: int, digest: str | None = None, max_bytes: int, actor: ActorId) -> Frame:
    """Compress where it pays. Raises PayloadTooLarge before anything is allocated for a state over `max_bytes`."""
    if len(state) > max_bytes:
        raise PayloadTooLarge(
            f"state of {actor} is {len(state)} bytes: the limit is {max_bytes} (FERRY_MAX_STATE_BYTES)"
        )
    codec, body = "raw", state
    if len(state) >= COMPRESS_FROM_BYTES:
        packed = _zstd.compress(state)
        if len(packed) < len(state):
            codec, body = "zstd", packed
    return Frame(schema=schema, codec=codec, state_bytes=len(state), digest=digest or digest_of(state), body=body)


class _Zstd(threading.local):
    """A compressor and a decompressor for each thread: to make one takes longer than to use it on a small state."""

    def __init__(self) -> None:
        self.compress = zstandard.ZstdCompressor(level=1).compress
        self.decompress = zstandard.ZstdDecompressor().decompress


_zstd = _Zstd()


def unpack(frame: Frame, *, max_bytes: int) -> bytes:
    """The state in a frame. Raises PayloadTooLarge, or StateNotPortable when it is damaged or of an unknown codec."""
    if frame.state_bytes > max_bytes:
        raise PayloadTooLarge(f"state of {frame.state_bytes} bytes: the limit is {max_bytes} (FERRY_MAX_STATE_BYTES)")
    if frame.codec == "zstd":
        try:
            claimed_bytes = zstandard.frame_content_size(frame.body)
            if claimed_bytes != frame.state_bytes:  # the decompressor would allocate whatever a flipped bit says
                raise StateNotPortable(f"state of {frame.state_bytes} bytes is compressed as of {claimed_bytes}")
            state = _zstd.decompress(frame.body, max_output_size=frame.state_bytes)
        except zstandard.ZstdError as error:
            raise StateNotPortable(f"state cannot be decompressed: {error}") from error
    elif frame.codec == "raw":
        state = frame.body
    else:
        raise StateNotPortable(f"state codec {jsonlike.shown(frame.codec)} is unknown here: upgrade this node")
    if len(state) != frame.state_bytes or digest_of(state) != frame.digest:
        raise StateNotPortable("state does not match its digest: it was damaged on the way")
    return state


async def aside(size_bytes: int, work: Callable[[], T]) -> T:
    """Run pure work on bytes: in a thread when it is long enough to hold up the commands of others."""
    return work() if size_bytes <= INLINE_BYTES else await asyncio.to_thread(work)


def join(header: dict[str, Any], body: bytes) -> bytes:
    """One line of JSON, then the body as it is."""
    line = orjson.dumps(header, option=orjson.OPT_APPEND_NEWLINE)
    if not body:
        return line
    return line + body if len(body) <= PIECE_BYTES else _copied(line, memoryview(body))


def _copied(first: bytes, rest: memoryview) -> bytes:
    """Both in one, copied in pieces: a thread that does it for a large state lets the event loop run in between."""
    whole = io.BytesIO()
    whole.write(first)
    for start in range(0, len(rest), PIECE_BYTES):
        whole.write(rest[start : start + PIECE_BYTES])
    return whole.getvalue()


def split(payload: bytes | bytearray) -> tuple[bytes, bytes]:
    """The line of JSON, which is not read, and the body."""
    end = payload.find(b"\n") + 1 or len(payload)
    if end == len(payload):
        return bytes(payload), b""
    rest = memoryview(payload)[end:]
    return bytes(payload[:end]), bytes(rest) if len(rest) <= PIECE_BYTES else _copied(b"", rest)


def frame_header(frame: Frame) -> dict[str, Any]:
    return {"schema": frame.schema, "codec": frame.codec, "bytes": frame.state_bytes, "digest": frame.digest}


def frame_of(header: FrameHeader, body: bytes) -> Frame:
    return Frame(
        schema=header.schema, codec=header.codec, state_bytes=header.bytes, digest=header.digest, body=body
    )  # fmt: skip
