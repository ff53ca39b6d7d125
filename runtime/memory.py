"""What an actor remembers of the commands it has answered, so that a repeated one is applied once."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from routing import errors
from routing.envelope import Answer
from routing.errors import InvalidInput


class AnsweredCommands:
    """The latest command ids and their answers, oldest first, at most `limit`.

    Derived from the log alone: every entry carries its command's id and answer, every snapshot the whole window.
    An id older than the window is forgotten; `limit` must exceed the commands one actor gets within a sender's
    longest retry.
    """

    __slots__ = ("_answers", "_limit")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._answers: OrderedDict[str, list[Any]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, message_id: str, reply: Any, error: dict[str, Any] | None) -> None:
        self._answers[message_id] = [reply] if error is None else [None, error]
        while len(self._answers) > self._limit:
            self._answers.popitem(last=False)

    def answer_to(self, message_id: str) -> Answer | None:
        known = self._answers.get(message_id)
        if known is None:
            return None
        return Answer(value=known[0]) if len(known) == 1 else Answer(error=errors.from_wire(known[1]))

    def to_document(self) -> list[list[Any]]:
        """`[[id, reply], [id, null, error], ...]`, oldest first."""
        return [[message_id, *known] for message_id, known in self._answers.items()]

    @classmethod
    def from_document(cls, document: list[list[Any]], limit: int) -> AnsweredCommands:
        """The inverse of `to_document`. Raises InvalidInput."""
        window = cls(limit)
        for message_id, reply, *error in check_answered(document):
            window.add(message_id, reply, error[0] if error else None)
        return window


def check_answered(document: list[Any]) -> list[list[Any]]:
    """Return `document` if `to_document` can have made it. Raises InvalidInput otherwise."""
    for entry in document:
        match entry:
            case [str(), _] | [str(), None, dict()]:
                continue
            case _:
                raise InvalidInput(f"{entry!r} is no answered command: expected [id, reply] or [id, null, error]")
    return document
