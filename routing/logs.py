"""Where logs go: one line per event on stderr, for every Ferry process and for the libraries under it.

    FERRY_LOG         console (default): aligned, coloured on a terminal     json: one JSON object per line
    FERRY_LOG_LEVEL   debug, info, warning, error or critical; the default is the command's. What is logged of each
                      single shard (hundreds of lines when a node joins) needs debug.

Both are read from the environment or `.env`, as settings are.

structlog renders, the standard library delivers: so Celery's and nats-py's own messages look like ours.

An application that uses the client never calls `configure_logging` and keeps the logging it has: the client logs as
structlog is configured there; when it is not, to the loggers `ferry.*` of the standard library. Unless told otherwise,
these show warnings and errors on stderr, and nothing else. structlog by itself would show everything, on stdout.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

import structlog

from routing.errors import InvalidInput
from routing.settings import variables

LEVELS = ("debug", "info", "warning", "error", "critical")
FORMATS = ("console", "json")

# Warnings and errors of theirs are shown at every level.
_OF_EACH_SHARD = ("ferry.admission", "ferry.directory", "ferry.host")

# What both kinds of messages get, those of structlog and those of the standard library.
_SHARED: tuple[Any, ...] = (
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.add_log_level,
    structlog.processors.StackInfoRenderer(),
)


def get_logger(name: str) -> Any:
    """The logger of this name, for a module that applications import. It becomes one when something is logged."""
    return _Logger(name)


class _Logger:
    """structlog's as it is configured; the standard library's while it is not."""

    def __init__(self, name: str) -> None:
        self._configured = structlog.get_logger(name)
        self._plain = structlog.wrap_logger(
            logging.getLogger(name),
            processors=[
                structlog.stdlib.filter_by_level,
                structlog.contextvars.merge_contextvars,
                _console(colors=False),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),
        )

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):  # no way to log; and without this a copy, which has no fields yet, would have no end
            raise AttributeError(method)
        return getattr(self._configured if structlog.is_configured() else self._plain, method)


def configure_logging(default_level: str = "warning", *, path: str | None = None) -> None:
    """Set logging up for this process: to stderr, or to the file `path`. May be called again; the last call counts.

    Raises InvalidInput when FERRY_LOG or FERRY_LOG_LEVEL says something unknown, or `.env` cannot be read.
    """
    level_name, form = choices(default_level)
    level = logging.getLevelNamesMapping()[level_name.upper()]
    handler = logging.FileHandler(path) if path else logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*_SHARED, structlog.stdlib.ExtraAdder()],
            processors=_rendering(form, colors=handler.stream is not None and handler.stream.isatty()),
        )
    )
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for name in _OF_EACH_SHARD:
        logging.getLogger(name).setLevel(level if level <= logging.DEBUG else max(level, logging.WARNING))
    structlog.configure(
        processors=[*_SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),  # what is not logged costs half a microsecond
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )


def choices(default_level: str = "warning") -> tuple[str, str]:
    """Level and format. Raises as `configure_logging`."""
    given = variables()
    level = _chosen(given, "FERRY_LOG_LEVEL", default_level, LEVELS)
    return level, _chosen(given, "FERRY_LOG", "console", FORMATS)


def _rendering(form: str, *, colors: bool) -> list[Any]:
    """The last processors. Tracebacks are plain: without the locals, which hold actors' states and passwords."""
    meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    if form == "json":
        return [
            meta,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str),
        ]
    return [
        meta,
        structlog.processors.TimeStamper(fmt="%H:%M:%S.%f", utc=False),
        _console(colors=colors, pad_event_to=24),
    ]


def _console(*, colors: bool, pad_event_to: int = 0) -> Any:
    return structlog.dev.ConsoleRenderer(
        colors=colors, pad_event_to=pad_event_to, sort_keys=False, exception_formatter=structlog.dev.plain_traceback
    )


def _chosen(given: Mapping[str, str], variable: str, default: str, known: tuple[str, ...]) -> str:
    value = given.get(variable, "").lower() or default
    if value not in known:
        raise InvalidInput(f"{variable}={value}: use {', '.join(known)}")
    return value
