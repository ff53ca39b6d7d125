"""Is everything in place? `ferry doctor`: one finding after the other, each with its mend."""

from __future__ import annotations

import asyncio
import platform
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson
from redis.asyncio import Redis
from redis.exceptions import RedisError

from routing.birth import read_birth
from routing.errors import FerryError
from routing.link import Link
from routing.nats_link import NatsLink
from routing.settings import Settings, embedded_urls
from routing.subjects import Subjects, kv_stream
from workflows.status import Status, gather_status, problems

ASK_S = 3.0
SKEW_WARN_S = 1.0  # commands carry a deadline by the sender's clock; a second is a tenth of the default one
SLOW_RTT_S = 0.05  # every command appends once and every step asks twice: from here on moves feel slow

_PACKAGES = {"ferry": "actor-ferry", "celery": "celery", "nats-py": "nats-py", "redis-py": "redis", "flower": "flower"}


class Verdict(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at. `mend` says what to do about it; empty when there is nothing to do."""

    check: str
    verdict: Verdict
    found: str
    mend: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


async def examine(settings: Settings) -> list[Finding]:
    """Look at everything, in the order in which one thing needs the other. Raises nothing for what is broken."""
    status, of_nats, of_redis = await asyncio.gather(
        gather_status(settings, all_workers=True), _nats(settings), _redis(settings)
    )
    return [*_versions(), *of_nats, *of_redis, *_cluster(status)]


def _versions() -> list[Finding]:
    found = [Finding(check="python", verdict=Verdict.OK, found=platform.python_version())]
    for name, package in _PACKAGES.items():
        try:
            found.append(Finding(check=name, verdict=Verdict.OK, found=version(package)))
        except PackageNotFoundError:
            mend = "pip install actor-ferry"
            found.append(Finding(check=name, verdict=Verdict.WARN, found="not installed", mend=mend))
    return found


# -- NATS --------------------------------------------------------------------------------------------------------------
async def _nats(settings: Settings) -> list[Finding]:
    try:
        link = await NatsLink.connect(settings.nats_url, name="ferry-doctor")
    except FerryError as error:
        return [_failed("nats", error)]
    try:
        rtt_s = await link.rtt()
        reached = Finding(
            check="nats",
            verdict=Verdict.OK if rtt_s < SLOW_RTT_S else Verdict.WARN,
            found=f"nats-server {link.server_version} at {link.url}, {rtt_s * 1000:.1f} ms away",
            mend="" if rtt_s < SLOW_RTT_S else "run nodes and NATS closer to each other",
        )
        return [reached, _sync(settings), *await _streams(link, settings)]
    except FerryError as error:
        return [_failed("nats", error)]
    finally:
        await link.close()


def _sync(settings: Settings) -> Finding:
    """Only the server's own configuration file tells; there is none to read but that of our embedded server."""
    if embedded_urls(Path(settings.data_dir)).get("nats_url") == settings.nats_url:
        config = Path(settings.data_dir) / "nats" / "server.conf"
        if config.is_file() and "sync_interval: always" in config.read_text():
            return Finding(check="sync_interval", verdict=Verdict.OK, found="always (embedded server)")
        return Finding(
            check="sync_interval", verdict=Verdict.WARN, found="every two minutes (embedded server)",
            mend="FERRY_NATS_SYNC_ALWAYS=1, or a power cut loses what was acknowledged in the last two minutes",
        )  # fmt: skip
    return Finding(
        check="sync_interval", verdict=Verdict.WARN, found="unknown: only the server's configuration tells",
        mend="check that its jetstream block says sync_interval: always; the default loses two minutes in a power cut",
    )  # fmt: skip


async def _streams(link: Link, settings: Settings) -> list[Finding]:
    try:
        born = await read_birth(link, settings.subjects)
    except FerryError as error:
        return [_failed("cluster", error)]
    subjects = Subjects(settings.cluster, born.logs)
    shape = f"{subjects.cluster}: {born.shards} shards, {born.logs} logs"
    found = [Finding(check="cluster", verdict=Verdict.OK, found=shape)]
    for name in ("shards", "logs"):
        if getattr(born, name) != getattr(settings, name):
            found.append(
                Finding(
                    check=f"FERRY_{name.upper()}", verdict=Verdict.WARN,
                    found=f"{getattr(settings, name)} here, but the cluster was born with {getattr(born, name)}",
                    mend=f"set FERRY_{name.upper()}={getattr(born, name)}, or nodes started here are refused",
                )
            )  # fmt: skip
    names = [kv_stream(subjects.map_bucket), kv_stream(subjects.lease_bucket), *(s for s, _ in subjects.log_streams())]
    infos = await asyncio.gather(*(link.request(f"$JS.API.STREAM.INFO.{s}", b"", timeout_s=ASK_S) for s in names))
    return [*found, _replicas(dict(zip(names, map(orjson.loads, infos), strict=True)))]


def _replicas(infos: dict[str, dict[str, Any]]) -> Finding:
    missing = [name for name, info in infos.items() if "error" in info]
    if missing:
        return Finding(
            check="streams", verdict=Verdict.FAIL, found=f"cannot be read: {', '.join(missing)}",
            mend="start a node, which creates what is missing, or check the permissions in FERRY_NATS_URL",
        )  # fmt: skip
    behind = sorted(
        {
            f"{name} on {replica['name']}"
            for name, info in infos.items()
            for replica in info.get("cluster", {}).get("replicas", ())
            if replica.get("offline") or not replica.get("current")
        }
    )
    if behind:
        return Finding(
            check="replicas", verdict=Verdict.FAIL, found=f"offline or behind: {', '.join(behind)}",
            mend="bring that NATS server back before another one fails",
        )  # fmt: skip
    fewest = min(info["config"]["num_replicas"] for info in infos.values())
    return Finding(
        check="replicas", verdict=Verdict.OK if fewest >= 3 else Verdict.WARN,
        found=f"R{fewest}: " + (f"every message on {fewest} servers" if fewest > 1 else "one copy of everything"),
        mend="" if fewest >= 3 else "a lost disk loses the cluster; on three NATS servers, FERRY_REPLICAS=3 at birth",
    )  # fmt: skip


# -- Redis -------------------------------------------------------------------------------------------------------------
async def _redis(settings: Settings) -> list[Finding]:
    try:
        redis = Redis.from_url(settings.redis_url, socket_timeout=ASK_S, socket_connect_timeout=ASK_S)
    except ValueError as error:
        return [_failed("redis", error)]
    try:
        asked_at = time.time()
        seconds, microseconds = await redis.time()
        skew_s = abs(seconds + microseconds / 1e6 - (asked_at + time.time()) / 2)
        server, memory, storage = [await redis.info(section) for section in ("server", "memory", "persistence")]
    except (RedisError, OSError) as error:
        return [
            Finding(
                check="redis", verdict=Verdict.FAIL, found=str(error),
                mend="start it (`ferry up`, or redis-server), or correct FERRY_REDIS_URL",
            )
        ]  # fmt: skip
    finally:
        await redis.aclose()
    name = f"valkey {server['valkey_version']}" if "valkey_version" in server else f"redis {server['redis_version']}"
    keeps, evicts = bool(storage.get("aof_enabled")), memory.get("maxmemory_policy", "noeviction") != "noeviction"
    return [
        Finding(check="redis", verdict=Verdict.OK, found=f"{name}, {'with' if keeps else 'without'} append-only file"),
        *([] if keeps else [_WITHOUT_AOF]),
        *([_EVICTS] if evicts else []),
        Finding(
            check="clock", verdict=Verdict.OK if skew_s < SKEW_WARN_S else Verdict.WARN,
            found=f"{skew_s * 1000:.0f} ms apart from Redis'",
            mend="" if skew_s < SKEW_WARN_S else "run NTP on both machines: commands expire by the sender's clock",
        ),
    ]  # fmt: skip


_WITHOUT_AOF = Finding(
    check="redis appendonly", verdict=Verdict.WARN, found="no",
    mend="CONFIG SET appendonly yes; else its restart forgets the records of past moves (no actor depends on them)",
)  # fmt: skip
_EVICTS = Finding(
    check="redis maxmemory-policy", verdict=Verdict.FAIL, found="it may evict keys",
    mend="CONFIG SET maxmemory-policy noeviction; else tasks and records vanish without a word",
)  # fmt: skip


# -- what runs ---------------------------------------------------------------------------------------------------------
def _cluster(status: Status) -> list[Finding]:
    """Leader, nodes and workers, then what `ferry status` calls problems."""
    found = []
    if status.leader is not None:
        found.append(Finding(check="coordinator", verdict=Verdict.OK, found=f"{status.leader} leads"))
    if status.members:
        found.append(Finding(check="nodes", verdict=Verdict.OK, found=", ".join(status.members)))
    if status.workers:
        found.append(Finding(check="workers", verdict=Verdict.OK, found=", ".join(status.workers)))
    if status.nats_error is None:
        locks = [lock.unit for lock in status.locks]
        found.append(Finding(check="locks", verdict=Verdict.OK, found=f"{len(locks)} held"))
    servers = (status.nats_error, status.redis_error)
    for problem in problems(status):
        if problem not in servers:
            said, _, mend = problem.partition(": ")
            found.append(Finding(check="status", verdict=Verdict.FAIL, found=said, mend=mend))
    return found


def _failed(check: str, error: Exception) -> Finding:
    said, _, mend = str(error).rpartition(": ")
    return Finding(check=check, verdict=Verdict.FAIL, found=said or mend, mend=mend if said else "")
