"""Values that JSON carries as they are: what arguments, replies, events and state may be made of.

str, int of up to 64 bits, finite float, bool, None, and lists and dicts of them with str keys, nested at most
MAX_NESTING deep. Everything else is refused, for it would arrive as something else: nan as null, a date, a UUID or an
enum member as a string, a dataclass or a defaultdict as a plain dict.
"""

from __future__ import annotations

import math
from typing import Any

import orjson

# What arrives is forwarded, journalled and answered inside something larger. orjson reads 1024 levels and writes 254,
# and Python runs out of stack while showing a few hundred: whatever is let in must also be able to go out again.
MAX_NESTING = 128
CARRIED = 8  # levels that a journal record or an answer puts around a value
SMALL = 2**53  # an int below this is the same for every reader of JSON

_OPTIONS = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_SUBCLASS
_EXACT = frozenset({str, int, bool, type(None)})


def dumps(value: Any, *, tuples: bool = True, sort_keys: bool = False, nesting: int = MAX_NESTING) -> bytes:
    """`value` as JSON. Raises TypeError for what JSON would lose or change.

    A tuple arrives as a list: taken in a message, whose receiver never saw the tuple; `tuples=False` refuses it where
    the same code reads the value before and after.
    """
    encoded = orjson.dumps(value, option=_OPTIONS | orjson.OPT_SORT_KEYS if sort_keys else _OPTIONS)
    _check(value, tuples)
    if _too_deep(encoded, value, nesting):
        raise TypeError(f"nested more than {nesting} deep")
    return encoded


def loads(text: bytes, *, nesting: int = MAX_NESTING + CARRIED) -> Any:
    """The value in JSON text. Raises ValueError for anything else, and for what is nested more than `nesting` deep."""
    value = orjson.loads(text)
    if len(text) > nesting and _too_deep(text, value, nesting):  # each level is a byte at least
        raise ValueError(f"nested more than {nesting} deep")
    return value


def shown(value: Any, length: int = 80) -> str:
    """`value` for a message: one line of at most `length` characters, whatever somebody sent."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def copy(value: Any) -> Any:
    """`value` as its receiver gets it: nothing is shared with the sender. Raises TypeError as `dumps` does."""
    kind = type(value)
    if value is None or kind is bool or (kind is int and -SMALL < value < SMALL):  # nearly every reply
        return value
    return copies(value, 1)[0]


def copies(value: Any, count: int) -> list[Any]:
    """As many copies, none of which shares anything with another."""
    encoded = dumps(value)
    if type(value) is dict and _EXACT.issuperset(map(type, value.values())):
        return [value.copy() for _ in range(count)]
    return [orjson.loads(encoded) for _ in range(count)]


def _too_deep(text: bytes, value: Any, nesting: int) -> bool:
    if text.count(b"[") + text.count(b"{") <= nesting:
        return False  # nearly every message: two passes over its bytes
    level = [value]
    for _ in range(nesting + 1):
        inner = [item for item in level if type(item) in (dict, list, tuple)]
        if not inner:
            return False
        level = [part for item in inner for part in (item.values() if type(item) is dict else item)]
    return True


def _check(value: Any, tuples: bool) -> None:
    """Find what orjson would convert silently. It has refused circles and odd keys already, so this ends."""
    waiting: list[Any] = [[value]]
    while waiting:
        items = waiting.pop()
        if _EXACT.issuperset(map(type, items)):
            continue
        for item in items:
            kind = type(item)
            if kind is dict:
                waiting.append(item.values())
            elif kind is list or (kind is tuple and tuples):
                waiting.append(item)
            elif kind is float:
                if not math.isfinite(item):
                    raise TypeError(f"JSON has no {item}")
            elif kind not in _EXACT:
                raise TypeError(f"JSON has no {kind.__name__}")
