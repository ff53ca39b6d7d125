"""One frozen object per process: what the environment and `.env` say, checked once at start-up.

Every mistake is reported at once. The time settings must keep the order the protocol needs for liveness (safety
uses no clock): append < drain < step < pause lease < lock lease < hard limit < visibility timeout.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dotenv import dotenv_values
from environs import Env, EnvValidationError

from routing.address import check_node_id
from routing.errors import InvalidInput
from routing.nats_url import SCHEMES, check_address, check_servers
from routing.subjects import Subjects

DEFAULT_NATS_URL = "nats://127.0.0.1:4222"
DEFAULT_REDIS_URL = "redis://127.0.0.1:6379/0"
DEFAULT_DATA_DIR = ".ferry"
ENV_FILE = ".env"  # of the current folder
MAX_LOGS = 64
MAX_SHARDS = 65_536
_DATABASE = re.compile(r"(/[0-9]*)?")  # redis-py takes 0 for any other path, and Celery ends with a traceback


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings, each read from `FERRY_<NAME>`. Times are seconds, sizes bytes."""

    cluster: str = "default"
    nats_url: str = DEFAULT_NATS_URL
    redis_url: str = DEFAULT_REDIS_URL
    data_dir: str = DEFAULT_DATA_DIR  # the embedded servers' files, and where other commands find their ports
    node_id: str = ""
    actors: tuple[str, ...] = ()  # modules to import
    shards: int = 256  # fixed at the cluster's birth
    logs: int = 4  # streams the journal is spread over; fixed at birth
    replicas: int = 1  # of every stream; 3 on a NATS cluster
    nats_sync_always: bool = True  # embedded NATS only: fsync before every acknowledgement

    append_timeout_s: float = 2.0
    drain_handlers_s: float = 4.0
    step_timeout_s: float = 5.0
    pause_lease_s: float = 10.0
    lock_lease_s: float = 30.0
    task_time_limit_s: float = 60.0
    visibility_timeout_s: float = 75.0
    node_lease_s: float = 5.0
    leader_lease_s: float = 5.0
    debounce_s: float = 0.5  # membership must be quiet this long before a plan
    drain_timeout_s: float = 120.0

    buffer_messages: int = 10_000  # commands waiting at a closed gate, per shard
    buffer_bytes: int = 16 * 2**20
    buffer_messages_per_sender: int = 5_000  # of those: one client must not take all the room
    mailbox_messages: int = 1_000  # commands waiting for one actor
    max_command_bytes: int = 512 * 1024
    max_state_bytes: int = 256 * 2**20
    chunk_bytes: int = 64 * 1024
    transfer_window_bytes: int = 2**20
    transfer_held_bytes: int = 2**30  # of states on their way, held by a node as source, and as destination
    precopy_from_bytes: int = 1  # states from this size on are sent before the gate is closed
    precopy_bytes_per_s: int = 32 * 2**20  # how fast, because their actors and all others go on meanwhile
    snapshot_every: int = 32  # commands between two snapshots of an actor; more for one in pieces
    snapshot_piece_bytes: int = 512 * 1024  # a larger snapshot is stored in pieces of this size
    dedup_window: int = 128  # latest command ids remembered per actor
    sessions_remembered: int = 64  # ordered sender sessions remembered per actor
    passivate_after_s: float = 600.0
    moves_at_once: int = 2  # chains per source and per destination: bounds what is paused at once
    blackout_budget_s: float = 0.08  # a shard's stop: fewer stand still at once after one that took longer
    moves_per_chain: int = 5  # small shards that go the same way share a chain
    records_kept: int = 100_000

    def __post_init__(self) -> None:
        problems = [*_range_problems(self), *_time_problems(self)]
        checks: list[tuple[Callable[[str], object], str]] = [
            (_check_nats_url, self.nats_url), (_check_redis_url, self.redis_url), (Subjects, self.cluster),
        ]  # fmt: skip
        if self.node_id:
            checks.append((check_node_id, self.node_id))
        for check, value in checks:
            try:
                check(value)
            except InvalidInput as error:
                problems.append(str(error))
        if problems:
            raise InvalidInput("; ".join(problems))

    @property
    def subjects(self) -> Subjects:
        return Subjects(self.cluster, self.logs)

    @classmethod
    def load(cls, env_file: str | Path = ENV_FILE, **overrides: Any) -> Settings:
        """Read the environment, then `.env`; `overrides` that are not None win (command-line options).

        Without FERRY_NATS_URL or FERRY_REDIS_URL, the embedded servers of this data folder are used while they run.
        Raises InvalidInput listing every mistake.
        """
        values, problems = _read(env_file)
        values.update({name: value for name, value in overrides.items() if value is not None})
        if "actors" in values:
            values["actors"] = tuple(module.strip() for module in values["actors"] if module.strip())
        for name, url in embedded_urls(Path(values.get("data_dir", DEFAULT_DATA_DIR))).items():
            values.setdefault(name, url)
        try:
            settings = cls(**values)
        except InvalidInput as error:
            problems.append(str(error))
        if problems:
            raise InvalidInput("; ".join(problems))
        return settings


