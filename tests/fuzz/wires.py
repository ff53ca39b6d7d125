"""Every message and stored document, with how it is written, how it is read, and which refusals its reader promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import orjson
from hypothesis import strategies as st

from routing import control, errors
from routing.address import ActorId
from routing.birth import Birth, decode_birth
from routing.control import MigrationRequest, StepRequest
from routing.documents import decode_ownership, encode_ownership
from routing.envelope import Answer, Command, decode_answer, decode_command, encode_answer, encode_command
from routing.errors import FerryError, Incompatible, InvalidInput, PayloadTooLarge, StateNotPortable
from routing.lease import decode_lease
from routing.membership import member_of
from routing.shard_map import Ownership
from routing.typed import reader
from runtime.codec import Frame, FrameHeader, frame_header, frame_of, join, pack, split, unpack
from runtime.journal import Record, decode_record, encode_record
from runtime.memory import Limits, Memory, check_memory
from runtime.portable import Portable
from tests.fuzz.strategies import BIRTHS, ERRORS, FRAMES, JSON, LEASES, MEMORIES, valid
from workflows.records import (
    ActorRow,
    AuditEvent,
    ClusterEvent,
    MigrationPlan,
    Move,
    from_document,
    to_document,
)

MAX_BYTES = 64 * 1024


def _itself(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """`read(write(value))` is `value`, as far as `shape` sees it; whatever else is read raises one of `refusals`."""

    name: str
    values: st.SearchStrategy[Any]
    write: Callable[[Any], bytes]
    read: Callable[[bytes], Any]
    refusals: tuple[type[FerryError], ...] = (InvalidInput,)
    shape: Callable[[Any], Any] = _itself

    @property
    def payloads(self) -> st.SearchStrategy[bytes]:
        return self.values.map(self.write)


def _shape(value: Any) -> Any:
    """Errors have no equality of their own: compare what travels of them."""
    if isinstance(value, FerryError):
        return errors.to_wire(value)
    if isinstance(value, Answer):
        return (value.value, value.error and errors.to_wire(value.error), value.owner, value.epoch)
    return value


def _document_wire(kind: Any) -> Wire:
    return Wire(
        name=kind.__name__, values=valid(kind), write=lambda record: orjson.dumps(to_document(record)),
        read=lambda payload: from_document(kind, payload),
    )  # fmt: skip


def _read_result(payload: bytes) -> Any:
    """A verb's answer: what it reported, or its error as a value, so that reading can be told from refusing."""
    answer = control.decode(payload)
    try:
        return control.result_of(payload)
    except FerryError:
        if not isinstance(answer.get("error"), dict):
            raise
        return errors.from_wire(answer["error"])


def _read_memory(payload: bytes) -> Any:
    """As a snapshot or a transfer brings it: checked, then built."""
    document = check_memory(control.decode(payload))
    Memory.from_document(document, Limits(128, 32))
    return document


def _write_state(state: bytes) -> bytes:
    frame = pack(state, schema=1, max_bytes=MAX_BYTES, actor=ActorId("a", "k"))
    return join(frame_header(frame), frame.body)


def _read_state(payload: bytes) -> bytes:
    return unpack(_read_frame(payload), max_bytes=MAX_BYTES)


_read_frame_header = reader(FrameHeader, "header")


def _read_frame(payload: bytes) -> Frame:
    """As a transfer and a snapshot bring it, each with more in its header."""
    line, body = split(payload)
    return frame_of(_read_frame_header(line), body)


WIRES = [
    Wire(
        name="Command", values=valid(Command), write=encode_command,
        read=lambda payload: decode_command(payload, max_bytes=MAX_BYTES), refusals=(InvalidInput, PayloadTooLarge),
    ),
    Wire(name="Answer", values=valid(Answer), write=encode_answer, read=decode_answer, shape=_shape),
    Wire(
        name="StepRequest", values=valid(StepRequest), write=control.encode,
        read=control.read_step_request,
    ),
    Wire(
        name="MigrationRequest", values=valid(MigrationRequest), write=control.encode,
        read=control.read_migration_request,
    ),
    Wire(
        name="verb result", values=st.dictionaries(st.text("ab"), JSON) | ERRORS, write=control.encode_result,
        read=_read_result, shape=_shape,
    ),
    Wire(
        name="error", values=ERRORS, write=lambda error: orjson.dumps(errors.to_wire(error)),
        read=lambda payload: errors.from_wire(control.decode(payload)), shape=_shape,
    ),
    Wire(name="map value", values=valid(Ownership), write=encode_ownership, read=decode_ownership),
    Wire(name="lease", values=LEASES, write=orjson.dumps, read=decode_lease),
    Wire(
        name="Member", values=LEASES.map(lambda document: member_of("a", document)),
        write=lambda member: orjson.dumps(asdict(member)),
        read=lambda payload: member_of("a", decode_lease(payload)),
    ),
    Wire(
        name="birth", values=BIRTHS.map(lambda document: Birth(**document)),
        write=lambda birth: orjson.dumps(asdict(birth)), read=lambda payload: decode_birth(payload, "default"),
        refusals=(Incompatible,),
    ),
    Wire(
        name="journal record", values=valid(Record), write=encode_record, read=decode_record,
        refusals=(StateNotPortable,),
    ),
    Wire(
        name="frame", values=FRAMES, write=lambda frame: join(frame_header(frame), frame.body),
        read=_read_frame,
    ),
    Wire(
        name="state", values=st.binary(max_size=3_000), write=_write_state, read=_read_state,
        refusals=(InvalidInput, StateNotPortable, PayloadTooLarge),
    ),
    Wire(name="Portable", values=valid(Portable), write=Portable.encode, read=Portable.decode),
    Wire(name="memory of commands", values=MEMORIES, write=orjson.dumps, read=_read_memory),
    *(
        _document_wire(kind)
        for kind in (Move, ActorRow, MigrationPlan, AuditEvent, ClusterEvent)
    ),
]  # fmt: skip
