"""How `ferry` shows things: rich tables and bars on a terminal, plain aligned text elsewhere, JSON when asked for.

Results go to stdout, everything else to stderr, so that a pipe gets results alone.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
import orjson

from workflows.records import STEPS
from workflows.words import counted as counted

if TYPE_CHECKING:  # it brings the clients of Redis and NATS with it
    from workflows.progress import Show

Cell = str | int | float | None


def print_json(document: Any, *, indent: bool = True) -> None:
    """One JSON document on stdout."""
    click.echo(orjson.dumps(document, option=orjson.OPT_INDENT_2 if indent else None).decode())


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, spare: Collection[str] = ()) -> None:
    """Numbers to the right, text to the left; None is shown as -.

    On a terminal only prose wraps, so that an id stays one word to select. One that is too narrow for the rest does
    without the `spare` columns. Everywhere else each row is one line.
    """
    cells = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    numeric = [
        bool(rows) and all(isinstance(row[i], (int, float, type(None))) for row in rows) for i in range(len(columns))
    ]
    if sys.stdout.isatty():
        _print_rich(columns, cells, numeric, spare)
        return
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    for row in [[_heading(column) for column in columns], *cells]:
        aligned = [c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True)]
        click.echo("  ".join(aligned).rstrip())


def _print_rich(
    columns: Sequence[str], cells: Sequence[Sequence[str]], numeric: Sequence[bool], spare: Collection[str]
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A heading may break between its words, a cell may not.
    widths = [
        _PROSE_WIDTH if column in _PROSE else max(map(len, [*column.split(), *(row[i] for row in cells)]), default=0)
        for i, column in enumerate(columns)
    ]
    width, height = shutil.get_terminal_size()
    shown = list(range(len(columns)))
    if sum(widths) + _GAP * (len(shown) - 1) > width:
        shown = [i for i in shown if columns[i] not in spare]
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, _GAP, 0, 0))
    for i in shown:
        table.add_column(
            _heading(columns[i]), justify="right" if numeric[i] else "left", overflow="fold", min_width=widths[i],
            no_wrap=columns[i] not in _PROSE and " " not in columns[i],
        )  # fmt: skip
    for row in cells:
        table.add_row(*(Text(row[i], style=_STYLES.get(row[i], "")) for i in shown))
    # Rather a line that the terminal breaks than a cell cut short.
    needed = sum(widths[i] for i in shown) + _GAP * (len(shown) - 1)
    Console(highlight=False, width=max(width, needed), height=height).print(table)


def _heading(column: str) -> str:
    """`blackout (ms)` -> `BLACKOUT (ms)`: a unit keeps its letters."""
    name, parenthesis, unit = column.partition(" (")
    return name.upper() + parenthesis + unit


_GAP = 2
_PROSE = frozenset({"found", "mend", "latest events"})
_PROSE_WIDTH = 20  # narrower, a sentence is a column of single words


# The words that deserve a look, wherever they stand alone in a cell.
_STYLES = {
    **dict.fromkeys(("up", "ok", "completed"), "green"),
    **dict.fromkeys(("draining", "drained", "warn", "cancelled", "rolled_back"), "yellow"),
    **dict.fromkeys(("fail", "failed", "silent"), "red"),
}


@contextmanager
def progress(what: str, *, quiet: bool = False) -> Iterator[Show]:
    """A bar on a terminal; elsewhere one line on stderr whenever the reason for standing still changes."""
    if quiet:
        yield lambda done, total, why: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        reason = TextColumn("{task.fields[why]}", markup=False)
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), reason)
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=None, why="")
            yield lambda done, total, why: bar.update(task, completed=done, total=total or None, why=why)
    else:
        said = ""

        def show(done: int, total: int, why: str) -> None:
            nonlocal said
            if why and why != said:
                click.echo(f"{what}: {done} of {total}, {why}", err=True)
            said = why

        yield show


# -- values as people read them ----------------------------------------------------------------------------------------
def size(byte_count: int | None) -> str | None:
    """1536 -> `1.5 KiB`."""
    if byte_count is None:
        return None
    value, units = float(byte_count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" or value >= 100 else f"{value:.1f} {units[0]}"


def clock_time(unix_s: float | None) -> str | None:
    """Local time of day with milliseconds, with the date when it is not today's."""
    if unix_s is None:
        return None
    then = datetime.fromtimestamp(unix_s, UTC).astimezone()
    text = f"{then:%H:%M:%S}.{then.microsecond // 1000:03d}"
    return text if then.date() == datetime.now(UTC).astimezone().date() else f"{then:%Y-%m-%d} {text}"


