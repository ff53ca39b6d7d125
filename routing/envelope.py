"""A command and its answer on the wire: one JSON object each, checked where it enters the process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from routing import errors, jsonlike
from routing.address import ActorId, check_node_id
from routing.errors import FerryError, InvalidInput, Moved, PayloadTooLarge
from routing.session_id import opened_at

MAX_HOPS = 3  # forwards of one command; a map that changes faster than this is answered with "moved"
MAX_MESSAGE_ID_BYTES = 128
_OF_SESSIONS = frozenset({"session", "number", "after"})
SURROUNDING_BYTES = 4_096  # no command has more around its arguments, names escaped
MAX_NAME_CHARACTERS = 200  # of a command: it is a method of the actor's class, and errors repeat it


# One for each message: frozen it takes thrice as long to make, with its fields by name twice as long. Its maker may
# complete it; after that nobody changes it.
@dataclass(slots=True)
class Command:
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
    arguments: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0
    hops: int = 0
    session: str = ""
    number: int = 0
    after: int = 0
    linearizable: bool = False

    def forwarded(self, epoch: int) -> Command:
        return replace(self, hops=self.hops + 1, epoch=max(self.epoch, epoch))


@dataclass(slots=True)  # as Command
class Answer:
    """What became of a command: a value or an error, and who answered at which epoch."""

    value: Any = None
    error: FerryError | None = None
    owner: str | None = None
    epoch: int = 0


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
    document = _document(command)
    if epoch is not None:
        document["epoch"] = epoch
    if expires_ms is not None:
        document["expires_ms"] = expires_ms
    return orjson.dumps(document)


def _document(command: Command) -> dict[str, Any]:
    document: dict[str, Any] = {
        "actor": str(command.actor), "command": command.name, "arguments": command.arguments,
        "id": command.message_id, "epoch": command.epoch, "hops": command.hops, "expires_ms": command.expires_ms,
    }  # fmt: skip
    if command.session:
        document |= {"session": command.session, "number": command.number, "after": command.after}
    if command.linearizable:
        document["linearizable"] = True
    return document


def decode_command(payload: bytes, *, max_bytes: int) -> Command:
    """Raises InvalidInput naming the field for anything malformed, PayloadTooLarge over `max_bytes`."""
    _check_size(len(payload), max_bytes)
    document = _object(payload, "command", nesting=jsonlike.MAX_NESTING)  # or it could not be forwarded
    get: Callable[..., Any] = document.get
    actor, name, message_id, arguments = get("actor"), get("command"), get("id"), get("arguments")
    epoch, hops, expires_ms = get("epoch", 0), get("hops", 0), get("expires_ms", 0)
    if not (  # one look at all: to call something for each field takes longer than to read their JSON
        type(actor) is type(name) is type(message_id) is str and type(arguments) is dict
        and type(epoch) is type(hops) is type(expires_ms) is int and min(epoch, hops, expires_ms) >= 0
    ):  # fmt: skip
        _check_fields(document)
    _check_names(name, message_id)
    command = Command(ActorId.parse(actor), name, message_id, expires_ms, arguments, epoch, hops)
    command.linearizable = get("linearizable") is True
    if not document.keys().isdisjoint(_OF_SESSIONS):
        command.session = _session(document)
        command.number, command.after = _count(document, "number"), _count(document, "after")
    return command


def _check_fields(document: dict[str, Any]) -> None:
    """Raises InvalidInput naming the field of a command that is not what it has to be."""
    for text in ("command", "id", "actor"):
        _field(document, text, str)
    _field(document, "arguments", dict)
    for count in ("epoch", "hops", "expires_ms"):
        _count(document, count)


def _session(document: dict[str, Any]) -> str:
    if "session" not in document:
        raise InvalidInput("a command with a number, but without its session")
    session: str = _field(document, "session", str)
    opened_at(session)
    return session


def encode_answer(answer: Answer) -> bytes:
    if answer.error is None:
        return orjson.dumps({"value": answer.value, "owner": answer.owner, "epoch": answer.epoch})
    if isinstance(answer.error, Moved):
        return orjson.dumps({"moved": str(answer.error), "owner": answer.error.owner, "epoch": answer.error.epoch})
    return orjson.dumps({"error": errors.to_wire(answer.error), "owner": answer.owner, "epoch": answer.epoch})


def decode_answer(payload: bytes) -> Answer:
    """Raises InvalidInput for anything that is not an answer."""
    document = _object(payload, "answer")
    owner, epoch = document.get("owner"), _count(document, "epoch")
    if owner is not None:
        check_node_id(_field(document, "owner", str))  # the next attempt's subject will name it
    if "moved" in document:
        moved = Moved(_field(document, "moved", str), owner=owner, epoch=epoch)
        return Answer(error=moved, owner=owner, epoch=epoch)
    if "error" in document:
        return Answer(error=errors.from_wire(_field(document, "error", dict)), owner=owner, epoch=epoch)
    if "value" not in document:
        raise InvalidInput("answer with neither a value nor an error")
    return Answer(document["value"], None, owner, epoch)


def _object(payload: bytes, what: str, *, nesting: int = jsonlike.MAX_NESTING + jsonlike.CARRIED) -> dict[str, Any]:
    try:
        document = jsonlike.loads(payload, nesting=nesting)
    except ValueError as error:
        raise InvalidInput(f"{what} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidInput(f"{what} is not a JSON object")
    return document


def _field(document: dict[str, Any], name: str, kind: type) -> Any:
    value = document.get(name)
    if not isinstance(value, kind):
        raise InvalidInput(f"{name!r} is missing or not of type {kind.__name__}")
    return value


def _count(document: dict[str, Any], name: str) -> int:
    value = document.get(name, 0)
    if type(value) is not int or value < 0:  # a bool is an int as well
        raise InvalidInput(f"{name!r} must be a whole number, 0 or more")
    return value
