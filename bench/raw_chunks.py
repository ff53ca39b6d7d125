"""The floor of a transfer: raw NATS chunks with an ack window between two processes, with nothing of Ferry in them.

`python -m bench.raw_chunks receive URL` acknowledges chunks. `python -m bench.raw_chunks send URL BYTES CHUNK WINDOW
RUNS` sends, and prints the seconds that each run took, as JSON. Both on uvloop, as nodes are.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time

import nats
import uvloop
from nats.aio.msg import Msg

SUBJECT = "bench.raw-chunks"


async def receive(url: str) -> None:
    """Keep what arrives and acknowledge each chunk."""
    connection = await nats.connect(url)
    kept: list[bytes] = []

    async def keep(message: Msg) -> None:
        if not message.data:
            kept.clear()
        kept.append(message.data)
        await connection.publish(message.reply, b"")

    await connection.subscribe(SUBJECT, cb=keep)
    await connection.request(SUBJECT, b"", timeout=10)  # by itself: flush's ping may overtake the subscription
    print("ready", flush=True)
    await asyncio.Event().wait()


async def send(url: str, size_bytes: int, chunk_bytes: int, window_bytes: int, runs: int) -> list[float]:
    """Seconds from the first chunk to the last acknowledgement, for each run."""
    connection = await nats.connect(url)
    payload, window = os.urandom(size_bytes), max(1, window_bytes // chunk_bytes)
    room, acknowledged = asyncio.Semaphore(window), 0

    async def acknowledge(_: Msg) -> None:
        nonlocal acknowledged
        acknowledged += 1
        room.release()

    inbox = connection.new_inbox()
    await connection.subscribe(inbox, cb=acknowledge)
    took_s = []
    for _ in range(runs):
        await connection.request(SUBJECT, b"", timeout=10)  # the run before is forgotten
        began_s, sent, acknowledged = time.perf_counter(), 0, 0
        for offset in range(0, size_bytes, chunk_bytes):
            await room.acquire()
            await connection.publish(SUBJECT, payload[offset : offset + chunk_bytes], reply=inbox)
            sent += 1
        while acknowledged < sent:
            await room.acquire()
        took_s.append(time.perf_counter() - began_s)
        for _ in range(window - room._value):
            room.release()
    await connection.close()
    return took_s


def measure(url: str, size_bytes: int, chunk_bytes: int, window_bytes: int, *, runs: int = 1) -> list[float]:
    """Seconds that `size_bytes` took between two new processes, for each run."""
    command = [sys.executable, "-m", "bench.raw_chunks"]
    receiver = subprocess.Popen([*command, "receive", url], stdout=subprocess.PIPE, text=True)
    try:
        assert receiver.stdout is not None
        if receiver.stdout.readline().strip() != "ready":
            raise RuntimeError("the receiver of raw chunks did not start")
        sizes = [str(size_bytes), str(chunk_bytes), str(window_bytes), str(runs)]
        sent = subprocess.run([*command, "send", url, *sizes], stdout=subprocess.PIPE, check=True, timeout=120)
        took_s: list[float] = json.loads(sent.stdout)
        return took_s
    finally:
        receiver.kill()
        receiver.wait()


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        uvloop.run(receive(sys.argv[2]))
    else:
        print(json.dumps(uvloop.run(send(sys.argv[2], *(int(number) for number in sys.argv[3:7])))))
