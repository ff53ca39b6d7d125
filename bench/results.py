"""What a benchmark found, and how it is printed."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One case: `value` in `unit` is the median over `runs`; `floor` is what the parts below Ferry allow, same unit."""

    case: str
    value: float
    unit: str
    floor: float | None = None
    runs: int = 1
    p50: float | None = None
    p99: float | None = None

    @property
    def ratio(self) -> float | None:
        return round(self.value / self.floor, 3) if self.floor else None


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def document(name: str, results: Sequence[Result]) -> dict[str, Any]:
    """The contract's JSON: `{name, machine, results: [{case, value, unit, floor, ratio, runs, p50, p99}]}`."""
    rows = [{**asdict(result), "ratio": result.ratio} for result in results]
    machine = {
        "cores": os.cpu_count(), "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}, {platform.machine()}",
        "load": round(os.getloadavg()[0], 2),  # of the last minute: of these benchmarks, and whatever else ran
    }  # fmt: skip
    return {"name": name, "machine": machine, "results": rows}


def table(found: dict[str, Any]) -> str:
    """A document for people."""
    width = max(len(row["case"]) for row in found["results"]) + 2
    lines = [f"{found['name']:<{width}}{'value':>14}{'floor':>14}{'ratio':>8}{'p50':>10}{'p99':>10}  unit"]
    for row in found["results"]:
        value, floor, ratio, p50, p99 = (_cell(row[name]) for name in ("value", "floor", "ratio", "p50", "p99"))
        lines.append(f"  {row['case']:<{width - 2}}{value:>14}{floor:>14}{ratio:>8}{p50:>10}{p99:>10}  {row['unit']}")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"
