"""Keeps aircraft flying and checks every answer, so that you can move them and see that nothing is lost or doubled.

python -m examples.load --seconds 12        # in the folder of a running `ferry up`
"""

from __future__ import annotations

import asyncio
import os
import time

import click

from routing.client import Cluster
from routing.settings import Settings

PAUSE_S = 0.02  # between two flights of one aircraft


async def fly(seconds: float, aircraft: int) -> list[float]:
    """Fly each aircraft one flight after the other; returns how long each answer took, in milliseconds, in order.

    Raises AssertionError when an answer is not the number of flights so far: one was lost, or applied twice.
    """
    settings = Settings.load()
    took_ms: list[float] = []
    until_s = time.monotonic() + seconds
    run = os.urandom(3).hex()  # so that a second load does not repeat the first one's message ids

    async def one(cluster: Cluster, tail_number: str) -> None:
        before = (await cluster.send_message(f"aircraft/{tail_number}", "totals"))["flights"]
        count = 0
        while time.monotonic() < until_s:
            began_s = time.perf_counter()
            count += 1
            answer = await cluster.send_message(
                f"aircraft/{tail_number}", "fly", {"distance": 100}, message_id=f"{run}-{count}"
            )
            took_ms.append((time.perf_counter() - began_s) * 1000)
            assert answer == before + count, f"flight {count} of {tail_number} was counted as {answer - before}"
            await asyncio.sleep(PAUSE_S)

    async with Cluster.connect(settings.nats_url, cluster=settings.cluster) as cluster, asyncio.TaskGroup() as group:
        for number in range(aircraft):
            group.create_task(one(cluster, f"N{14228 + number}"))
    return sorted(took_ms)


@click.command()
@click.option("--seconds", default=10.0, show_default=True, help="How long.")
@click.option("--aircraft", default=20, show_default=True, help="How many actors.")
def main(seconds: float, aircraft: int) -> None:
    """Fly, check every answer, and say how long the slowest took."""
    took_ms = asyncio.run(fly(seconds, aircraft))
    click.echo(
        f"{len(took_ms):,} commands acknowledged, each once and in order;"
        f" slowest {took_ms[-1]:.0f} ms, p50 {took_ms[len(took_ms) // 2]:.1f} ms"
    )


if __name__ == "__main__":
    main()
