"""What FERRY_NATS_URL holds: one server or several, perhaps with a user and a password."""

from __future__ import annotations

from urllib.parse import urlsplit


def parts(url: str) -> list[str]:
    return [part.strip() for part in url.split(",") if part.strip()]


def without_secrets(url: str) -> str:
    host = urlsplit(url).netloc.rpartition("@")[2]
    return f"{urlsplit(url).scheme}://{host}" if host else url


def with_secrets_of(given: str, discovered: str) -> str:
    """A server's announced neighbour, reached with the user and password of the server that was given."""
    user, at, _ = urlsplit(given).netloc.rpartition("@")
    found = urlsplit(discovered)
    return found._replace(netloc=f"{user}{at}{found.netloc.rpartition('@')[2]}").geturl()
