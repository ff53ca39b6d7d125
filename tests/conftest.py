"""Says at the end of a run what the fuzzing has tried, whichever processes of pytest-xdist it was shared out to."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fuzz.tally import TALLY


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object | None) -> None:
    """In the process that shares the tests out: one of the others has ended, and tells its part."""
    TALLY.add(getattr(node, "workeroutput", {}).get("fuzz", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # this is one of the others
        session.config.workeroutput["fuzz"] = TALLY.told()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TALLY.examples:
        terminalreporter.section("fuzz")
        for line in TALLY.lines():
            terminalreporter.write_line(line)
