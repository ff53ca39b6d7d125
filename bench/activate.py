"""`activate`: cold actors brought back to life by one node, each from a snapshot and ten events.

Their logs are written beforehand and a node process is started on them; each actor is then asked one query, which
warms everything up. Then they are put to rest and asked again, ROUNDS times, and that is measured. Once with little
else in the logs and once with many other messages: recovery must not cost more in a long log. FERRY_BENCH_MESSAGES sets
their number. Each run has servers and a node of its own.
"""

from __future__ import annotations

import asyncio
import os
import time
from statistics import median

from bench.actors import Blob
from bench.cluster import until
from bench.results import Result
from bench.solo import SHARDS, give_all_to, node_process, servers
from routing.address import ActorId, shard_of
from routing.birth import Birth, found_or_join
from routing.client import Cluster
from routing.control import ask
from routing.errors import InvalidInput
from routing.nats_link import NatsLink
from routing.settings import Settings
from routing.subjects import Subjects
from runtime.journal import Journal, Kind, Record
from runtime.live_actor import LiveActor, new_instance
from runtime.memory import Limits, Memory
from workflows.local import EmbeddedServers

RUNS, ACTORS, ROUNDS, EVENTS, WINDOW = 5, 900, 4, 10, 256
REST_AFTER_S = 1.0  # how soon the node puts an unused actor to rest
SHORT, LONG = 10_000, 1_000_000
ASK_S = 5.0
BATCH = 20_000  # unacknowledged messages; each log counts what it has stored before the next go out


async def measure(
    *, runs: int = RUNS, actors: int = ACTORS, rounds: int = ROUNDS, messages: tuple[int, int] | None = None
) -> list[Result]:
    """Raises InvalidInput for a log that is not longer than the short one."""
    short, long = messages or (SHORT, int(os.environ.get("FERRY_BENCH_MESSAGES", LONG)))
    if long <= short:
        raise InvalidInput(f"FERRY_BENCH_MESSAGES is {long}: must be more than {short}, the length of the short log")
    rates: dict[int, list[float]] = {short: [], long: []}
    for _ in range(runs):
        for length, found in rates.items():  # in turns, because the machine is not always alike
            with servers(sync_always=False) as running:
                found.append(await _activations(running, actors, rounds=rounds, messages=length))
    in_short, in_long = median(rates[short]), median(rates[long])
    return [
        Result(case=f"log of {short:,} messages", value=in_short, unit="actors/s", runs=runs),
        Result(case=f"log of {long:,} messages", value=in_long, unit="actors/s", floor=in_short, runs=runs),
    ]


async def _activations(running: EmbeddedServers, actors: int, *, rounds: int, messages: int) -> float:
    """Actors a second, of so many that all come back `rounds` times."""
    settings = Settings(cluster="cold", shards=SHARDS, nats_url=running.nats_url)
    link = await NatsLink.connect(running.nats_url, name="bench")
    try:
        birth = await found_or_join(link, settings)
        subjects = Subjects("cold", birth.logs)
        cold = [ActorId("blob", f"cold-{number}") for number in range(actors)]
        others = messages - len(cold) * (1 + EVENTS)
        await _fill(link, subjects, birth, others // 2)
        await _write_logs(link, subjects, birth, cold)
        await _fill(link, subjects, birth, others - others // 2)
        with node_process(running, "cold", env={"FERRY_PASSIVATE_AFTER_S": f"{REST_AFTER_S:g}"}):
            await give_all_to(link, subjects, birth, "a")
            async with Cluster.connect(running.nats_url, cluster="cold") as client:
                await _ask_all(client, cold)
                took_s = 0.0
                for _ in range(rounds):
                    await until(lambda: _all_at_rest(link, subjects), "the actors to be put to rest")
                    took_s += await _ask_all(client, cold)
            activated = (await ask(link, subjects, "a", "status", timeout_s=ASK_S))["counters"]["activations"]
        if activated != (1 + rounds) * actors:
            raise RuntimeError(f"{activated} activations of {actors} actors in {1 + rounds} rounds")
        return rounds * actors / took_s
    finally:
        await link.close()


async def _all_at_rest(link: NatsLink, subjects: Subjects) -> bool | None:
    status = await ask(link, subjects, "a", "status", timeout_s=ASK_S)
    return True if status["actors"] == 0 else None


async def _ask_all(client: Cluster, actors: list[ActorId]) -> float:
    """Seconds until each has answered a query."""
    waiting = list(actors)
    began_s = time.perf_counter()  # uvloop's own clock ticks in milliseconds

    async def caller() -> None:
        while waiting:
            commands = await client.send_message(waiting.pop(), "count", timeout=30)
            if commands != EVENTS:
                raise RuntimeError(f"an actor came back with {commands} of its {EVENTS} events")

    await asyncio.gather(*(caller() for _ in range(WINDOW)))
    return time.perf_counter() - began_s


async def _write_logs(link: NatsLink, subjects: Subjects, birth: Birth, actors: list[ActorId]) -> None:
    """A snapshot of a new actor and ten commands after it, for each of `actors`."""
    journal = Journal(link, subjects, shards_total=birth.shards, append_timeout_s=30.0)
    waiting = list(actors)

    async def writer() -> None:
        while waiting:
            await _write_log(journal, waiting.pop())

    await asyncio.gather(*(writer() for _ in range(WINDOW)))


async def _write_log(journal: Journal, actor: ActorId) -> None:
    live = LiveActor(actor)
    instance = new_instance(Blob)
    live.stand_at(instance, Memory(Limits(128, 64)), version=0, epoch=1, trail=())
    snapshot = await live.snapshot(epoch=1, incarnation="written", max_state_bytes=2**20)
    live.stored(snapshot, await journal.append(actor, snapshot, after=0))
    for number in range(EVENTS):
        record = Record(
            kind=Kind.COMMAND, epoch=1, incarnation="written", trail=live.trail, message_id=f"{actor.key}-{number}",
            events=[["touched", {}]], reply=number + 1,
        )  # fmt: skip
        live.stored(record, await journal.append(actor, record, after=live.version))


async def _fill(link: NatsLink, subjects: Subjects, birth: Birth, messages: int) -> None:
    """Other actors' messages: published without waiting for each one, counted at the end of a batch."""
    streams = [name for name, _ in subjects.log_streams()]
    before = await _stored(link, streams)
    sent = 0
    while sent < messages:
        for number in range(sent, min(sent + BATCH, messages)):
            actor = ActorId("blob", f"other-{number % 100_000}")
            await link.publish(subjects.events(shard_of(actor, birth.shards), actor), b"x" * 100)
        sent = min(sent + BATCH, messages)
        await until(lambda target=before + sent: _reached(link, streams, target), "the log to be filled", pause_s=0.01)


async def _reached(link: NatsLink, streams: list[str], target: int) -> bool | None:
    return True if await _stored(link, streams) >= target else None


async def _stored(link: NatsLink, streams: list[str]) -> int:
    infos = [await link._ask(f"STREAM.INFO.{stream}", None, 5.0) for stream in streams]
    return sum(int(info["state"]["messages"]) for info in infos)
