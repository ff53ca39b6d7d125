"""One server per test, real or in memory, with links to it; everything is gone when the test ends."""

from __future__ import annotations

import asyncio
import re
import sysconfig
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

import nats
import pytest
import trustme
from nats.aio.client import Client

from routing.link import Link
from routing.nats_link import NatsLink
from runtime.testing import MemoryLink, MemoryNats

START_TIMEOUT_S = 15.0
NATS_SERVER = str(Path(sysconfig.get_path("scripts")) / "nats-server")
MAX_PAYLOAD = 256 * 1024


class Server(Protocol):
    """What a contract test does to a server. `kill` is without warning; `restart` finds the same files and port."""

    async def link(self, name: str) -> NatsLink | MemoryLink: ...

    async def kill(self) -> None: ...

    async def restart(self) -> None: ...

    async def stop(self) -> None: ...


class MemoryServer:
    def __init__(self) -> None:
        self.nats = MemoryNats(max_payload=MAX_PAYLOAD)
        self._links: list[MemoryLink] = []

    async def link(self, name: str) -> MemoryLink:
        link = self.nats.link(name)
        self._links.append(link)
        return link

    async def kill(self) -> None:
        for link in self._links:
            link.disconnect()

    async def restart(self) -> None:
        for link in self._links:
            link.reconnect()

    async def stop(self) -> None:
        for link in self._links:
            await link.close()


class NatsServer:
    """nats-server from its wheel, on a free port, with JetStream in `folder`."""

    def __init__(self, folder: Path, *, jetstream: bool = True, certificate: Path | None = None) -> None:
        self._config = folder / "nats.conf"
        store = f'jetstream {{ store_dir: "{folder / "store"}" }}' if jetstream else ""
        tls = f'tls {{ cert_file: "{certificate}"\nkey_file: "{certificate}" }}' if certificate is not None else ""
        self._config.write_text(f'listen: "127.0.0.1:-1"\nmax_payload: {MAX_PAYLOAD}\n{store}\n{tls}\n')
        self._scheme = "nats" if certificate is None else "tls"
        self.port = -1
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._links: list[NatsLink] = []

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Returns when the server says that it is ready, and knows its port from the same log."""
        self._process = process = await asyncio.create_subprocess_exec(
            NATS_SERVER, "-c", str(self._config), "-a", "127.0.0.1", "-p", str(self.port),
            stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stderr is not None
        said: list[str] = []
        async with asyncio.timeout(START_TIMEOUT_S):
            while "Server is ready" not in "".join(said[-1:]):
                line = await process.stderr.readline()
                assert line, f"nats-server ended: {''.join(said)}"
                said.append(line.decode())
        listening = re.search(r"client connections on 127\.0\.0\.1:(\d+)", "".join(said))
        assert listening is not None, "".join(said)
        self.port = int(listening[1])
        self._reader = asyncio.create_task(_discard(process.stderr))  # a full pipe would block the server

    async def link(self, name: str) -> NatsLink:
        link = await NatsLink.connect(self.url, name=name)
        self._links.append(link)
        return link

    async def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        if self._reader is not None:
            await self._reader

    async def restart(self) -> None:
        await self.start()

    async def stop(self) -> None:
        try:
            for link in self._links:
                await link.close()
        finally:
            await self.kill()


async def _discard(stream: asyncio.StreamReader) -> None:
    while await stream.read(65_536):
        pass


@pytest.fixture(autouse=True)
async def loop_errors() -> AsyncIterator[list[dict[str, Any]]]:
    """Fails the test when anything raised where nobody looks: in a timer, a callback, a forgotten task."""
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
    yield errors
    assert errors == []


@pytest.fixture
async def nats_server(tmp_path: Path) -> AsyncIterator[NatsServer]:
    """A real server."""
    server = NatsServer(tmp_path)
    try:
        await server.start()
        yield server
    finally:
        await server.stop()


@pytest.fixture
async def admin(nats_server: NatsServer) -> AsyncIterator[Client]:
    """Another client, as an operator's tool would be."""
    client = await nats.connect(nats_server.url)
    yield client
    await client.close()


@pytest.fixture
async def nats_server_without_jetstream(tmp_path: Path) -> AsyncIterator[NatsServer]:
    server = NatsServer(tmp_path, jetstream=False)
    try:
        await server.start()
        yield server
    finally:
        await server.stop()


@pytest.fixture
async def tls_server(tmp_path: Path) -> AsyncIterator[NatsServer]:
    """A real server that insists on TLS; its authority's certificate is in `tmp_path / "authority.pem"`."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    server = NatsServer(tmp_path, certificate=tmp_path / "server.pem")
    try:
        await server.start()
        yield server
    finally:
        await server.stop()


@pytest.fixture(params=["memory", "nats"])
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Server]:
    """Each implementation in turn."""
    if request.param == "memory":
        memory = MemoryServer()
        yield memory
        await memory.stop()
        return
    real = NatsServer(tmp_path)
    try:
        await real.start()
        yield real
    finally:
        await real.stop()


@pytest.fixture
async def link_pair(server: Server) -> tuple[Link, Link]:
    """Two connections to the same server."""
    return await server.link("alice"), await server.link("bob")
