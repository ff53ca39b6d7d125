"""The embedded NATS and Redis: they come up, keep their data, refuse to be doubled, and never outlive their owner."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import nats
import psutil
import pytest
import redis

from routing.errors import Incompatible, InvalidInput, Unavailable
from routing.settings import embedded_urls
from tests.integration.waiting import ended, until
from workflows.local import EmbeddedServers, LocalProcess, redis_server_binary, servers

OWNER = """
import signal, sys
from workflows.local import EmbeddedServers
servers = EmbeddedServers(sys.argv[1]).start()
print(servers.nats.pid, servers.redis.pid, flush=True)
signal.pause()
"""


async def test_data_is_there_again_after_a_stop_and_a_start(tmp_path: Path) -> None:
    """What both servers acknowledged survives a clean stop and a start on the same folder."""
    with EmbeddedServers(tmp_path) as servers:
        await _store(servers, b"kept")

    with EmbeddedServers(tmp_path) as servers:
        assert await _load(servers) == (b"kept", b"kept")


async def test_a_killed_server_comes_back_on_its_port_with_its_data(tmp_path: Path) -> None:
    """`start_nats` and `start_redis` after kill -9: same address, nothing acknowledged is lost."""
    with EmbeddedServers(tmp_path) as servers:
        await _store(servers, b"kept")
        addresses = servers.nats_url, servers.redis_url
        assert servers.nats is not None
        assert servers.redis is not None

        servers.nats.kill9()
        servers.redis.kill9()
        servers.start_nats()
        servers.start_redis()

        assert (servers.nats_url, servers.redis_url) == addresses
        assert await _load(servers) == (b"kept", b"kept")


def test_other_commands_find_the_servers_while_they_run(tmp_path: Path) -> None:
    """`servers.json` tells both URLs from start to stop, and is gone afterwards."""
    with EmbeddedServers(tmp_path) as servers:
        assert embedded_urls(tmp_path) == {"nats_url": servers.nats_url, "redis_url": servers.redis_url}

    assert embedded_urls(tmp_path) == {}
    assert not (tmp_path / "servers.json").exists()


def test_a_folder_in_use_is_refused_and_its_owner_named(tmp_path: Path) -> None:
    """Two pairs of servers never share files; the refusal leaves the first pair alone."""
    with EmbeddedServers(tmp_path) as servers:
        with pytest.raises(InvalidInput) as refusal:
            EmbeddedServers(tmp_path).start()

        assert f"process {os.getpid()}" in str(refusal.value)
        assert embedded_urls(tmp_path)["nats_url"] == servers.nats_url
        assert redis.Redis.from_url(servers.redis_url).ping()


@pytest.mark.parametrize("server", ["nats", "redis"])
def test_a_port_in_use_is_named(tmp_path: Path, server: str) -> None:
    """A chosen port that is taken is one clear error; no server is left, and the folder is free again."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        with pytest.raises(Unavailable, match=f"port {port} is in use"):
            EmbeddedServers(tmp_path, **{f"{server}_port": port}).start()

    assert _servers_of(tmp_path) == []
    with EmbeddedServers(tmp_path):
        pass


def test_a_free_port_lost_to_a_stranger_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis takes another port when a stranger takes the first, even one that answers like a Redis."""
    with EmbeddedServers(tmp_path / "stranger") as stranger:
        taken = int(stranger.redis_url.rpartition(":")[2].partition("/")[0])
        ports = iter([taken, _free_port()])
        monkeypatch.setattr("workflows.local.servers.free_port", lambda: next(ports))

        with EmbeddedServers(tmp_path / "ours") as ours:
            assert ours.redis_url != stranger.redis_url
            assert redis.Redis.from_url(ours.redis_url).ping()


def test_a_port_that_is_told_between_two_looks_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the servers would be up, and nobody could connect to a port of None."""
    reported, looks = servers._reported_port, []

    def told_at_the_second_look(data_dir: Path, process_id: int) -> int | None:
        looks.append(process_id)
        if len(looks) == 1:
            return None
        deadline_s = time.monotonic() + 30
        while (port := reported(data_dir, process_id)) is None and time.monotonic() < deadline_s:
            time.sleep(0.01)  # a poll: the server writes the file when it is ready, and tells nobody
        return port

    monkeypatch.setattr(servers, "_reported_port", told_at_the_second_look)

    with EmbeddedServers(tmp_path) as running:
        assert int(running.nats_url.rpartition(":")[2]) > 0


