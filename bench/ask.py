"""`ask`: a query of an actor in another process, beside nats-py's own request between two processes; and a local one.

Question and answer of the floor are as long as Ferry's, and as little is in its headers: nothing. Both ends run on
uvloop. Runs of either alternate, so that both see the same machine. Where xoscar or Ray is installed, a call of one of
their actors in another process is measured as well.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import import_module
from statistics import median

import nats

from bench.responder import SUBJECT
from bench.results import Result, percentile
from bench.solo import node_here, per_second, servers, solo
from routing.address import ActorId
from routing.envelope import Answer, Command, encode_answer, encode_command
from routing.router import new_message_id

RUNS, SECONDS, LATENCIES, WINDOW = 5, 2.0, 1_500, 256
PEERS = ("xoscar", "ray")

Ask = Callable[[int], Awaitable[object]]


async def measure(*, runs: int = RUNS, seconds: float = SECONDS, latencies: int = LATENCIES) -> list[Result]:
    actors = [ActorId("blob", f"asked-{number}") for number in range(WINDOW)]
    with servers(sync_always=False) as running:
        async with (
            solo(running, "remote") as remote,
            node_here(running, "local") as here,
            bare_request(running.nats_url, _question(actors[0]), _answer()) as bare,
        ):
            send, send_here = remote.client.send_message, here.router.send_message
            ask = lambda number: send(actors[number], "count")  # noqa: E731
            ask_here = lambda number: send_here(actors[number], "count")  # noqa: E731
            results = await _rates(ask, bare, ask_here, runs=runs, seconds=seconds)
            results += await _latencies(ask, bare, runs=runs, each=latencies // runs)
    for peer in PEERS:
        try:
            import_module(peer)
        except ImportError:
            print(f"{peer} is not installed: its actor calls are left out", file=sys.stderr)
            continue
        rate, p50_us = await asyncio.to_thread(_peer, peer, seconds)
        results += [
            Result(case=f"{peer}, throughput", value=rate, unit="asks/s"),
            Result(case=f"{peer}, p50 of one at a time", value=p50_us, unit="us", p50=p50_us),
        ]
    return results


async def _rates(ask: Ask, bare: Ask, ask_here: Ask, *, runs: int, seconds: float) -> list[Result]:
    of: dict[Ask, list[float]] = {ask: [], bare: [], ask_here: []}
    for call in of:
        await per_second(call, window=WINDOW, seconds=seconds / 4)  # connections, and actors that come to life
    for _ in range(runs):
        for call, rates in of.items():
            rates.append(await per_second(call, window=WINDOW, seconds=seconds))
    remote, floor, local = (median(of[call]) for call in (ask, bare, ask_here))
    return [
        Result(case=f"remote, {WINDOW} under way", value=remote, unit="asks/s", floor=floor, runs=runs),
        Result(case="local, floor: remote", value=local, unit="asks/s", floor=remote, runs=runs),
    ]


async def _latencies(ask: Ask, bare: Ask, *, runs: int, each: int) -> list[Result]:
    took_us: dict[Ask, list[float]] = {ask: [], bare: []}
    for _ in range(runs):
        for call, took in took_us.items():
            for number in range(each):
                began_s = time.perf_counter()
                await call(number % WINDOW)
                took.append((time.perf_counter() - began_s) * 1e6)
    own, floor = took_us[ask], took_us[bare]
    p50 = percentile(own, 0.5)
    return [
        Result(
            case="remote, one at a time, p50", value=p50, unit="us", floor=percentile(floor, 0.5), runs=len(own),
            p50=p50, p99=percentile(own, 0.99),
        )
    ]  # fmt: skip


@asynccontextmanager
async def bare_request(url: str, question: bytes, answer: bytes) -> AsyncIterator[Ask]:
    """nats-py as it comes, at both ends."""
    argv = [sys.executable, "-m", "bench.responder", url, answer.decode()]
    with await asyncio.to_thread(subprocess.Popen, argv, stdout=subprocess.PIPE) as responder:
        try:
            assert responder.stdout is not None
            assert await asyncio.to_thread(responder.stdout.readline) == b"ready\n"
            client = await nats.connect(url)
            try:
                yield lambda _: client.request(SUBJECT, question, timeout=10)
            finally:
                await client.close()
        finally:
            responder.kill()


def _question(actor: ActorId) -> bytes:
    command = Command(
        actor=actor, name="count", message_id=new_message_id(), expires_ms=int(time.time() * 1000), epoch=1
    )
    return encode_command(command)


def _answer() -> bytes:
    return encode_answer(Answer(value=0, owner="a", epoch=1))


def _peer(name: str, seconds: float) -> tuple[float, float]:
    """(calls a second, p50 of one at a time in us) of a peer, in a process of its own: it brings its own loop."""
    argv = [sys.executable, "-m", "bench.peers", name, str(seconds), str(WINDOW)]
    rate, p50_us = subprocess.run(argv, stdout=subprocess.PIPE, check=True).stdout.split()[-2:]
    return float(rate), float(p50_us)
