"""Where and how processes, and programs with a client in them, log."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from routing.errors import InvalidInput
from routing.logs import configure_logging

_PROJECT = Path(__file__).parents[2]


@pytest.fixture
def own_logging() -> Iterator[None]:
    """Logging as it was before the test, whatever the test configures."""
    root, kept = logging.getLogger(), structlog.get_config()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in ("ferry.admission", "ferry.directory", "ferry.host"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    structlog.configure(**kept)


@pytest.mark.usefixtures("own_logging")
def test_logs_of_ours_and_of_libraries_look_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One JSON object per line, with logger and level; nothing below the level."""
    monkeypatch.setenv("FERRY_LOG", "json")
    monkeypatch.setenv("FERRY_LOG_LEVEL", "info")
    configure_logging("error", path=str(tmp_path / "log"))

    structlog.get_logger("ferry.test").info("node up", node="a")
    structlog.get_logger("ferry.test").debug("unseen")
    logging.getLogger("celery.test").warning("hello %s", "worker")
    for name in ("ferry.directory", "ferry.host", "ferry.admission"):
        structlog.get_logger(name).info("one of hundreds")

    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [(line["logger"], line["level"], line["event"]) for line in lines] == [
        ("ferry.test", "info", "node up"),
        ("celery.test", "warning", "hello worker"),
    ]
    assert lines[0]["node"] == "a"


@pytest.mark.usefixtures("own_logging")
def test_what_is_logged_and_how_may_stand_in_the_env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As all that Ferry reads; the environment wins."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("FERRY_LOG=json\nFERRY_LOG_LEVEL=debug\n")
    monkeypatch.setenv("FERRY_LOG_LEVEL", "error")

    configure_logging(path=str(tmp_path / "log"))
    logging.getLogger("ferry.test").warning("unseen")
    logging.getLogger("ferry.test").error("seen")

    (line,) = (tmp_path / "log").read_text().splitlines()
    assert json.loads(line)["event"] == "seen"


# What an application that imports the client finds in its modules, told to say something.
CLIENT = """
import importlib, logging, sys, structlog
for name in sys.argv[1].split():
    log = importlib.import_module(f"routing.{name}").log
    log.info("unseen")
    log.warning("50% lost", module=name, node="a b")
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
log.info("asked for", name="n")
structlog.configure(processors=[structlog.processors.KeyValueRenderer()])
log.debug("as configured", n=1)
"""


def test_a_client_logs_where_its_application_does_and_never_to_stdout_by_itself() -> None:
    """Warnings on stderr, what the standard library is told to show, and structlog as soon as it is configured."""
    modules = [
        "birth",
        "directory",
        "failpoints",
        "lease",
        "membership",
        "nats_connection",
        "nats_link",
        "nats_watch",
        "nats_wire",
        "router",
    ]

    ended = subprocess.run(
        [sys.executable, "-c", CLIENT, " ".join(modules)], timeout=60, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(_PROJECT)},
    )  # fmt: skip

    warnings = [f"50% lost module={name} node='a b'" for name in modules]
    assert ended.stderr.splitlines() == [*warnings, "INFO asked for name=n"]
    assert ended.stdout.splitlines() == ["n=1 event='as configured'"]


@pytest.mark.parametrize("variable", ["FERRY_LOG", "FERRY_LOG_LEVEL"])
@pytest.mark.usefixtures("own_logging")
def test_an_unknown_log_setting_is_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, with what there is."""
    monkeypatch.setenv(variable, "loud")

    with pytest.raises(InvalidInput, match=f"{variable}=loud: use "):
        configure_logging()
