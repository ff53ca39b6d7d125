"""Values that JSON carries as they are: what arguments, replies, events and state may be made of.

str, int of up to 64 bits, finite float, bool, None, and lists and dicts of them with str keys. Everything else is
refused, for it would arrive as something else: nan as null, a date, a UUID or an enum member as a string, a dataclass
or a defaultdict as a plain dict.
"""

from __future__ import annotations

import math
from typing import Any

import orjson

_OPTIONS = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_SUBCLASS
_EXACT = frozenset({str, int, bool, type(None)})


def dumps(value: Any, *, tuples: bool = True, sort_keys: bool = False) -> bytes:
    """`value` as JSON. Raises TypeError for what JSON would lose or change.

    A tuple arrives as a list: taken in a message, whose receiver never saw the tuple; `tuples=False` refuses it where
    the same code reads the value before and after.
    """
    encoded = orjson.dumps(value, option=_OPTIONS | orjson.OPT_SORT_KEYS if sort_keys else _OPTIONS)
    _check(value, tuples)
    return encoded


def copy(value: Any) -> Any:
    """`value` as its receiver gets it: nothing is shared with the sender. Raises TypeError as `dumps` does."""
    return orjson.loads(dumps(value))


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
