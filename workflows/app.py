"""The Celery app and its settings, each with the reason for its value (measurements: docs/design.md)."""

from __future__ import annotations

import logging
from typing import Any

import click
from celery import Celery, signals

from routing.errors import InvalidInput
from routing.logs import configure_logging
from routing.settings import Settings
from workflows.command_line import WRONG_USAGE, read_settings
from workflows.flower_page import show_in_flower


def _load_settings() -> Settings:
    """A mistake in them ends the command `celery` with one line; for whoever imports this, it is InvalidInput."""
    try:
        return read_settings()  # those of logging as well, or Celery would find out in the middle of its start
    except InvalidInput as error:
        command = click.get_current_context(silent=True)
        if command is None or command.find_root().command.name != "celery":
            raise
        click.echo(f"ferry: {error}", err=True)
        raise SystemExit(WRONG_USAGE) from error


settings = _load_settings()

app = Celery("ferry", broker=settings.redis_url, include=["workflows.migration"])

# On Redis priority 0 is the highest. Steps of moves already begun go before new pauses: on one FIFO queue every
# actor is paused for the whole rebalance (10.7 s where this takes 40 ms for 1,000 moves).
PRIORITY_BEGUN = 0
PRIORITY_PAUSE = 9

app.conf.update(
    task_serializer="json",
    accept_content=["json"],
    # Clusters that share a Redis keep apart: tasks, pings and events.
    task_default_queue=f"ferry-{settings.cluster}",
    control_exchange=f"ferry-{settings.cluster}",
    event_exchange=f"ferry-{settings.cluster}-events",
    # A step that was running when its worker died runs again; a poison step at most three times.
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_retry_on_worker_lost=True,
    task_default_retry_delay=0.2,
    # Steps pass ids only and their results are the records, so no result backend: a third less work for Redis.
    task_ignore_result=True,
    # For Flower. Not the "sent" events: one more publish a step, for a state that lasts a millisecond.
    task_track_started=True,
    worker_send_task_events=True,
    # Steps wait on NATS, so threads: a pool child cannot be lost. A worker that has a task in hand when Redis is killed
    # may end (kombu raises out of its loop): run workers under something that starts them again, as the Procfile does.
    worker_pool="threads",
    worker_concurrency=8,
    worker_prefetch_multiplier=1,
    worker_soft_shutdown_timeout=10,
    worker_hijack_root_logger=False,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_transport_options={
        "visibility_timeout": settings.visibility_timeout_s,
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
        "unacked_mutex_expire": 30,
        "socket_timeout": 10,
        "socket_keepalive": True,
        "queue_order_strategy": "priority",
        "priority_steps": [PRIORITY_BEGUN, PRIORITY_PAUSE],
    },
    task_publish_retry_policy={"max_retries": 30, "interval_start": 0.1, "interval_step": 0.2, "interval_max": 1},
)

# `celery -A workflows flower` loads this module before it builds its web application; nobody else loads Flower's parts.
show_in_flower(settings)


@signals.setup_logging.connect
def _configure_logging(loglevel: int | None = None, logfile: str | None = None, **_: Any) -> None:
    """Worker and Flower log as every Ferry process does; connecting to the signal keeps Celery's own set-up away."""
    configure_logging(logging.getLevelName(loglevel or logging.WARNING).lower(), path=logfile)
