"""Stored messages as JetStream tells them.

STREAM.MSG.GET    JSON, payload and headers in base64; the stream's leader answers
DIRECT.GET        the message itself, with headers that say where it stands; any replica answers, for less than
                  half the server's time, where the stream allows it
a delivery        the message itself, to a watch's consumer (routing/nats_watch.py)
"""

from __future__ import annotations

import re
from binascii import a2b_base64

import orjson

from routing.errors import StreamMissing, Unavailable
from routing.link import Entry

_NO_MESSAGE, _NO_STREAM = 10037, 10059
_REMOVED = re.compile(rb"\r\n(?:KV-Operation: (?:DEL|PURGE)|Nats-Marker-Reason:)")
_SUBJECT, _SEQUENCE = b"\r\nNats-Subject: ", b"\r\nNats-Sequence: "


def entry_in_document(stream: str, answered: bytes) -> Entry | None:
    """What STREAM.MSG.GET answered. None where there is no such message; Unavailable for any other refusal."""
    answer = orjson.loads(answered)
    error = answer.get("error")
    if error is None:
        message = answer["message"]
        headers = a2b_base64(message["hdrs"]) if "hdrs" in message else b""
        payload = a2b_base64(message.get("data") or b"")
        return stored_entry(message["seq"], message["subject"], payload, headers)
    if error.get("err_code") == _NO_MESSAGE:
        return None
    refusal = StreamMissing if error.get("err_code") == _NO_STREAM else Unavailable
    raise refusal(
        f"stream {stream} cannot be read: {error.get('description')} [{error.get('err_code')}]: start a node, or check"
        " FERRY_CLUSTER"
    )


def entry_in_message(headers: bytes, payload: bytes) -> Entry | None:
    """What DIRECT.GET answered. None where that replica has no such message."""
    told = headers.rfind(_SUBJECT)  # the server's words stand behind those of who published the message
    subject, _, place = headers[told + len(_SUBJECT) :].partition(_SEQUENCE)
    sequence, _, _ = place.partition(b"\r\n")
    if told < 0 or not sequence.isdigit():  # a status, such as "no message found"
        return None
    return stored_entry(int(sequence), subject.decode(errors="replace"), payload, headers)


def stored_entry(sequence: int, subject: str, payload: bytes, headers: bytes) -> Entry:
    """What stands at `sequence`, by its headers as they came (b"" when there are none)."""
    removed = _REMOVED.search(headers) is not None
    return Entry(sequence, subject, b"" if removed else payload, removed)
