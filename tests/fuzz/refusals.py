"""What every refusal looks like, whoever refused what."""

from __future__ import annotations

from routing.errors import FerryError

MAX_REFUSAL_CHARACTERS = 1_400  # of a message: it is logged and answered, so a sender must not choose its length


def assert_orderly(error: FerryError) -> None:
    message = str(error)
    assert len(message.splitlines()) == 1
    assert len(message) <= MAX_REFUSAL_CHARACTERS
