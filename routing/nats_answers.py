"""Who waits for which answer on one connection: one inbox for all, one token and one deadline for each."""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from typing import Any, Protocol

from routing.errors import FerryError, InvalidInput, Timeout, Unavailable
from routing.nats_packing import FRAME_MARK, INBOX_MARK, unpack

SWEEP_S = 0.05  # how late a deadline is noticed; a timer for each would cost as much as the rest of a request
SEVERAL = "s"  # before the token that several questions share
FRAMES_REMEMBERED = 1_024  # "nobody listens" comes back within milliseconds of a frame's leaving


class Told(Protocol):
    """In a future's place where nobody awaits one: told as soon as the answer, or the error, is there. Never `done`."""

    def done(self) -> bool: ...

    def set_result(self, answer: bytes, /) -> None: ...

    def set_exception(self, error: FerryError, /) -> None: ...


Headed = tuple[bytes, bytes]  # headers as they came, payload


class _Several:
    """In a future's place for questions that share a token: what has come. At the deadline that has to do."""

    __slots__ = ("_future", "answers", "count", "done")

    def __init__(self, future: asyncio.Future[list[Headed]], count: int) -> None:
        self._future, self.count = future, count
        self.answers: list[Headed] = []
        self.done = future.done

    def set_result(self, answers: list[Headed]) -> None:
        self._future.set_result(answers)

    def set_exception(self, error: FerryError) -> None:
        if isinstance(error, Timeout):
            self._future.set_result(self.answers)
        else:
            self._future.set_exception(error)


# Somebody who waits: where the answer goes, who was asked, until when on the loop's clock, how long that was (seconds).
_Waiting = tuple[asyncio.Future[Any] | Told | _Several, str, float, float]


class Answers:
    """The answers that are expected at `inbox`, whether they come alone or in frames (routing/nats_packing.py)."""

    def __init__(self, inbox: str) -> None:
        self._inbox = inbox
        self._prefix = f"{inbox}{INBOX_MARK}"
        self._prefix_characters = len(self._prefix)
        self._loop = asyncio.get_running_loop()
        self._tokens = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}
        self._frames: OrderedDict[int, tuple[int, ...]] = OrderedDict()  # sent lately -> whose questions were in it
        self._sweeping: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def expect(self, subject: str, timeout_s: float) -> tuple[int, asyncio.Future[bytes]]:
        """A token, and what will become of the question to `subject` that bears it. The caller has to `forget` it."""
        future = self._loop.create_future()
        return self._expect(future, subject, timeout_s), future

    def expect_then(self, subject: str, timeout_s: float, told: Told) -> int:
        """As `expect`; `told` hears of the answer, or of the error, unless the token is forgotten before."""
        return self._expect(told, subject, timeout_s)

    def expect_several(self, subject: str, count: int, timeout_s: float) -> tuple[int, asyncio.Future[list[Headed]]]:
        """One token for `count` questions to `subject`, at least one, and what will have been answered to them.

        In any order, each with its headers; when the time is up those that have come, however few. The caller has to
        `forget` the token.
        """
        future: asyncio.Future[list[Headed]] = self._loop.create_future()
        return self._expect(_Several(future, count), subject, timeout_s), future

    def _expect(self, waiting: asyncio.Future[Any] | Told | _Several, subject: str, timeout_s: float) -> int:
        token = next(self._tokens)
        self._waiting[token] = waiting, subject, self._loop.time() + timeout_s, timeout_s
        if self._sweeping is None:
            self._sweeping = self._loop.call_later(SWEEP_S, self._sweep)
        return token

    def forget(self, token: int) -> None:
        """Whatever comes for `token` from now on is too late."""
        self._waiting.pop(token, None)

    def reply_to(self, token: int) -> str:
        """The reply subject of a question that goes alone."""
        return f"{self._prefix}{token}"

    def reply_to_several(self, token: int) -> str:
        """The reply subject of each of several questions."""
        return f"{self._prefix}{SEVERAL}{token}"

    def reply_to_all(self, tokens: tuple[int, ...]) -> str:
        """The reply subject of a frame of questions, or of the one that is alone in it."""
        if len(tokens) == 1:
            return self.reply_to(tokens[0])
        frame = next(self._tokens)
        self._frames[frame] = tokens
        while len(self._frames) > FRAMES_REMEMBERED:
            self._frames.popitem(last=False)
        return f"{self._inbox}{FRAME_MARK}{frame}"

    # -- what comes ------------------------------------------------------------------------------------------------
    def arrived(self, subject: str, payload: bytes, headers: bytes) -> None:
        """Something came to the inbox. Raises InvalidInput, ValueError for what is no answer of ours."""
        if not subject.startswith(self._prefix):
            raise InvalidInput(f"{subject!r} is no answer")
        name = subject[self._prefix_characters :]
        if headers and name.startswith(SEVERAL):
            self._one_of_several(int(name[1:]), headers, payload)
        elif name:
            self._resolve(int(name), payload)
        else:
            for token, answer in unpack(payload):
                self._resolve(token, answer)

    def nobody_listens(self, subject: str) -> None:
        """The server has nobody to give a question to, or any of a frame. Raises ValueError when it is not ours."""
        name = subject[self._prefix_characters :].removeprefix(SEVERAL)
        for token in self._frames.pop(int(name[1:]), ()) if name.startswith("f") else (int(name),):
            if token in self._waiting:
                _, asked, _, _ = self._waiting[token]
                self.fail(token, Unavailable(f"nobody listens on {asked}: is its node or stream there?"))

    def fail(self, token: int, error: FerryError) -> None:
        waiting = self._waiting.pop(token, None)
        if waiting is not None and not waiting[0].done():
            waiting[0].set_exception(error)

    def close(self) -> None:
        """Nothing comes any more: everybody is told that their time is up."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        for token in list(self._waiting):
            self.fail(token, Timeout("the link was closed while waiting for an answer"))

    def _one_of_several(self, token: int, headers: bytes, payload: bytes) -> None:
        waiting = self._waiting.get(token)
        if waiting is not None and isinstance(several := waiting[0], _Several):
            several.answers.append((headers, payload))
            if len(several.answers) == several.count:
                self._resolve(token, several.answers)

    def _resolve(self, token: int, payload: Any) -> None:
        waiting = self._waiting.pop(token, None)
        if waiting is not None and not waiting[0].done():
            waiting[0].set_result(payload)

    def _sweep(self) -> None:
        """End the waits whose deadline has passed."""
        self._sweeping, now_s = None, self._loop.time()
        for token, (_, subject, deadline_s, timeout_s) in list(self._waiting.items()):
            if deadline_s <= now_s:
                self.fail(token, Timeout(f"no answer from {subject} within {timeout_s:g} s: try again"))
        if self._waiting:
            self._sweeping = self._loop.call_later(SWEEP_S, self._sweep)
