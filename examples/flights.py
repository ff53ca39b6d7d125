"""Aircraft as actors: each flight out of New York in January 2013 is one command to the airframe that flew it.

Source of flights-2013-01.csv.gz: US DOT Bureau of Transportation Statistics, on-time performance (public domain).
"""

from __future__ import annotations

from typing import Any

from runtime.actor import Actor, Rejected, command, event, query


class Aircraft(Actor):
    """One airframe's running totals."""

    actor_type = "aircraft"

    def __init__(self) -> None:
        self.flights = 0
        self.miles = 0
        self.delay_minutes = 0
        self.last_airport: str | None = None

    @command
    def fly(self, *, distance: int, dest: str | None = None, arr_delay: int | None = None) -> int:
        """Take one flight; returns how many this airframe has flown. A flight without a delay was not timed."""
        if distance <= 0:
            raise Rejected("distance must be positive")
        self.emit("flown", distance=distance, dest=dest, arr_delay=arr_delay)
        return self.flights

    @query
    def totals(self) -> dict[str, Any]:
        """`{"flights", "miles", "delay_minutes", "last_airport"}`."""
        return {
            "flights": self.flights,
            "miles": self.miles,
            "delay_minutes": self.delay_minutes,
            "last_airport": self.last_airport,
        }

    @event
    def flown(self, distance: int, dest: str | None, arr_delay: int | None) -> None:
        self.flights += 1
        self.miles += distance
        self.delay_minutes += arr_delay or 0
        self.last_airport = dest or self.last_airport
