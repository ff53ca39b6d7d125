"""Hypothesis under load: an example may take as long as it takes, because a shared machine stalls now and then."""

from __future__ import annotations

import structlog
from hypothesis import settings

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

# One plain line a message: drawing every expected error's traceback in colour takes longer than the tests themselves.
structlog.configure(processors=[structlog.processors.add_log_level, structlog.processors.KeyValueRenderer()])
