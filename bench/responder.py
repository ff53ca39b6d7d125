"""The other side of bare request/reply: answers every request on `bench.floor` with ANSWER.

`python -m bench.responder URL ANSWER`; says `ready` when it listens.
"""

from __future__ import annotations

import asyncio
import sys

import nats
import uvloop
from nats.aio.msg import Msg

SUBJECT = "bench.floor"


async def respond(url: str, answer: bytes) -> None:
    client = await nats.connect(url)

    async def reply(message: Msg) -> None:
        await client.publish(message.reply, answer)

    await client.subscribe(SUBJECT, cb=reply)
    await client.request(SUBJECT, b"", timeout=10)  # by itself: flush's ping may overtake the subscription
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(respond(sys.argv[1], sys.argv[2].encode()))
