"""Messages of one turn of the event loop that go the same way, in one NATS message.

To send or receive a NATS message costs a Python client some ten to twenty microseconds, whatever is in it; a command
is not much longer than what surrounds it. So requests to one subject, and answers to one inbox, that are ready in the
same turn travel together. Nothing waits for company: a message that is alone goes as it is.

    frame     for each message its token (8 bytes), the length of its payload (4 bytes), its payload
    request   on the subject asked; a frame has `<inbox>.~f<frame>` for its reply, a single one `<inbox>.~<token>`
    answer    to token n at `<inbox>.~<n>`, a frame of them at `<inbox>.~`

So the subjects alone tell what is a frame, and whose inbox understands them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct

from routing.errors import InvalidInput

INBOX_MARK = ".~"  # behind it stands a token: whoever waits there understands frames
FRAME_MARK = ".~f"  # behind it stands the name of a frame

TOKEN_DIGITS = 19  # fewer fit into the eight bytes of a frame

# Longer ones gain little: for 4 KB the way over the wire counts, not the message.
PACKED_BYTES = 4 * 1024
FRAME_BYTES = 64 * 1024
FRAME_MESSAGES = 128  # a frame is handled in one go, so it should not be much more than two milliseconds' work

_HEAD = Struct(">QI")


@dataclass(frozen=True, slots=True)
class Parcel:
    """What one NATS message is to carry: one payload as it is, or a frame of several, and whose they are."""

    payload: bytes
    tokens: tuple[int, ...]

    @property
    def is_frame(self) -> bool:
        return len(self.tokens) > 1


class Outbox:
    """Messages that leave at the end of this turn, by where they go, in the order of the calls."""

    def __init__(self) -> None:
        self.frame_bytes = FRAME_BYTES  # less where the server takes less in one message
        self._waiting: dict[str, list[tuple[int, bytes]]] = {}
        self._alone: list[tuple[str, bytes]] = []
        self.waiting_bytes = 0

    def add(self, subject: str, token: int, payload: bytes) -> int:
        """A question to `subject`, or the answer to token `token` of the inbox `subject`. How many go there now."""
        there = self._waiting.setdefault(subject, [])
        there.append((token, payload))
        self.waiting_bytes += len(payload)
        return len(there)

    def add_alone(self, subject: str, payload: bytes) -> None:
        """An answer to somebody who does not understand frames."""
        self._alone.append((subject, payload))
        self.waiting_bytes += len(payload)

    def take(self) -> list[tuple[str, Parcel]]:
        """Everything that waits, as it is to be sent."""
        if not self._waiting and not self._alone:
            return []
        waiting, alone = self._waiting, self._alone
        self._waiting, self._alone, self.waiting_bytes = {}, [], 0
        packed = [
            (subject, parcel) for subject, messages in waiting.items() for parcel in parcels(messages, self.frame_bytes)
        ]
        return packed + [(subject, Parcel(payload, ())) for subject, payload in alone]


def parcels(messages: list[tuple[int, bytes]], frame_bytes: int = FRAME_BYTES) -> Iterator[Parcel]:
    """Messages of one way, (token, payload) each, in order, in as few parcels as the bounds of a frame allow."""
    start = size = 0
    for end, (_, payload) in enumerate(messages):
        length = _HEAD.size + len(payload)
        if end > start and (size + length > frame_bytes or end - start >= FRAME_MESSAGES):
            yield _parcel(messages[start:end])
            start, size = end, 0
        size += length
    yield _parcel(messages[start:])


def _parcel(messages: list[tuple[int, bytes]]) -> Parcel:
    if len(messages) == 1:
        token, payload = messages[0]
        return Parcel(payload, (token,))
    parts: list[bytes] = []
    for token, payload in messages:
        parts += (_HEAD.pack(token, len(payload)), payload)
    return Parcel(b"".join(parts), tuple(token for token, _ in messages))


def unpack(frame: bytes) -> list[tuple[int, bytes]]:
    """The messages of a frame, (token, payload) each. Raises InvalidInput when it is cut short."""
    messages, at, end = [], 0, len(frame)
    while at < end:
        if at + _HEAD.size > end:
            raise InvalidInput(f"frame of {end} bytes ends within the head of a message")
        token, size = _HEAD.unpack_from(frame, at)
        at += _HEAD.size
        if at + size > end:
            raise InvalidInput(f"frame of {end} bytes ends within a message of {size}")
        messages.append((token, frame[at : at + size]))
        at += size
    return messages
