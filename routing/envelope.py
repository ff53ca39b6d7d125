"""A command and its answer on the wire: one JSON object each, checked where it enters the process.

What is ours in it msgspec reads into the types that stand here; what is the application's is `jsonlike`'s to read.
"""

from __future__ import annotations

from typing import Any

import orjson
from msgspec import Raw, Struct
from msgspec.json import Decoder
from msgspec.structs import replace

from routing import errors, jsonlike
from routing.address import ActorId, check_node_id
from routing.errors import FerryError, InvalidInput, Moved, PayloadTooLarge
from routing.session_id import opened_at
from routing.typed import UNREADABLE, Count

MAX_HOPS = 3  # forwards of one command; a map that changes faster than this is answered with "moved"
MAX_MESSAGE_ID_BYTES = 128
SURROUNDING_BYTES = 4_096  # no command has more around its arguments, names escaped
MAX_NAME_CHARACTERS = 200  # of a command: it is a method of the actor's class, and errors repeat it


# One for each message: to make a dataclass takes thrice as long, to make anything with its fields by name twice. Its
# maker may complete it; after that nobody changes it.
class Command(Struct):
    """One command or query for one actor; the node's actor class knows which it is.

    `message_id` makes a command apply once however often it arrives. `epoch` is the epoch of the map entry the
    sender went by. After `expires_ms` (unix milliseconds) nobody waits for the answer any more.

    In a `session` a command has a `number` from 1 and is decided exactly after the one before it; a query has none and
    is answered once the command `after` has been. A `linearizable` query sees all that was acknowledged before it.
    """

    actor: ActorId
    name: str
    message_id: str
    expires_ms: int
    arguments: dict[str, Any] = {}  # a new one each time: msgspec sees to that
    epoch: int = 0
    hops: int = 0
    session: str = ""
    number: int = 0
    after: int = 0
    linearizable: bool = False

    def forwarded(self, epoch: int) -> Command:
        return replace(self, hops=self.hops + 1, epoch=max(self.epoch, epoch))


class Answer(Struct):
    """What became of a command: a value or an error, and who answered at which epoch."""

    value: Any = None
    error: FerryError | None = None
    owner: str | None = None
    epoch: int = 0


class _SentCommand(Struct):
    """A command as it travels. What it says beyond this is a newer version's, and nobody looks at it."""

    actor: str
    command: str
    id: str
    arguments: Raw
    epoch: Count = 0
    hops: Count = 0
    expires_ms: Count = 0
    session: str = ""
    number: Count = 0
    after: Count = 0
    linearizable: bool = False


class _SentAnswer(Struct):
    """An answer as it travels: the first that is there of moved, error and value is what it says."""

    moved: str | None = None
    error: Raw = Raw()
    value: Raw = Raw()
    owner: str | None = None
    epoch: Count = 0


_read_command = Decoder(_SentCommand).decode
_read_answer = Decoder(_SentAnswer).decode


def new_command(
    actor: ActorId, name: str, arguments: dict[str, Any], *, message_id: str, max_bytes: int, linearizable: bool = False
) -> Command:
    """A command as its node will read it, sharing nothing with the caller.

    Raises InvalidInput, PayloadTooLarge for what no node could receive.
    """
    if not (isinstance(name, str) and isinstance(message_id, str) and isinstance(arguments, dict)):
        given = jsonlike.shown((name, message_id, arguments))
        raise InvalidInput(f"name, message id and arguments of a command are {given}: must be text, text and a dict")
    _check_names(name, message_id)
    try:
        encoded = jsonlike.dumps(arguments, nesting=jsonlike.MAX_NESTING - 1) if arguments else b""
    except TypeError as error:
        raise InvalidInput(f"arguments of {name!r} are not JSON-like: {error}") from error
    command = Command(actor, name, message_id, 0, orjson.loads(encoded) if encoded else {})
    command.linearizable = linearizable
    if len(encoded) > max_bytes - SURROUNDING_BYTES:
        _check_size(len(encode_command(command)), max_bytes)
    return command