def duration(seconds: float) -> str:
    """0.0345 -> `35 ms`, 3.21 -> `3.2 s`, 200 -> `3 min 20 s`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


# -- whole answers -----------------------------------------------------------------------------------------------------
def print_status(document: Mapping[str, Any]) -> None:
    """`ferry status` for people."""
    headline = [f"cluster {document['cluster']}", f"led by {document['leader']}" if document["leader"] else "no leader"]
    if document["shards_total"] is not None:
        headline += [
            counted(document["shards_total"], "shard"),
            f"{counted(document['moves_running'], 'move')} running",
        ]
    if document["suspended"]:
        headline.append("rebalancing suspended (`ferry resume` lets it go on)")
    click.echo(", ".join(headline))
    if document["nodes"]:
        click.echo()
        print_table(
            ["node", "state", "weight", "shards", "actors", "host", "pid", "incarnation"],
            [
                [
                    node["id"], node["state"] if node["serving"] is not None else "silent", node["weight"],
                    node["shards"], node["actors"], node["host"], node["pid"], node["incarnation"][:8],
                ]
                for node in document["nodes"]
            ],
        )  # fmt: skip
    if document["actors_apart"]:
        click.echo("\nactors moved by hand (`ferry unpin` lets one go back to its shard):")
        rows = [[a["actor"], a["node"], "pinned" if a["pinned"] else "goes back"] for a in document["actors_apart"]]
        print_table(["actor", "node", ""], rows)
    if document["plan"] is not None:
        click.echo(f"\n{_plan_line(document['plan'])}")
    if document["events"]:
        click.echo()
        print_table(["at", "latest events"], [[clock_time(e["at"]), e["what"]] for e in document["events"]])
    if document["problems"]:
        click.echo("\nproblems:")
        for problem in document["problems"]:
            click.echo(f"  - {problem}")
    else:
        click.echo("\nno problems")


def _plan_line(plan: Mapping[str, Any]) -> str:
    line = f"last plan {plan['id']} ({plan['reason']}): "
    line += f"{plan['completed']} of {counted(plan['total'], 'move')} completed"
    if plan["failed"]:
        line += f", {plan['failed']} not"
    if plan["cancelled"]:
        line += ", cancelled"
    if plan["finished_at"] is None:
        return f"{line}, running since {clock_time(plan['created_at'])}"
    return f"{line}, in {duration(plan['finished_at'] - plan['created_at'])}, at {clock_time(plan['finished_at'])}"


def print_plan(answer: Mapping[str, Any]) -> None:
    """`ferry plan` for people."""
    if not answer["moves"]:
        print_nothing_to_move(answer)
        return
    click.echo(
        f"would move {counted(answer['moves'], 'shard')} with {counted(answer['actors'], 'live actor')},"
        f" {size(answer['state_bytes'])}, in about {duration(answer['estimate_s'])}"
    )
    why = ", ".join(f"{reason} ({count})" for reason, count in answer["reasons"].items())
    click.echo(f"because: {why}\n")
    print_table(
        ["from", "to", "moves", "actors", "bytes"],
        [[r["source"], r["destination"], r["moves"], r["actors"], r["state_bytes"]] for r in answer["routes"]],
    )
    if waiting := _waiting(answer):
        click.echo(f"\n{waiting}")


def print_nothing_to_move(answer: Mapping[str, Any]) -> None:
    """Why a plan would have no moves."""
    click.echo(f"nothing to move: {_waiting(answer) or 'the map is balanced'}")


def _waiting(answer: Mapping[str, Any]) -> str:
    """Of the shards that balance does not move yet; a coordinator of an earlier version does not tell."""
    if not (shards := answer.get("waiting", 0)):
        return ""
    return f"balance waits with {counted(shards, 'shard')} until nodes with older code are upgraded: see `ferry status`"


def print_migrations(rows: Sequence[Mapping[str, Any]]) -> None:
    """`ferry migrations` for people: what changed last comes first.

    Errors are sentences: on a terminal they stand below the table, elsewhere each in its row.
    """
    if not rows:
        click.echo("no migrations")
        return
    rows = sorted(rows, key=_changed_at, reverse=True)
    errors = dict.fromkeys((row["move_id"], row["error"]) for row in rows if row["error"])
    below = sys.stdout.isatty()
    with_errors = bool(errors) and not below
    print_table(
        ["id", "actor", "shard", "from", "to", "status", "size", "blackout (ms)", "at"]
        + (["error"] if with_errors else []),
        [
            [
                row["id"], row["actor_id"], row["shard"], row["source"], row["destination"], row["status"],
                size(row["state_bytes"]), _rounded(row["blackout_ms"]), clock_time(_changed_at(row)),
            ]
            + ([row["error"] or ""] if with_errors else [])
            for row in rows
        ],
        spare=("shard", "size"),
    )  # fmt: skip
    if errors and below:
        click.echo("\nerrors:")
        for move, error in errors:
            click.echo(f"  - {move}: {error}")


def _changed_at(row: Mapping[str, Any]) -> float:
    """When the row came to its status."""
    return float(max(row[name] for name in _TIMES if row.get(name) is not None))


def print_record(record: Mapping[str, Any]) -> None:
    """One migration, or one move: its fields, then when it reached what."""
    hidden = set(_SHOWN_ELSEWHERE)
    if record["attempts"] == sum(step["step"] in STEPS for step in record["steps"]):
        hidden.add("attempts")  # no step was tried twice
    shown = {name: value for name, value in record.items() if name not in hidden and value is not None}
    width = max(len(name) for name in shown)
    for name, value in shown.items():
        click.echo(f"{name.replace('_', ' '):{width}}  {value}")
    click.echo()
    print_table(
        ["step", "reached", "at", "ms"],
        [[s["step"], s["status"], clock_time(s["reached_at"]), _rounded(s["ms"])] for s in record["steps"]],
    )


_TIMES = ("created_at", "paused_at", "captured_at", "serialized_at", "sent_at", "acked_at", "finished_at")
_SHOWN_ELSEWHERE = frozenset(
    {*_TIMES, "started_at", "step_at", "steps", "task_ids", "migrations", "revision"}
)  # fmt: skip


def _rounded(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else round(milliseconds, 1)