@pytest.mark.parametrize(
    ("cores", "sync_always", "chosen", "found"),
    [
        (1, True, None, "1"), (2, True, None, "1"), (2, True, "2", "2"), (2, False, None, None),
        (4, True, None, None), (4, True, "3", "3"),
    ],
)  # fmt: skip
def test_nats_leaves_a_small_machine_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, sync_always: bool, chosen: str | None,
    found: str | None,
) -> None:  # fmt: skip
    """There it works on one core at a time while it syncs each write; the environment has the last word."""
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.delenv("GOMAXPROCS", raising=False)
    if chosen is not None:
        monkeypatch.setenv("GOMAXPROCS", chosen)

    with EmbeddedServers(tmp_path, sync_always=sync_always) as running:
        assert running.nats is not None
        assert psutil.Process(running.nats.pid).environ().get("GOMAXPROCS") == found


def test_a_server_that_dies_at_its_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error carries the server's last words, and where the rest of them is; NATS does not stay behind."""
    broken = tmp_path / "redis-server"
    broken.write_text("#!/bin/sh\necho disk on fire\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("FERRY_REDIS_SERVER", str(broken))

    with pytest.raises(Unavailable) as failure:
        EmbeddedServers(tmp_path / "data").start()

    assert "status 3" in str(failure.value)
    assert "disk on fire" in str(failure.value)
    assert str(tmp_path / "data" / "redis.log") in str(failure.value)
    assert _servers_of(tmp_path) == []


def test_a_missing_server_program_is_told_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    """FERRY_REDIS_SERVER naming nothing is an error, not a silent fall back to another server."""
    monkeypatch.setenv("FERRY_REDIS_SERVER", "/nowhere/redis-server")

    with pytest.raises(Incompatible, match="FERRY_REDIS_SERVER"):
        redis_server_binary()


def test_servers_survive_the_thread_that_started_them(tmp_path: Path) -> None:
    """The kernel's parent-death signal follows threads; ours must follow the process only."""
    servers = EmbeddedServers(tmp_path)
    starter = threading.Thread(target=servers.start)
    starter.start()
    starter.join()
    try:
        assert servers.redis is not None
        assert not until(lambda: servers.redis is None or not servers.redis.running, within_s=0.3)
        assert redis.Redis.from_url(servers.redis_url).ping()
    finally:
        servers.stop()


def test_no_server_outlives_an_owner_killed_with_sigkill(tmp_path: Path) -> None:
    """kill -9 of the owning process takes both servers along, and the folder can be used again at once (Linux)."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with owner:
        assert owner.stdout is not None
        servers = [psutil.Process(int(process_id)) for process_id in owner.stdout.readline().split()]
        assert len(servers) == 2

        owner.kill()
        owner.wait(10)

    with EmbeddedServers(tmp_path):
        assert all(until(lambda server=server: ended(server)) for server in servers)


def test_a_ctrl_c_in_the_terminal_reaches_the_owner_only(tmp_path: Path) -> None:
    """Servers are in sessions of their own, so that nodes can still drain over them after Ctrl-C."""
    with EmbeddedServers(tmp_path) as servers:
        assert servers.nats is not None
        assert servers.redis is not None
        assert len({os.getsid(0), os.getsid(servers.nats.pid), os.getsid(servers.redis.pid)}) == 3


def test_a_process_that_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    """`terminate` is bounded by its grace, and leaves nothing of the process' session."""
    stubborn = LocalProcess(
        "stubborn", ["sh", "-c", "trap '' TERM; sleep 600 & echo $!; wait"], log_path=tmp_path / "stubborn.log"
    ).start()
    assert until(lambda: stubborn.log_tail() != "")
    child = psutil.Process(int(stubborn.log_tail()))

    status = stubborn.terminate(grace_s=0.1)

    assert status == -signal.SIGKILL
    assert until(lambda: ended(child))


def test_a_paused_process_goes_on_where_it_was(tmp_path: Path) -> None:
    """`pause` freezes a server with its connections open; `resume` lets it answer them."""
    with EmbeddedServers(tmp_path) as servers:
        assert servers.redis is not None
        client = redis.Redis.from_url(servers.redis_url, socket_timeout=0.2, retry=None)
        client.set("key", "value")

        servers.redis.pause()
        with pytest.raises(redis.TimeoutError):
            client.get("key")
        servers.redis.resume()

        assert redis.Redis.from_url(servers.redis_url).get("key") == b"value"


async def _store(servers: EmbeddedServers, value: bytes) -> None:
    connection = await nats.connect(servers.nats_url)
    stream = connection.jetstream()
    await stream.add_stream(name="test", subjects=["test.>"])
    await stream.publish("test.key", value)
    await connection.close()
    redis.Redis.from_url(servers.redis_url).set("key", value)


async def _load(servers: EmbeddedServers) -> tuple[bytes | None, bytes | None]:
    connection = await nats.connect(servers.nats_url)
    message = await connection.jetstream().get_last_msg("test", "test.key")
    await connection.close()
    return message.data, redis.Redis.from_url(servers.redis_url).get("key")


def _servers_of(folder: Path) -> list[str]:
    """Command lines of live processes that mention the folder; ours, whose interpreter pytest runs in, do not."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(str(folder) in word for word in words[1:]):
            found.append(json.dumps(words))
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
