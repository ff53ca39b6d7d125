"""Bytes on their way to a destination: cut into chunks, a window of them unacknowledged at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress

from routing import control
from routing.errors import FerryError, Timeout
from routing.link import Link
from routing.settings import Settings
from routing.subjects import Subjects
from runtime.codec import join
from runtime.throttle import TokenBucket

CHUNK_ATTEMPTS = 3  # a chunk or its answer may be lost; all that went before would be sent in vain


class ChunkSender:
    """Sends payloads over the transfer link. Chunks are idempotent at the destination, so sending again is harmless."""

    def __init__(self, link: Link, subjects: Subjects, settings: Settings) -> None:
        self._link, self._subjects, self._settings = link, subjects, settings

    async def send(
        self, destination: str, move: str, payloads: list[tuple[int, bytes]], *, on_ack: Callable[[], None],
        throttle: TokenBucket | None = None,
    ) -> None:  # fmt: skip
        """Return when every chunk is acknowledged. `on_ack` is called after each, and ends the sending by raising.

        Raises what the destination answered, Unavailable when it is away, Timeout when a chunk got no answer.
        """
        chunks = chunks_of(move, payloads, self._settings.chunk_bytes)
        subject = self._subjects.transfer(destination, move)
        in_flight = max(1, self._settings.transfer_window_bytes // self._settings.chunk_bytes)

        async def sender() -> None:
            for chunk in chunks:  # the senders share one iterator: each takes the next chunk when its last is acked
                if throttle is not None:
                    await throttle.take(len(chunk))
                await self._send(subject, chunk)
                on_ack()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(in_flight):
                    group.create_task(sender())
        except* FerryError as several:
            raise _first(several) from several

    async def _send(self, subject: str, chunk: bytes) -> None:
        for _ in range(CHUNK_ATTEMPTS - 1):
            with suppress(Timeout):
                control.result_of(await self._link.request(subject, chunk, timeout_s=self._settings.append_timeout_s))
                return
        control.result_of(await self._link.request(subject, chunk, timeout_s=self._settings.append_timeout_s))


def chunks_of(move: str, payloads: list[tuple[int, bytes]], chunk_bytes: int) -> Iterator[bytes]:
    """Cut payloads into messages of about `chunk_bytes`: small ones share a message, large ones take several."""
    pieces: list[tuple[int, int, int]] = []
    parts: list[bytes] = []
    filled = 0
    for index, payload in payloads:
        for offset in range(0, len(payload), chunk_bytes):
            part = payload[offset : offset + chunk_bytes]
            if filled + len(part) > chunk_bytes and pieces:
                yield join({"move": move, "pieces": pieces}, b"".join(parts))
                pieces, parts, filled = [], [], 0
            pieces.append((index, offset, len(part)))
            parts.append(part)
            filled += len(part)
    if pieces:
        yield join({"move": move, "pieces": pieces}, b"".join(parts))


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """One error out of a group: the senders share a fate, so any of them says what went wrong."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
