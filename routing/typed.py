"""Documents that are ours, read by msgspec into their types: what their fields may be, and what is said of others.

Every field is checked while it is read, and none is converted, but for a whole number where any number may stand: text
is no number, true is none either. What is the application's in a message is `jsonlike`'s to read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from routing.errors import InvalidInput

T = TypeVar("T")

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Measure = Annotated[float, Meta(ge=0, le=sys.float_info.max)]  # a time, a duration
Text = Annotated[str, Meta(min_length=1)]

# What msgspec, orjson and we raise for text that is not what it should be; RecursionError for what is nested deeper
# than Python's stack has room for at that moment, which is several times what is let in.
UNREADABLE = (ValueError, RecursionError)

FAULT_CHARACTERS = 200  # of what is said of a document: it may repeat what somebody sent
_AT = " - at `$"  # between what msgspec found and where


def reader(kind: type[T], what: str) -> Callable[[bytes], T]:
    """What reads JSON text as a `kind`; it raises InvalidInput for any other, saying `what` is malformed, and where."""
    decode = msgspec.json.Decoder(kind).decode

    def read(text: bytes) -> T:
        try:
            return decode(text)
        except UNREADABLE as error:
            raise InvalidInput(f"{what} is malformed: {fault(error)}") from error

    return read


def taken_as(kind: type[T], values: Any, what: str) -> T:
    """The same for values that have been read from JSON already. Raises InvalidInput."""
    try:
        return msgspec.convert(values, kind)
    except UNREADABLE as error:
        raise InvalidInput(f"{what} is malformed: {fault(error)}") from error


def fault(error: BaseException) -> str:
    """What was found wrong, in one line, and before it where: `rows[3].digest: Expected `str`, got `int``."""
    text = str(error)
    if isinstance(error, msgspec.ValidationError) and _AT in text:
        what, _, where = text.rpartition(_AT)
        text = f"{where.removesuffix('`').removeprefix('.')}: {what}"
    text = " ".join(text.split())
    return text if len(text) <= FAULT_CHARACTERS else f"{text[: FAULT_CHARACTERS - 1]}…"
