"""No log lines: writing them takes most of the time of a schedule, and the trace says more."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog


def _drop(*_: Any) -> Any:
    raise structlog.DropEvent


@contextmanager
def silence() -> Iterator[None]:
    """While this lasts nothing is logged; loggers that were used before keep what they had cached."""
    before = structlog.get_config()
    structlog.configure(
        processors=[_drop], wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL),
        logger_factory=structlog.ReturnLoggerFactory(), cache_logger_on_first_use=False,
    )  # fmt: skip
    try:
        yield
    finally:
        structlog.configure(**before)
