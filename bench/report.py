"""Writes measured figures into the documents that quote them, between two marker comments; nobody copies a number."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- figures: written by `python -m bench report` -->", "<!-- end of figures -->"

Document = dict[str, Any]

# What a reader who has a minute wants to know: benchmark -> the cases of it, as a regular expression.
HEADLINES = {
    "blackout": "", "rebalance": "moved|blackout p99|slowest", "large": "pre-copied|cold|ask", "ask": "", "append": "",
    "activate": "", "failover": "first answer", "placement": "one joins: moved", "memory": "beyond its state",
}  # fmt: skip


def write(documents: Sequence[Document], folder: Path = Path()) -> None:
    """README.md gets the headlines, docs/performance.md everything. Raises ValueError for missing markers."""
    for path, keep in (("README.md", is_headline), ("docs/performance.md", lambda _name, _row: True)):
        file = folder / path
        file.write_text(between_markers(file.read_text(), markdown(documents, keep), path))


def is_headline(name: str, row: Document) -> bool:
    return re.search(HEADLINES.get(name, "$^"), row["case"]) is not None


def between_markers(text: str, figures: str, path: str) -> str:
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} lacks the markers {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{figures}\n{END}{tail}"


def markdown(documents: Sequence[Document], keep: Callable[[str, Document], bool]) -> str:
    """One table; `ratio` is the measured value over its floor."""
    lines = [machine_line(documents), "", "| benchmark | case | measured | floor | ratio | p50 | p99 | runs |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    for found in documents:
        for row in found["results"]:
            if keep(found["name"], row):
                cells = [quantity(row[name]) for name in ("floor", "ratio", "p50", "p99")]
                lines.append(
                    f"| `{found['name']}` | {row['case']} | {quantity(row['value'])} {row['unit']} |"
                    f" {' | '.join(cells)} | {row['runs']:,} |"
                )
    return "\n".join(lines)


def machine_line(documents: Sequence[Document]) -> str:
    """On what it was measured, and what else the machine had to do meanwhile."""
    machine = documents[0]["machine"]
    loads = [found["machine"]["load"] for found in documents if found["machine"].get("load") is not None]
    load = f", load average {min(loads):.1f} to {max(loads):.1f}" if loads else ""
    return f"{machine['cores']} cores, Python {machine['python']}, {machine['system']}{load}."


def quantity(value: float | None) -> str:
    """Three digits that matter, without an exponent."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