def _check_names(name: str, message_id: str) -> None:
    if len(name) > MAX_NAME_CHARACTERS:
        raise InvalidInput(f"command {name[:40]!r}… of {len(name)} characters: use at most {MAX_NAME_CHARACTERS}")
    size = len(message_id)
    if not (name.isascii() and message_id.isascii()):  # nearly all are
        try:
            name.encode()
            size = len(message_id.encode())
        except UnicodeEncodeError as error:
            raise InvalidInput(f"command {name[:40]!r} or its id is not valid text: use UTF-8") from error
    if not 1 <= size <= MAX_MESSAGE_ID_BYTES:
        raise InvalidInput(f"message id {message_id[:40]!r}: use 1 to {MAX_MESSAGE_ID_BYTES} bytes")


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise PayloadTooLarge(f"command of {size} bytes: the limit is {max_bytes} (FERRY_MAX_COMMAND_BYTES)")


def encode_command(command: Command, *, epoch: int | None = None, expires_ms: int | None = None) -> bytes:
    """A command that was made or read here; `epoch` and `expires_ms` take the place of its own."""
    document: dict[str, Any] = {
        "actor": str(command.actor), "command": command.name, "arguments": command.arguments,
        "id": command.message_id, "epoch": command.epoch if epoch is None else epoch, "hops": command.hops,
        "expires_ms": command.expires_ms if expires_ms is None else expires_ms,
    }  # fmt: skip
    if command.session:
        document |= {"session": command.session, "number": command.number, "after": command.after}
    if command.linearizable:
        document["linearizable"] = True
    return orjson.dumps(document)


def decode_command(payload: bytes, *, max_bytes: int) -> Command:
    """Raises InvalidInput for anything malformed, PayloadTooLarge over `max_bytes`."""
    _check_size(len(payload), max_bytes)
    try:
        sent = _read_command(payload)
        arguments = _read_arguments(bytes(sent.arguments))
    except UNREADABLE as error:
        raise InvalidInput(f"malformed command: {error}") from error
    _check_names(sent.command, sent.id)
    actor = ActorId.parse(sent.actor)
    command = Command(actor, sent.command, sent.id, sent.expires_ms, arguments, sent.epoch, sent.hops)
    command.linearizable = sent.linearizable
    if sent.session or sent.number or sent.after:
        if not sent.session:
            raise InvalidInput("a command with a number, but without its session")
        opened_at(sent.session)
        command.session, command.number, command.after = sent.session, sent.number, sent.after
    return command


def _read_arguments(text: bytes) -> dict[str, Any]:
    """Raises ValueError for what could not be forwarded as well."""
    if text == b"{}":
        return {}
    arguments = jsonlike.loads(text, nesting=jsonlike.MAX_NESTING - 1)
    if type(arguments) is not dict:
        raise ValueError("'arguments' are not an object")
    return arguments


def encode_answer(answer: Answer) -> bytes:
    if answer.error is None:
        return orjson.dumps({"value": answer.value, "owner": answer.owner, "epoch": answer.epoch})
    if isinstance(answer.error, Moved):
        return orjson.dumps({"moved": str(answer.error), "owner": answer.error.owner, "epoch": answer.error.epoch})
    return orjson.dumps({"error": errors.to_wire(answer.error), "owner": answer.owner, "epoch": answer.epoch})


def decode_answer(payload: bytes) -> Answer:
    """Raises InvalidInput for anything that is not an answer."""
    try:
        sent = _read_answer(payload)
        if sent.owner is not None:
            check_node_id(sent.owner)  # the next attempt's subject will name it
        if sent.moved is not None:
            return Answer(None, Moved(sent.moved, owner=sent.owner, epoch=sent.epoch), sent.owner, sent.epoch)
        if text := bytes(sent.error):
            if type(error := jsonlike.loads(text)) is not dict:
                raise ValueError("'error' is not an object")
            return Answer(None, errors.from_wire(error), sent.owner, sent.epoch)
        if not (text := bytes(sent.value)):
            raise ValueError("neither a value nor an error")
        return Answer(jsonlike.loads(text, nesting=jsonlike.MAX_NESTING), None, sent.owner, sent.epoch)
    except UNREADABLE as problem:
        raise InvalidInput(f"malformed answer: {problem}") from problem
