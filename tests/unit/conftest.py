"""Hypothesis under load: an example may take as long as it takes, because a shared machine stalls now and then."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
