"""Moving actors: the Celery workflow, its records, the coordinator.

`celery -A workflows worker` and `celery -A workflows flower` find the app here; it is made on first use, so that
importing the package costs nothing.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("app", "celery"):
        from workflows.app import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
