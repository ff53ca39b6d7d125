"""Measurements, each beside its floor taken in the same run: `python -m bench NAME [--json]`."""
