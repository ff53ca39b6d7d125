"""Copies of one actor, put to the same call: does it act the same once all that is not state is gone?

    lived       a copy with its private attributes, as it is while it stays where it is
    restored    made of its captured state, as it is after a move

A private attribute is lost by a move, and may be: a cache, a compiled pattern, a connection. It must only change
nothing that anybody sees. So attributes are not compared, but replies, events and the state that follows.
"""

from __future__ import annotations

import asyncio
import copy
import random
from typing import Any

import orjson

from runtime.actor import Actor, Handler, run
from runtime.codec import capture_state, restore_state

# As often lived and restored copies must differ, each kind being of one mind, before that counts. A command may be
# decided by chance; with fewer rounds, a coin could fall the same way for each.
ROUNDS = 24

Outcome = dict[str, Any]


async def differing(
    instance: Actor, state: bytes, handler: Handler, arguments: dict[str, Any], *, timeout_s: float
) -> tuple[Outcome, Outcome] | None:
    """What a restored and a lived copy make of one call, where these differ for sure; else None.

    `state` is what `instance` gives when captured. A call that depends on the clock or on chance, which a command may,
    gives no two equal outcomes and tells nothing.
    """
    chance = random.getstate()

    async def outcome(twin: Actor) -> Outcome:
        random.setstate(chance)
        try:
            return await _outcome(twin, handler, arguments, timeout_s)
        finally:
            random.setstate(chance)

    lived = await outcome(copied(instance))
    restored: Outcome | None = None
    for _ in range(ROUNDS):
        other = await outcome(_restored(instance, state))
        if other == lived or (restored is not None and other != restored):
            return None
        restored = other
        if await outcome(copied(instance)) != lived:
            return None
    assert restored is not None
    return restored, lived


def copied(instance: Actor) -> Actor:
    """The same actor once more, private attributes and all. It shares what cannot be copied, such as a connection."""
    twin = copy.copy(instance)
    memo: dict[int, Any] = {id(instance): twin}
    for name, value in vars(instance).items():
        try:
            vars(twin)[name] = copy.deepcopy(value, memo)
        except Exception:
            vars(twin)[name] = value
    return twin


def document(state: bytes) -> Any:
    """A captured state for comparing and showing."""
    try:
        return orjson.loads(state)
    except ValueError:
        return state.hex()  # of a class with its own capture()


def _restored(instance: Actor, state: bytes) -> Actor:
    twin = restore_state(type(instance), state, instance.schema_version)
    twin._actor_id = instance._actor_id
    return twin


async def _outcome(twin: Actor, handler: Handler, arguments: dict[str, Any], timeout_s: float) -> Outcome:
    events: list[list[Any]] = []
    try:
        async with asyncio.timeout(timeout_s):
            reply = await run(twin, handler, arguments, events)
        return {"reply": reply, "events": events, "state": document(capture_state(twin))}
    except Exception as error:
        return {"reply": f"{type(error).__name__}: {error}"}
