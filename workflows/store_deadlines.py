"""Every call of the store has a deadline, and whatever keeps Redis from serving is one error that says what to do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from redis import exceptions

from routing.errors import Unavailable

# What passes when Redis is started, failed over or given memory, or when FERRY_REDIS_URL names one: another server's
# answer is none. Anything else it refuses is a mistake, and rises.
_OUTAGES = (
    exceptions.ConnectionError, exceptions.TimeoutError, exceptions.ReadOnlyError, exceptions.OutOfMemoryError,
    exceptions.MasterDownError, exceptions.InvalidResponse,
)  # fmt: skip


class Store(Protocol):
    """Where its Redis is, and how many seconds one round trip may take."""

    timeout_s: float

    @property
    def address(self) -> str: ...


P = ParamSpec("P")
S = TypeVar("S", bound=Store)
T = TypeVar("T")

Method = Callable[Concatenate[S, P], Coroutine[Any, Any, T]]


def _within(timeouts: int) -> Callable[[Method[S, P, T]], Method[S, P, T]]:
    """Give a method so many times the store's timeout in all, and raise Unavailable for an outage of Redis.

    The deadline is ours, not redis-py's `socket_timeout`: with that it sends through `asyncio.wait_for`, which on
    Python 3.11 loses a cancellation that comes in the same moment, and a cancelled task would go on for ever.
    """

    def translated(method: Method[S, P, T]) -> Method[S, P, T]:
        @wraps(method)
        async def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
            try:
                async with asyncio.timeout(timeouts * self.timeout_s):
                    return await method(self, *args, **kwargs)
            except (*_OUTAGES, TimeoutError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise Unavailable(
                    f"Redis at {self.address} does not serve ({reason}): start it, or correct FERRY_REDIS_URL"
                ) from error
            except exceptions.ResponseError as error:
                if not isinstance(error, exceptions.NoPermissionError) and not str(error).startswith("DENIED"):
                    raise  # a mistake of ours
                raise Unavailable(
                    f"Redis at {self.address} refuses us ({error}): correct its ACL or protected mode"
                ) from error

        return call

    return translated


def one_trip(method: Method[S, P, T]) -> Method[S, P, T]:
    """For a method of one round trip."""
    return _within(1)(method)


def many_trips(method: Method[S, P, T]) -> Method[S, P, T]:
    """For a method of many round trips, or of many records in one."""
    return _within(12)(method)
