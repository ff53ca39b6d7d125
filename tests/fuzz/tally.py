"""What a run of tests/fuzz tried and what came of it, for the lines at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any


class Tally:
    """`refusals` by the class of their error; what was damaged and is well-formed all the same counts as `read`."""

    def __init__(self) -> None:
        self.examples: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.read = 0

    def tried(self, what: str) -> None:
        self.examples[what] += 1

    def refused(self, error: BaseException) -> None:
        self.refusals[type(error).__name__] += 1

    def told(self) -> dict[str, Any]:
        """All of it in plain values, for `add` in another process."""
        return {"examples": dict(self.examples), "refusals": dict(self.refusals), "read": self.read}

    def add(self, told: Mapping[str, Any]) -> None:
        """What another process has `told`."""
        self.examples.update(told.get("examples", {}))
        self.refusals.update(told.get("refusals", {}))
        self.read += told.get("read", 0)

    def lines(self) -> list[str]:
        least, most = min(self.examples.values()), max(self.examples.values())
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in self.refusals.most_common())
        return [
            f"fuzz: {self.examples.total():,} examples of {len(self.examples)} properties ({least:,} to {most:,} each)",
            f"fuzz: {self.refusals.total():,} refusals ({kinds or 'none'}), {self.read:,} damaged but well-formed",
        ]


TALLY = Tally()
