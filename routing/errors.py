"""Every error Ferry raises, in one tree.

FerryError
├── TransientError          trying again may help; the only errors a Celery step retries
│   ├── Timeout             no answer in time, and nothing can have been changed by the question
│   ├── Unavailable         nobody can serve this now: no owner, no responder, no connection
│   │   └── StreamMissing   NATS answers, and has no such stream
│   ├── Busy                the receiver asks to come back after `retry_after_s`
│   ├── Moved               another node owns the actor; carries whom to ask
│   ├── OutOfOrder          an earlier command of the same session has not arrived yet: send that one first
│   └── WrongSequence       a compare-and-set was refused: somebody wrote first, read again
├── PermanentError          trying again the same way cannot help
│   ├── Rejected            the actor decided "no"; the decision is in its journal
│   ├── HandlerFailed       the actor's own code raised; logged like a rejection, nothing applied
│   ├── InvalidInput        a malformed id, argument, message or setting
│   │   ├── UnknownActorType
│   │   ├── UnknownCommand
│   │   └── PayloadTooLarge
│   ├── StateNotPortable    an actor's state cannot be encoded, or not decoded by this code
│   ├── Quarantined         the log is shorter than what was acknowledged: an operator must look
│   ├── SessionExpired      the actor has forgotten the sender's session: open a new one
│   ├── NotApplicable       a step or transition that the map no longer allows
│   └── Incompatible        a server or cluster this version cannot work with
├── InDoubt                 the outcome is unknown; send the same message id again to learn it
└── InvariantViolated       a bug in Ferry; caught only at the top of a process
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

# Whatever a plain function may raise that is not ours. CancelledError is no cancellation then: it read the result of a
# future that was cancelled. SystemExit is no end of the process: it is not the function's to end.
HANDLER_ERRORS = (Exception, asyncio.CancelledError, SystemExit)


class FerryError(Exception):
    """Root of every error raised by Ferry on purpose. The message says what to do next."""


class TransientError(FerryError):
    """Trying the same again may help."""


class Timeout(TransientError):
    """No answer before the deadline; the question cannot have changed anything."""


class Unavailable(TransientError):
    """Nobody can serve this now: no owner, no responder, or no connection."""


class StreamMissing(Unavailable):
    """NATS answers, and has no such stream: nobody has made it yet, or what it stored is gone.

    For whoever has asked it; others are told that it is Unavailable, which peers of every version know.
    """


class Busy(TransientError):
    """The receiver is full and changed nothing; come back after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float = 0.05) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Moved(TransientError):
    """Another node owns the actor: `owner` at `epoch`, as far as the answering node knows."""

    def __init__(self, message: str, *, owner: str | None, epoch: int) -> None:
        super().__init__(message)
        self.owner = owner
        self.epoch = epoch


class OutOfOrder(TransientError):
    """An earlier command of the same session has not been decided; nothing was applied. The sender goes back to it."""


class WrongSequence(TransientError):
    """A compare-and-set was refused because somebody else wrote first; read, then decide again."""


class PermanentError(FerryError):
    """Trying the same again cannot help."""


class Rejected(PermanentError):
    """Raised by an actor's command to say no. The decision is journalled, so it stays no."""


class HandlerFailed(PermanentError):
    """The actor's handler raised something else than Rejected; nothing was applied, and that is journalled."""


class InvalidInput(PermanentError):
    """A malformed id, argument, message or setting."""


class UnknownActorType(InvalidInput):
    """No loaded module defines this actor type."""


class UnknownCommand(InvalidInput):
    """The actor class has no such command or query."""


class PayloadTooLarge(InvalidInput):
    """A message or a state exceeds its limit in bytes. `logged`: an actor's log has it as what its command came to."""

    def __init__(self, message: str, *, logged: bool = False) -> None:
        super().__init__(message)
        self.logged = logged


class StateNotPortable(PermanentError):
    """An actor's state cannot be encoded here, or cannot be decoded by the destination's code."""


class Quarantined(PermanentError):
    """The actor's log is shorter than what was acknowledged; it stays inactive until an operator decides."""


class SessionExpired(PermanentError):
    """The actor has forgotten this session, or may have. Open a new one: it has to be opened after `floor`."""

    def __init__(self, message: str, *, floor: int = 0) -> None:
        super().__init__(message)
        self.floor = floor


class NotApplicable(PermanentError):
    """The shard map no longer allows this step or transition; somebody else has moved things on."""


class Incompatible(PermanentError):
    """A server, or a cluster born with other settings, that this process must not work with."""


class InDoubt(FerryError):
    """The command may or may not have been applied. Sending the same message id again tells."""

    def __init__(self, message: str, *, message_id: str | None = None) -> None:
        super().__init__(message)
        self.message_id = message_id


class InvariantViolated(FerryError):
    """A bug: something the protocol rules out has happened. The process that sees it stops."""


# What travels: the class name, the message, and what the class carries beside it.
_BY_NAME: dict[str, type[FerryError]] = {
    cls.__name__: cls
    for cls in (
        Timeout, Unavailable, Busy, OutOfOrder, WrongSequence, Rejected, HandlerFailed, InvalidInput, UnknownActorType,
        UnknownCommand, PayloadTooLarge, StateNotPortable, Quarantined, SessionExpired, NotApplicable, Incompatible,
        InDoubt, Moved, InvariantViolated, TransientError, PermanentError, FerryError,
    )
}  # fmt: skip


def to_wire(error: Exception) -> dict[str, Any]:
    """`{"kind", "message"}` of an error, and what its kind carries.

    A class derived from one of the tree, such as an application's own Rejected, travels as that one; foreign errors
    travel as HandlerFailed.
    """
    known = (cls.__name__ for cls in type(error).__mro__ if _BY_NAME.get(cls.__name__) is cls)
    message = str(error) or type(error).__name__
    document: dict[str, Any] = {
        "kind": next(known, HandlerFailed.__name__),
        "message": message.encode(errors="replace").decode(),  # JSON has no half characters
    }
    match error:
        case Busy():
            document["retry_after_s"] = error.retry_after_s
        case Moved():
            document |= {"owner": error.owner, "epoch": error.epoch}
        case InDoubt():
            document["message_id"] = error.message_id
        case SessionExpired():
            document["floor"] = error.floor
        case PayloadTooLarge(logged=True):
            document["logged"] = True
    return document


def from_wire(document: dict[str, Any]) -> FerryError:
    """The error a peer reported; it is one of the tree whatever was sent.

    Unknown kinds, from a newer peer, become PermanentError; a malformed field counts as not sent.
    """
    kind, message = document.get("kind"), document.get("message")
    if not isinstance(message, str):
        message = "no message"
    match kind, document:
        case "Busy", {"retry_after_s": float() | int() as retry_after_s} if 0 <= retry_after_s < math.inf:
            return Busy(message, retry_after_s=float(retry_after_s))
        case "Moved", {"owner": str() | None as owner, "epoch": int(epoch)}:
            return Moved(message, owner=owner, epoch=epoch)
        case "Moved", _:
            return Moved(message, owner=None, epoch=0)
        case "SessionExpired", {"floor": int(floor)} if 0 <= floor < 10**15 and not isinstance(floor, bool):
            return SessionExpired(message, floor=floor)
        case "PayloadTooLarge", {"logged": True}:
            return PayloadTooLarge(message, logged=True)
        case "InDoubt", {"message_id": str(message_id)}:
            return InDoubt(message, message_id=message_id)
        case _:
            return _BY_NAME.get(kind if isinstance(kind, str) else "", PermanentError)(message)
