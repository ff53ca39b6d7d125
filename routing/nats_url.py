"""What FERRY_NATS_URL holds: one server or several, perhaps with a user and a password."""

from __future__ import annotations

from urllib.parse import urlsplit

from routing.errors import InvalidInput

SCHEMES = ("nats://", "tls://")
LAST_PORT = 65_535


def parts(url: str) -> list[str]:
    return [part.strip() for part in url.split(",") if part.strip()]


def check_servers(urls: str, called: str) -> None:
    """Raises InvalidInput when these are no URLs of servers; `called` is what the message calls them."""
    if not isinstance(urls, str) or not parts(urls):
        raise InvalidInput(f"{called} names no server: write nats://HOST:PORT, several with commas")
    for url in parts(urls):
        if "://" in url and not url.startswith(SCHEMES):
            raise InvalidInput(f"{called} must start with {' or '.join(SCHEMES)}")
        check_address(url, called)
        if not urlsplit(url if "://" in url else f"nats://{url}").hostname:
            raise InvalidInput(f"{called} names no host: write nats://HOST:PORT")


def check_address(url: str, called: str) -> None:
    """Raises InvalidInput for a URL whose port is none, or that cannot be taken apart at all.

    The message does not repeat the URL, a part of which may be a password.
    """
    try:
        port_is_well = urlsplit(url).port != 0
    except ValueError as error:
        if "port" not in str(error).lower():
            raise InvalidInput(
                f"{called} is malformed: [ and ] go around an IPv6 address, and in a user or a password are %5B and %5D"
            ) from error
        port_is_well = False
    if not port_is_well:
        raise InvalidInput(
            f"{called} is malformed: its port must be a number up to {LAST_PORT} (in a password write / as %2F)"
        )


def without_secrets(url: str) -> str:
    host = urlsplit(url).netloc.rpartition("@")[2]
    return f"{urlsplit(url).scheme}://{host}" if host else url


def with_secrets_of(given: str, discovered: str) -> str:
    """A server's announced neighbour, reached with the user and password of the server that was given."""
    user, at, _ = urlsplit(given).netloc.rpartition("@")
    found = urlsplit(discovered)
    return found._replace(netloc=f"{user}{at}{found.netloc.rpartition('@')[2]}").geturl()