def variables(env_file: str | Path = ENV_FILE) -> dict[str, str]:
    """Every FERRY_ variable as it is written in the environment, else in `.env`: those that are no settings, too.

    Raises InvalidInput when the file cannot be read.
    """
    found = {**_of_file(env_file), **os.environ}
    return {name: value for name, value in found.items() if name.startswith("FERRY_")}


def _of_file(env_file: str | Path) -> dict[str, str]:
    """What a file of variables says, nothing when there is none. Raises InvalidInput when it cannot be read."""
    try:
        text = Path(env_file).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidInput(
            f"settings cannot be read from {env_file} ({reason}): make it a text file, or remove it"
        ) from error
    return {name: value for name, value in dotenv_values(stream=StringIO(text)).items() if value is not None}


def _read(env_file: str | Path) -> tuple[dict[str, Any], list[str]]:
    """(what is set, by name; what cannot be read): the environment wins over the file, which stays out of it."""
    env = Env(eager=False, prefix="FERRY_")
    problems = []
    try:
        _of_file(env_file)
        env.read_env(env_file, recurse=False)
    except InvalidInput as error:
        problems.append(str(error))
    read: dict[str, Any] = {
        "str": env.str, "int": env.int, "float": env.float, "bool": env.bool, "tuple[str, ...]": env.list,
    }  # fmt: skip
    values = {field.name: read[str(field.type)](field.name.upper(), None) for field in fields(Settings)}
    try:
        env.seal()
    except EnvValidationError as error:
        wrong: Any = error.error_messages  # environs types them wider than it raises them
        problems += [f"{name}: {' '.join(why)}" for name, why in wrong.items()]
    return {name: value for name, value in values.items() if value not in (None, "")}, problems  # "": left out


def embedded_urls(data_dir: Path) -> dict[str, str]:
    """`{"nats_url": ..., "redis_url": ...}` of embedded servers running from `data_dir`; empty when none run."""
    try:
        running = json.loads((data_dir / "servers.json").read_text())
        os.kill(int(running["pid"]), 0)
        return {"nats_url": str(running["nats_url"]), "redis_url": str(running["redis_url"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # no file, not ours, or the process is gone: nothing runs here


def _range_problems(s: Settings) -> list[str]:
    problems = []
    if not 1 <= s.shards <= MAX_SHARDS:
        problems.append(f"FERRY_SHARDS={s.shards}: use 1 to {MAX_SHARDS}")
    if not 1 <= s.logs <= MAX_LOGS:
        problems.append(f"FERRY_LOGS={s.logs}: use 1 to {MAX_LOGS}")
    if s.replicas not in (1, 3, 5):
        problems.append(f"FERRY_REPLICAS={s.replicas}: use 1, 3 or 5")
    for field in fields(s):
        value = getattr(s, field.name)
        if field.name in ("shards", "logs", "replicas") or not isinstance(value, (int, float)):
            continue
        if not (0 < value < math.inf or isinstance(value, bool)):
            problems.append(f"FERRY_{field.name.upper()}={value}: must be finite and greater than 0")
    return problems


def _check_nats_url(urls: str) -> None:
    if not urls.startswith(SCHEMES):
        raise InvalidInput(f"FERRY_NATS_URL={urls}: must start with {' or '.join(SCHEMES)}")
    check_servers(urls, "FERRY_NATS_URL")


def _check_redis_url(url: str) -> None:
    if not url.startswith(("redis://", "rediss://", "unix://")):
        raise InvalidInput(f"FERRY_REDIS_URL={url}: must start with redis:// or rediss://")
    check_address(url, "FERRY_REDIS_URL")
    read = urlsplit(url)
    if read.scheme != "unix" and not _DATABASE.fullmatch(read.path):
        raise InvalidInput("FERRY_REDIS_URL is malformed: after the host comes the number of a database, e.g. /0")


# A wait must outlive what it waits for, or a live step is taken for a dead one (Dapr #9897, Akka #29711).
_LADDER = (
    "append_timeout_s", "drain_handlers_s", "step_timeout_s", "pause_lease_s", "lock_lease_s", "task_time_limit_s",
    "visibility_timeout_s",
)  # fmt: skip


def _time_problems(s: Settings) -> list[str]:
    return [
        f"FERRY_{shorter.upper()} ({getattr(s, shorter):g}) must be less than"
        f" FERRY_{longer.upper()} ({getattr(s, longer):g})"
        for shorter, longer in pairwise(_LADDER)
        if getattr(s, shorter) >= getattr(s, longer)
    ]
