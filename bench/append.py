"""`append`: durable commands on distinct actors, beside bare compare-and-set publishes.

The floor is nats-py's `js.publish` with `Nats-Expected-Last-Subject-Sequence`, as many under way, messages as long as
Ferry's records, into as many streams of the same settings on the same server. A command adds the way to its node and
back, and a snapshot every so many.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import nats

from bench.results import Result
from bench.solo import Solo, per_second, servers, solo
from routing.address import ActorId, shard_of
from routing.link import StreamSpec

RUNS, SECONDS, WINDOW = 5, 2.0, 256
EXPECTED = "Nats-Expected-Last-Subject-Sequence"


async def measure(*, runs: int = RUNS, seconds: float = SECONDS) -> list[Result]:
    results = []
    for sync_always, name in ((True, "synced to disk at once"), (False, "synced every two minutes")):
        with servers(sync_always=sync_always) as running:
            async with solo(running, "append") as cluster:
                commands, bare = await _rates(cluster, running.nats_url, runs, seconds)
        results.append(Result(case=name, value=median(commands), unit="/s", floor=median(bare), runs=runs))
    return results


async def _rates(cluster: Solo, url: str, runs: int, seconds: float) -> tuple[list[float], list[float]]:
    """(commands a second, bare publishes a second) of each run; the two take turns."""
    actors = [ActorId("blob", f"written-{number}") for number in range(WINDOW)]
    record = await _record_of(cluster, actors[0])
    client = await nats.connect(url)
    stream = client.jetstream(timeout=30)
    await _make_streams(cluster)
    last = [0] * WINDOW

    async def publish(number: int) -> None:
        subject = f"floor.{number % cluster.birth.logs}.{number}"
        acknowledged = await stream.publish(subject, record, headers={EXPECTED: str(last[number])})
        last[number] = acknowledged.seq

    async def command(number: int) -> None:
        await cluster.client.send_message(actors[number], "touch", timeout=30)

    commands, bare = [], []
    try:
        await per_second(command, window=WINDOW, seconds=seconds / 4)
        await per_second(publish, window=WINDOW, seconds=seconds / 4)
        for _ in range(runs):
            commands.append(await per_second(command, window=WINDOW, seconds=seconds))
            bare.append(await per_second(publish, window=WINDOW, seconds=seconds))
    finally:
        await client.close()
    return commands, bare


async def _record_of(cluster: Solo, actor: ActorId) -> bytes:
    """What Ferry stores for one command; the sixteenth, half way to a snapshot."""
    for _ in range(16):
        await cluster.client.send_message(actor, "touch")
    shard = shard_of(actor, cluster.birth.shards)
    subjects = cluster.subjects
    stored = await cluster.link.last(subjects.log_of(shard), subjects.events(shard, actor), timeout_s=5.0)
    assert stored is not None
    return stored.payload


async def _make_streams(cluster: Solo) -> None:
    spec = StreamSpec(name="", subjects=())  # as routing.birth makes the logs
    for log in range(cluster.birth.logs):
        await cluster.link.ensure_stream(
            replace(spec, name=f"floor-{log}", subjects=(f"floor.{log}.>",)), timeout_s=10.0
        )
