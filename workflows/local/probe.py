"""Does a server answer? One question per kind of URL, asked over a plain socket."""

from __future__ import annotations

import re
import socket
from urllib.parse import SplitResult, urlsplit

from routing.errors import InvalidInput

DEFAULT_PORTS = {"nats": 4222, "tls": 4222, "redis": 6379, "rediss": 6379, "http": 80, "unix": 0}
_ANSWER_S = 1.0
_MOST_BYTES = 64 * 1024  # a server that talks on without saying what we look for is not one of ours

_NATS_GREETING = re.compile(rb"^INFO ")
_REDIS_READY = re.compile(rb"^(\+PONG|-NOAUTH)")  # not -LOADING
_HTTP_OK = re.compile(rb"^HTTP/\S+ 200 ")
_REDIS_PROCESS = re.compile(rb"process_id:(\d+)\r")


def answers(urls: str) -> bool:
    """Whether one of these comma-separated servers is ready for work; never raises for one that is not there.

    nats:// and tls://: greets with INFO. redis:// and unix://: answers PING, and is not still loading its data (one
    that wants a password is ready). rediss://: accepts the connection. http://: answers 200.
    Raises InvalidInput for a URL of another kind.
    """
    return any(_one_answers(address_of(url)) for url in urls.split(","))


def address_of(url: str) -> SplitResult:
    """The parts of a URL `answers` understands. Raises InvalidInput for any other."""
    try:
        parts = urlsplit(url.strip())
        parts.port  # noqa: B018 - reading it is the check
    except ValueError as error:
        raise InvalidInput(f"{url} is malformed: {error}") from error
    if parts.scheme not in DEFAULT_PORTS or not (parts.path if parts.scheme == "unix" else parts.hostname):
        raise InvalidInput(f"cannot wait for {url}: use nats://, redis:// or http:// with a host")
    return parts


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this loopback port now."""
    with socket.socket() as probe:
        # As servers do it, so that connections of an earlier server in TIME_WAIT do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)
        except OSError:
            return False
        return True


def free_port() -> int:
    """A loopback port nobody listens on. Somebody may take it before you do: be ready to ask again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def redis_process_id(port: int) -> int | None:
    """The process id of the Redis that serves this loopback port; None when none is ready, or it will not tell."""
    found = _ask(("127.0.0.1", port), b"INFO server\r\nQUIT\r\n", _REDIS_PROCESS)
    return int(found[1]) if found else None


def _one_answers(parts: SplitResult) -> bool:
    address = (parts.hostname or "", parts.port or DEFAULT_PORTS[parts.scheme])
    match parts.scheme:
        case "nats" | "tls":
            return _ask(address, b"", _NATS_GREETING) is not None
        case "redis":
            return _ask(address, b"PING\r\nQUIT\r\n", _REDIS_READY) is not None
        case "unix":
            return _ask(parts.path, b"PING\r\nQUIT\r\n", _REDIS_READY) is not None
        case "http":
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            return (
                _ask(address, f"GET {target} HTTP/1.0\r\nHost: {parts.hostname}\r\n\r\n".encode(), _HTTP_OK) is not None
            )
        case _:
            return _ask(address, b"", re.compile(b"")) is not None


def _ask(address: tuple[str, int] | str, question: bytes, wanted: re.Pattern[bytes]) -> re.Match[bytes] | None:
    """Say `question` and read until the answer matches, or ends. None without a match, an answer, or a server."""
    try:
        with (
            socket.socket(socket.AF_UNIX)
            if isinstance(address, str)
            else socket.create_connection(address, timeout=_ANSWER_S) as connection
        ):
            connection.settimeout(_ANSWER_S)
            if isinstance(address, str):
                connection.connect(address)
            connection.sendall(question)
            answer = b""
            while (match := wanted.search(answer)) is None and len(answer) < _MOST_BYTES:
                piece = connection.recv(4096)
                if not piece:
                    return None
                answer += piece
            return match
    except OSError:
        return None
