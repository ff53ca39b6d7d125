"""A lease: one key that its holder renews and that expires by itself when the holder is gone.

For liveness only. The holder trusts it up to a margin before its end, counted from *before the sending* of the
last renewal that was acknowledged, on a clock that runs while the machine is suspended; safety rests on epochs. While
the link is in doubt, which may be about another cluster's NATS, it is not trusted, renewed or given back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import orjson

from routing import jsonlike
from routing.errors import InDoubt, InvalidInput, Timeout, Unavailable, WrongSequence
from routing.link import Link
from routing.logs import get_logger
from routing.subjects import kv_stream, kv_subject

log = get_logger("ferry.lease")

TRUSTED_SHARE = 0.6  # of the time to live; the rest covers clock rate differences and a stopped process waking up
RENEWALS_PER_LEASE = 5
ANSWER_SHARE = 0.17  # of the time to live: a lost renewal leaves time for another before the trust runs out
ATTEMPTS = 3  # the key changes under us only when it expires or another takes it


# Seconds on a clock that also runs during suspend, where the system has it. Asked for each message, so no function of
# Python's own.
boottime_s: Callable[[], float] = partial(time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def decode_lease(payload: bytes) -> dict[str, Any]:
    """The document a holder wrote. Raises InvalidInput when it is none."""
    try:
        document = jsonlike.loads(payload)
    except ValueError as error:
        raise InvalidInput(f"lease {payload[:80]!r} is malformed: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("incarnation"), str):
        raise InvalidInput(f"lease {payload[:80]!r} is malformed: no incarnation")
    return document


class Lease:
    """Holds `key` in `bucket` for `incarnation`, at most one holder at a time."""

    def __init__(
        self, link: Link, bucket: str, key: str, *, incarnation: str, ttl_s: float,
        clock: Callable[[], float] = boottime_s,
    ) -> None:  # fmt: skip
        self._link, self._clock, self._ttl_s = link, clock, ttl_s
        self._timeout_s = ttl_s * ANSWER_SHARE
        self._stream, self._subject = kv_stream(bucket), kv_subject(bucket, key)
        self._incarnation = incarnation
        self._sequence: int | None = None
        self._trusted_until = float("-inf")

    @property
    def renew_every_s(self) -> float:
        return self._ttl_s / RENEWALS_PER_LEASE

    def is_trusted(self) -> bool:
        """Whether the holder may still act as the holder."""
        return self._clock() < self._trusted_until and not self._link.in_doubt

    async def holder(self) -> tuple[dict[str, Any] | None, int]:
        """(the document of whoever holds the key, or None; the key's last sequence, 0 for none).

        What nobody can read is nobody's lease: it would never expire, and its place could never be taken.
        """
        stored = await self._link.last(self._stream, self._subject, timeout_s=self._timeout_s)
        if stored is None:
            return None, 0
        try:
            return (None if stored.removed else decode_lease(stored.payload)), stored.sequence
        except InvalidInput as error:
            log.error("lease of nobody", subject=self._subject, error=str(error))
            return None, stored.sequence

    async def hold(self, document: dict[str, Any]) -> bool:
        """Acquire or renew; True while held. `document` is what others read; the incarnation is added.

        Returns False when another incarnation holds it. Raises Timeout or Unavailable when that cannot be told now:
        the trust that is left goes on, and the next call finds out.
        """
        payload = orjson.dumps({**document, "incarnation": self._incarnation})
        for _ in range(ATTEMPTS):
            if self._sequence is None and not await self._find_place():
                self._trusted_until = float("-inf")
                return False
            began = self._clock()
            try:
                self._sequence = await self._link.append(
                    self._subject, payload, expected=self._sequence, ttl_s=self._ttl_s, timeout_s=self._timeout_s
                )
            except WrongSequence:
                self._sequence = None  # it expired, a late write of ours landed, or somebody took it: read which
                continue
            except InDoubt as error:
                self._sequence = None
                raise Timeout(f"no answer to the renewal of {self._subject}: {error}") from error
            self._trusted_until = began + self._ttl_s * TRUSTED_SHARE
            return True
        raise Unavailable(f"{self._subject} changed {ATTEMPTS} times while being taken: try again")

    async def release(self) -> None:
        """Give it up at once, if it is still ours. Others may take it when this returns."""
        self._trusted_until = float("-inf")
        if self._sequence is None:
            return
        try:
            await self._link.append(
                self._subject, b"", expected=self._sequence, discard=True, timeout_s=self._timeout_s
            )
        except (WrongSequence, InDoubt, Unavailable):
            return  # it expires by itself, or is no longer ours
        finally:
            self._sequence = None

    async def _find_place(self) -> bool:
        document, sequence = await self.holder()
        if document is not None and document["incarnation"] != self._incarnation:
            return False
        self._sequence = sequence
        return True
