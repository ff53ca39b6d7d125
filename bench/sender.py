"""A steady sender in a process of its own: `python -m bench.sender ACTORS RATE FILE`; SIGTERM ends it.

Open loop: commands begin at their times whether or not earlier ones were answered, so that a stop of the cluster shows
as many slow commands and not as one. Every actor gets its turn before any gets the second one.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import uvloop

from routing.client import Cluster
from routing.errors import FerryError
from routing.settings import Settings

TIMEOUT_S = 20.0


@dataclass(slots=True)
class Sent:
    """What came of the commands: when each began (Unix seconds) and how long its answer took."""

    began_at: list[float] = field(default_factory=list)
    took_ms: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def during(self, began_at: float, ended_at: float) -> list[float]:
        """Milliseconds of the commands that were under way at some time between the two."""
        times = zip(self.began_at, self.took_ms, strict=True)
        return [ms for at, ms in times if at <= ended_at and at + ms / 1000 >= began_at]


async def run(actors: int, rate: float, stopping: asyncio.Event) -> Sent:
    settings, sent = Settings.load(), Sent()
    order = random.Random(1).sample(range(actors), actors)

    async def touch(cluster: Cluster, number: int) -> None:
        began_at, began_s = time.time(), time.perf_counter()
        try:
            await cluster.send_message(actor_name(number), "touch", timeout=TIMEOUT_S)
        except FerryError as error:
            sent.failed.append(str(error))
        else:
            sent.began_at.append(began_at)
            sent.took_ms.append((time.perf_counter() - began_s) * 1000)

    async with Cluster.connect(settings.nats_url, cluster=settings.cluster) as cluster, asyncio.TaskGroup() as group:
        began_s, count = time.perf_counter(), 0
        while not stopping.is_set():
            while count < (time.perf_counter() - began_s) * rate:
                group.create_task(touch(cluster, order[count % actors]))
                count += 1
            await asyncio.sleep(1 / rate)
    return sent


def actor_name(number: int) -> str:
    return f"blob/{number}"


def read(path: Path) -> Sent:
    return Sent(**json.loads(path.read_text()))


async def main(actors: int, rate: float, path: Path) -> None:
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    sent = await run(actors, rate, stopping)
    await asyncio.to_thread(path.write_text, json.dumps(asdict(sent)))


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])))
