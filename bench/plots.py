"""One line chart a curve, as SVG: the x axis is logarithmic, the y axis begins at 0, every point carries its value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 360, 70, 40, 50, 50  # pixels
LINE, GREY = "#1f6feb", "#8b949e"
TICKS = 5

Point = tuple[float, float]


def draw(documents: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Write a file for every curve that was measured; returns them."""
    drawn = []
    for found in documents:
        if found["name"] != "curves":
            continue
        for name, (unit, points) in curves(found["results"]).items():
            path = folder / f"{name.replace('/', '-per-').replace(' ', '-')}.svg"
            path.write_text(svg(name, unit, points))
            drawn.append(path)
    return drawn


def curves(results: Sequence[dict[str, Any]]) -> dict[str, tuple[str, list[Point]]]:
    """curve -> (unit, points) of results named `<curve>: <x>`."""
    found: dict[str, tuple[str, list[Point]]] = {}
    for row in results:
        name, _, x = row["case"].rpartition(": ")
        found.setdefault(name, (row["unit"], []))[1].append((float(x.replace(",", "")), row["value"]))
    return {name: (unit, sorted(points)) for name, (unit, points) in found.items()}


def svg(title: str, unit: str, points: Sequence[Point]) -> str:
    top = nice_ceiling(max(y for _, y in points))
    low, high = (math.log10(f(x for x, _ in points)) for f in (min, max))

    def place(x: float, y: float) -> Point:
        share = (math.log10(x) - low) / (high - low) if high > low else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

    placed = [place(x, y) for x, y in points]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="15">{escape(title)} ({escape(unit)}, median)</text>',
    ]
    for tick in range(TICKS + 1):
        value = top * tick / TICKS
        y = place(points[0][0], value)[1]
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GREY}" opacity="0.3"/>'
        )
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="{GREY}">{value:,.4g}</text>')
    for (x, y), (at_x, at_y) in zip(points, placed, strict=True):
        parts.append(
            f'<text x="{at_x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle" fill="{GREY}">{x:,.0f}</text>'
        )
        parts.append(f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="3.5" fill="{LINE}"/>')
        parts.append(f'<text x="{at_x:.1f}" y="{at_y - 9:.1f}" text-anchor="middle">{y:,.4g}</text>')
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    parts.append(f'<polyline points="{line}" fill="none" stroke="{LINE}" stroke-width="2"/>')
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def nice_ceiling(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, 50, ... at or above `value`; 1 for what is not above 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)
