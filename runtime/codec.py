"""State to bytes and back: schema version, compression, digest, limits.

A frame is one line of JSON, a newline, and the body:

    {"schema": 1, "codec": "zstd", "bytes": 5120, "digest": "…"}\n<body>

`bytes` and `digest` (BLAKE2b, 128 bits) are of the state before compression, so equal state has an equal digest
whatever the codec.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import orjson
import zstandard
from marshmallow import ValidationError

from routing.address import ActorId
from routing.errors import InvalidInput, PayloadTooLarge, StateNotPortable
from runtime.actor import Actor

COMPRESS_FROM_BYTES = 1024  # below this zstd saves less than a JSON header costs
JSON_OPTIONS = orjson.OPT_SORT_KEYS  # one state, one digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A state on its way: what it is, and its bytes as they travel."""

    schema: int
    codec: str
    state_bytes: int
    digest: str
    body: bytes


def capture_state(instance: Actor) -> bytes:
    """The actor's state as bytes. Raises StateNotPortable naming the attribute that cannot be encoded."""
    own = getattr(instance, "capture", None)
    if own is not None:
        state = own()
        if not isinstance(state, bytes):
            raise StateNotPortable(f"{type(instance).__name__}.capture() returned {type(state).__name__}: return bytes")
        return state
    attributes = {name: value for name, value in vars(instance).items() if not name.startswith("_")}
    if instance.state_schema is not None:
        attributes = instance.state_schema().dump(instance)
    try:
        return orjson.dumps(attributes, option=JSON_OPTIONS)
    except TypeError:
        for name, value in attributes.items():
            try:
                orjson.dumps(value, option=JSON_OPTIONS)
            except TypeError as error:
                raise StateNotPortable(
                    f"{type(instance).__name__}.{name} is not JSON-like ({error}): use JSON values, a state_schema,"
                    " or capture() and restore()"
                ) from error
        raise


def restore_state(actor_class: type[Actor], state: bytes, schema: int) -> Actor:
    """A fresh instance with that state. Raises StateNotPortable when this code cannot take it over."""
    instance = actor_class()
    if schema > actor_class.schema_version:
        raise StateNotPortable(
            f"{actor_class.actor_type} state of version {schema} is newer than this node's code"
            f" (version {actor_class.schema_version}): deploy the newer code here first"
        )
    own = getattr(instance, "restore", None)
    try:
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
    except (ValidationError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise StateNotPortable(f"{actor_class.actor_type} state cannot be restored by this code: {error}") from error
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
        packed = zstandard.compress(state, level=1)
        if len(packed) < len(state):
            codec, body = "zstd", packed
    return Frame(schema=schema, codec=codec, state_bytes=len(state), digest=digest or digest_of(state), body=body)


def unpack(frame: Frame, *, max_bytes: int) -> bytes:
    """The state in a frame. Raises PayloadTooLarge, or StateNotPortable when it is damaged or of an unknown codec."""
    if frame.state_bytes > max_bytes:
        raise PayloadTooLarge(f"state of {frame.state_bytes} bytes: the limit is {max_bytes} (FERRY_MAX_STATE_BYTES)")
    if frame.codec == "zstd":
        try:
            state = zstandard.ZstdDecompressor().decompress(frame.body, max_output_size=frame.state_bytes)
        except zstandard.ZstdError as error:
            raise StateNotPortable(f"state cannot be decompressed: {error}") from error
    elif frame.codec == "raw":
        state = frame.body
    else:
        raise StateNotPortable(f"state codec {frame.codec!r} is unknown here: upgrade this node")
    if len(state) != frame.state_bytes or digest_of(state) != frame.digest:
        raise StateNotPortable("state does not match its digest: it was damaged on the way")
    return state


def join(header: dict[str, Any], body: bytes) -> bytes:
    """One line of JSON, then the body as it is."""
    return orjson.dumps(header) + b"\n" + body


def split(payload: bytes) -> tuple[dict[str, Any], bytes]:
    """The inverse of `join`. Raises InvalidInput."""
    line, _, body = payload.partition(b"\n")
    try:
        header = orjson.loads(line)
    except ValueError as error:
        raise InvalidInput(f"header {line[:80]!r} is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise InvalidInput(f"header {line[:80]!r} is not a JSON object")
    return header, body


def frame_header(frame: Frame) -> dict[str, Any]:
    return {"schema": frame.schema, "codec": frame.codec, "bytes": frame.state_bytes, "digest": frame.digest}


def frame_of(header: dict[str, Any], body: bytes) -> Frame:
    """Raises InvalidInput when the header describes no state."""
    try:
        return Frame(
            schema=int(header["schema"]), codec=str(header["codec"]), state_bytes=int(header["bytes"]),
            digest=str(header["digest"]), body=body,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"header describes no state: {error}") from error
