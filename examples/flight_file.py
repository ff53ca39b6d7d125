"""Reading a month of flights, and what every aircraft's totals must be after it: a plain group-by, without Ferry."""

from __future__ import annotations

import csv
import gzip
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from routing.errors import InvalidInput

JANUARY = "flights-2013-01.csv.gz"
_COLUMNS = ("year", "month", "day", "carrier", "flight", "tailnum", "origin", "dest", "arr_delay", "distance")
_MISSING = ("", "NA")


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """One row. `tail_number` is empty where the file has none; `arr_delay` is None for a flight that was not timed."""

    message_id: str
    tail_number: str
    dest: str
    arr_delay: int | None
    distance: int

    @property
    def arguments(self) -> dict[str, Any]:
        return {"distance": self.distance, "dest": self.dest, "arr_delay": self.arr_delay}


def january() -> Path:
    """The month that ships with Ferry."""
    return Path(str(resources.files("examples") / JANUARY))


def read_flights(path: Path) -> list[Flight]:
    """All rows in the order of the file. Raises InvalidInput naming the line and the column that is wrong."""
    opened = gzip.open if path.suffix == ".gz" else open
    flights: list[Flight] = []
    seen: Counter[str] = Counter()
    try:
        with opened(path, "rt", newline="") as file:
            rows = csv.DictReader(file)
            missing = [column for column in _COLUMNS if column not in (rows.fieldnames or ())]
            if missing:
                raise InvalidInput(f"{path}: no column {', '.join(missing)}: is this a flights file?")
            for row in rows:
                try:
                    flights.append(_flight(row, seen))
                except (ValueError, TypeError) as error:
                    raise InvalidInput(f"{path}, line {rows.line_num}: {error}") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}") from error
    if not flights:
        raise InvalidInput(f"{path}: no flights in it")
    return flights


def _flight(row: dict[str, str], seen: Counter[str]) -> Flight:
    day = f"{int(row['year']):04}{int(row['month']):02}{int(row['day']):02}"
    name = f"{row['carrier']}{row['flight']}-{day}-{row['origin']}"
    seen[name] += 1  # the same flight number may leave the same airport twice a day
    return Flight(
        message_id=name if seen[name] == 1 else f"{name}-{seen[name]}",
        tail_number="" if row["tailnum"] in _MISSING else row["tailnum"],
        dest=row["dest"],
        arr_delay=None if row["arr_delay"] in _MISSING else int(float(row["arr_delay"])),
        distance=int(float(row["distance"])),
    )


def totals_by_aircraft(flights: Iterable[Flight]) -> dict[str, dict[str, Any]]:
    """What `Aircraft.totals` must answer for every tail number."""
    totals: dict[str, dict[str, Any]] = {}
    for flight in flights:
        if not flight.tail_number:
            continue
        aircraft = totals.setdefault(
            flight.tail_number, {"flights": 0, "miles": 0, "delay_minutes": 0, "last_airport": None}
        )
        aircraft["flights"] += 1
        aircraft["miles"] += flight.distance
        aircraft["delay_minutes"] += flight.arr_delay or 0
        aircraft["last_airport"] = flight.dest
    return totals
