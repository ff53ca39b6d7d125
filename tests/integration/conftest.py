"""Real servers for the integration tests, each test its own, none of which outlives it."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from workflows.local.binaries import redis_server_binary
from workflows.store import RecordStore

ATTEMPTS = 5  # a port that was free may be taken by another test run before the server binds it


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    """The URL of an empty Valkey without persistence."""
    for _ in range(ATTEMPTS):
        port = _free_port()
        server = _started(port, tmp_path)
        if server is not None:
            break
    else:
        pytest.fail(f"no Valkey came up in {ATTEMPTS} attempts")
    with server:
        try:
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.kill()


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[RecordStore]:
    """The record store of the cluster "test", on a Valkey of its own."""
    store = RecordStore.connect(redis_url, "test")
    yield store
    await store.close()


def _started(port: int, folder: Path) -> subprocess.Popen[str] | None:
    """The server once it accepts connections, as its own log says; None when it gave up."""
    command = [
        str(redis_server_binary()),
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--dir",
        str(folder),
        "--save",
        "",
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    if any("Ready to accept connections" in line for line in server.stdout):
        return server
    server.wait()
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
