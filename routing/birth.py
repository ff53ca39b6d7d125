"""What a cluster is born with: its streams and buckets, its number of shards and logs. Fixed for its life."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass

import orjson

from routing.errors import Incompatible, InDoubt, InvalidInput, Timeout, Unavailable, WrongSequence
from routing.link import Entry, Link, StreamSpec
from routing.logs import get_logger
from routing.settings import MAX_LOGS, MAX_SHARDS, Settings
from routing.subjects import CLUSTER_KEY, Subjects, kv_stream, kv_subject
from routing.typed import reader

log = get_logger("ferry.birth")

WIRE_VERSION = 1
TIMEOUT_S = 10.0  # creating a replicated stream may take an election
ELECTION_S = 10.0  # of a stream's first leader
RETRY_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Birth:
    """What is fixed for a cluster's life. `id` tells it from any other; empty where an earlier version founded it."""

    shards: int
    logs: int
    wire: int
    id: str = ""


_read = reader(Birth, "its birth document")


async def found_or_join(link: Link, settings: Settings) -> Birth:
    """Create what is missing, then read what the cluster was born with.

    Tried again for ELECTION_S: where several start at once, the replicas of a stream that another has just made may
    not have elected their leader yet. Raises Unavailable, Timeout after that; Incompatible when the cluster was born
    otherwise than `settings` say, or speaks another wire version.
    """
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + ELECTION_S
    while True:
        try:
            return await _found_or_join(link, settings)
        except (Unavailable, Timeout) as error:
            if loop.time() >= deadline_s:
                raise
            log.info("cluster not joined yet", cluster=settings.cluster, error=str(error))
        await asyncio.sleep(RETRY_S)


async def _found_or_join(link: Link, settings: Settings) -> Birth:
    subjects = settings.subjects
    wanted = Birth(shards=settings.shards, logs=settings.logs, wire=WIRE_VERSION, id=uuid.uuid4().hex)
    map_stream = StreamSpec(
        name=kv_stream(subjects.map_bucket), subjects=(kv_subject(subjects.map_bucket, ">"),), keep=1,
        replicas=settings.replicas,
    )  # fmt: skip
    await link.ensure_stream(map_stream, timeout_s=TIMEOUT_S)
    subject = kv_subject(subjects.map_bucket, CLUSTER_KEY)
    document = orjson.dumps(asdict(wanted))
    with suppress(WrongSequence, InDoubt):  # born already, or we cannot tell: reading decides
        await link.append(subject, document, expected=0, timeout_s=TIMEOUT_S)
    born = await read_birth(link, subjects)
    for name in ("shards", "logs"):
        if getattr(born, name) != getattr(wanted, name):
            raise Incompatible(
                f"cluster {settings.cluster} was born with {getattr(born, name)} {name}, not {getattr(wanted, name)}:"
                f" set FERRY_{name.upper()}={getattr(born, name)}, or choose another FERRY_CLUSTER"
            )
    for name, log_subjects in subjects.log_streams():
        spec = StreamSpec(name=name, subjects=(log_subjects,), direct=True, replicas=settings.replicas)
        await link.ensure_stream(spec, timeout_s=TIMEOUT_S)
    leases = StreamSpec(
        name=kv_stream(subjects.lease_bucket), subjects=(kv_subject(subjects.lease_bucket, ">"),), keep=1, ttl=True,
        replicas=settings.replicas,
    )  # fmt: skip
    await link.ensure_stream(leases, timeout_s=TIMEOUT_S)
    return born


async def read_birth(link: Link, subjects: Subjects) -> Birth:
    """Raises Unavailable when no such cluster was ever started here, Incompatible for another wire version."""
    stored = await last_birth(link, subjects, timeout_s=TIMEOUT_S)
    if stored is None:
        raise Unavailable(f"no cluster named {subjects.cluster!r} here: start a node first, or check FERRY_CLUSTER")
    return decode_birth(stored.payload, subjects.cluster)


async def last_birth(link: Link, subjects: Subjects, *, timeout_s: float) -> Entry | None:
    """The birth document as it is stored. Raises StreamMissing, Unavailable, Timeout."""
    subject = kv_subject(subjects.map_bucket, CLUSTER_KEY)
    return await link.last(kv_stream(subjects.map_bucket), subject, timeout_s=timeout_s)


def decode_birth(payload: bytes, cluster: str) -> Birth:
    """Raises Incompatible for another wire version, and for what no Ferry wrote."""
    try:
        born = _read(payload)
    except InvalidInput as error:
        raise Incompatible(f"cluster {cluster}: {error}") from error
    if born.wire != WIRE_VERSION:
        raise Incompatible(
            f"cluster {cluster} speaks wire version {born.wire}, this is {WIRE_VERSION}:"
            " install the matching actor-ferry"
        )
    if not 1 <= born.shards <= MAX_SHARDS or not 1 <= born.logs <= MAX_LOGS:
        raise Incompatible(
            f"cluster {cluster} was born with {born.shards} shards and {born.logs} logs: nobody can serve that"
        )
    return born
