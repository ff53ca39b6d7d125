"""Gives the tests of this folder time for as many examples as are asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from tests.fuzz.effort import TIMEOUT_S


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "fuzz":
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture(autouse=True)
def _quiet_log() -> Iterator[None]:
    """Tens of thousands of expected refusals: tests that want to see them catch the log themselves."""
    before = structlog.get_config()
    structlog.configure(processors=[_drop], cache_logger_on_first_use=False)
    yield
    structlog.configure(**before)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for all examples of a file: making one costs more than most examples."""
    with asyncio.Runner() as runner:
        yield runner


def _drop(_logger: Any, _method: str, _event: Any) -> Any:
    raise structlog.DropEvent
