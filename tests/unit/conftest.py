"""Hypothesis under load: an example may take as long as it takes, because a shared machine stalls now and then.

The examples are the same in every run: a test that fails here fails for whoever reads the report.
"""

from __future__ import annotations

import structlog
from hypothesis import settings

settings.register_profile("unhurried", deadline=None, derandomize=True)
settings.load_profile("unhurried")

# One plain line a message: drawing every expected error's traceback in colour takes longer than the tests themselves.
structlog.configure(processors=[structlog.processors.add_log_level, structlog.processors.KeyValueRenderer()])
