"""The floor of a move: six tasks that do nothing, with Ferry's own Celery settings. `celery -A bench.noop worker`."""

from __future__ import annotations

import json
import time
from functools import lru_cache
from typing import Any

import redis
from celery import Celery, chain

from workflows.app import PRIORITY_BEGUN, PRIORITY_PAUSE, settings
from workflows.app import app as ferry_app
from workflows.records import STEPS

QUEUE, DONE = "ferry-bench-noop", "ferry-bench-noop-done"

app = Celery("ferry-bench-noop", broker=settings.redis_url)
app.conf.update({**ferry_app.conf.changes, "task_default_queue": QUEUE, "include": []})

_began: dict[str, float] = {}  # the worker's pool are threads, so both ends of a chain see one clock


@lru_cache(maxsize=1)
def _redis() -> redis.Redis:
    return redis.Redis.from_url(settings.redis_url)


def _step(name: str) -> Any:
    @app.task(name=f"bench.noop.{name}")
    def task(chain_id: str) -> None:
        if name == STEPS[0]:
            _began[chain_id] = time.perf_counter()
        elif name == STEPS[-1]:
            took_ms = (time.perf_counter() - _began.pop(chain_id)) * 1000
            _redis().rpush(DONE, json.dumps([chain_id, took_ms]))

    return task


TASKS = {name: _step(name) for name in STEPS}


def launch(chain_id: str) -> None:
    """Send one chain, as workflows.migration.launch does: priorities, preset ids left out."""
    chain(
        *(
            TASKS[name].si(chain_id).set(priority=PRIORITY_PAUSE if name == STEPS[0] else PRIORITY_BEGUN)
            for name in STEPS
        )
    ).apply_async()


def run(chain_ids: list[str], *, window: int, timeout_s: float) -> list[float]:
    """Run chains, at most `window` at once; returns pause-to-delete of each in milliseconds, in order of ending."""
    waiting, took = list(reversed(chain_ids)), []
    for _ in range(min(window, len(waiting))):
        launch(waiting.pop())
    while len(took) < len(chain_ids):
        ended = _redis().blpop([DONE], timeout=timeout_s)
        if ended is None:
            raise TimeoutError(f"{len(chain_ids) - len(took)} no-op chains did not end within {timeout_s:g} s")
        took.append(json.loads(ended[1])[1])
        if waiting:
            launch(waiting.pop())
    return took
