"""A stream in memory, with the rules of JetStream that Ferry relies on. Used by `runtime.testing`."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import Protocol

from routing.errors import Incompatible, PayloadTooLarge, WrongSequence
from routing.link import Entry, StreamSpec

MARKER_TTL_S = 86_400.0  # as long as NatsLink lets removal markers live
REMEMBERED = 8  # entries of a subject that were the last one before, for a leader that is behind
REMOVED_KEPT = 256  # entries that a replica which lags still has
MIN_TTL_S = 1  # JetStream's own minimum


class Watcher(Protocol):
    """Somebody to be told of new entries whose subject matches `tokens`."""

    tokens: tuple[str, ...]

    def send(self, entry: Entry) -> None: ...


class MemoryStream:
    """Entries by sequence and by subject. Invariant: both hold the same entries, and no subject's list is empty."""

    def __init__(self, spec: StreamSpec) -> None:
        self.spec = spec
        self.patterns = [tuple(subject.split(".")) for subject in spec.subjects]
        self.entries: dict[int, Entry] = {}
        self.by_subject: dict[str, list[int]] = {}
        self.watches: list[Watcher] = []
        self._replaced: dict[str, deque[Entry]] = {}
        self._removed: dict[int, Entry] = {}  # lately, oldest first
        self._sequence = 0
        self._timers: dict[int, asyncio.TimerHandle] = {}

    def append(
        self, subject: str, payload: bytes, *, expected: int | None, rollup: bool, ttl_s: float | None, discard: bool
    ) -> int:
        last = self.by_subject.get(subject, [0])[-1]
        if ttl_s is not None and not self.spec.ttl:
            raise Incompatible(f"stream {self.spec.name} was made without time to live")
        if 0 <= self.spec.max_message_bytes < len(payload):
            raise PayloadTooLarge(f"{len(payload)} bytes for {subject}: at most {self.spec.max_message_bytes}")
        if expected is not None and expected != last:
            raise WrongSequence(f"{subject} is at sequence {last}, not {expected}: read it again")
        sequence = self._store(subject, payload, removed=discard)
        kept = 1 if rollup else self.spec.keep
        for earlier in self.by_subject[subject][:-kept] if kept else []:
            self._remove(earlier)
        if ttl_s is not None:
            ttl_s = max(MIN_TTL_S, math.ceil(ttl_s))  # JetStream's own minimum and granularity
            self._timers[sequence] = asyncio.get_running_loop().call_later(ttl_s, self._expire, sequence)
        return sequence

    def last(self, subject: str) -> Entry | None:
        sequences = self.by_subject.get(subject)
        return self.entries[sequences[-1]] if sequences else None

    def at(self, sequence: int, *, lagging: bool) -> Entry | None:
        """What stands there; `lagging`: or stood there until lately."""
        entry = self.entries.get(sequence)
        return self._removed.get(sequence) if entry is None and lagging else entry

    def earlier(self, subject: str, by: int) -> Entry | None:
        """What a leader that was deposed `by` entries ago takes for the subject's last; at most REMEMBERED ago."""
        replaced = self._replaced.get(subject)
        return self.last(subject) if not replaced else replaced[-min(by, len(replaced))]

    def purge(self, subject: str, *, before: int) -> None:
        for sequence in self.by_subject.get(subject, [])[:]:
            if sequence < before:
                self._remove(sequence)

    def truncate(self, sequence: int) -> list[Entry]:
        """Lose every entry after `sequence` and give their sequences out anew; returns the lost ones."""
        lost = [entry for number, entry in self.entries.items() if number > sequence]
        for entry in lost:
            self._remove(entry.sequence)
        self._removed = {number: entry for number, entry in self._removed.items() if number <= sequence}
        self._sequence = min(self._sequence, sequence)
        return lost

    def _store(self, subject: str, payload: bytes, *, removed: bool) -> int:
        self._sequence += 1
        before = self.last(subject)
        if before is not None:
            self._replaced.setdefault(subject, deque(maxlen=REMEMBERED)).append(before)
        entry = Entry(sequence=self._sequence, subject=subject, payload=payload, removed=removed)
        self.entries[entry.sequence] = entry
        self.by_subject.setdefault(subject, []).append(entry.sequence)
        for watch in self.watches:
            if matches(watch.tokens, subject):
                watch.send(entry)
        return entry.sequence

    def _expire(self, sequence: int) -> None:
        """Time is up: a subject that loses its last value gets a marker, which expires in its turn without one."""
        entry = self.entries[sequence]
        self._remove(sequence)
        if entry.subject not in self.by_subject and not entry.removed:
            marker = self._store(entry.subject, b"", removed=True)
            self._timers[marker] = asyncio.get_running_loop().call_later(MARKER_TTL_S, self._expire, marker)

    def _remove(self, sequence: int) -> None:
        entry = self._removed[sequence] = self.entries.pop(sequence)
        if len(self._removed) > REMOVED_KEPT:
            del self._removed[next(iter(self._removed))]
        sequences = self.by_subject[entry.subject]
        sequences.remove(sequence)
        if not sequences:
            del self.by_subject[entry.subject]
        if (timer := self._timers.pop(sequence, None)) is not None:
            timer.cancel()


def matches(pattern: tuple[str, ...], subject: str) -> bool:
    """NATS wildcards: `*` is one token, a last `>` is one or more."""
    tokens = subject.split(".")
    if pattern[-1] == ">":
        if len(tokens) < len(pattern):
            return False
        pattern = pattern[:-1]
    elif len(tokens) != len(pattern):
        return False
    return all(wanted in ("*", token) for wanted, token in zip(pattern, tokens, strict=False))
