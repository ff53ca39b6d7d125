"""Records and values as people read them."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

import pytest

from workflows import presentation
from workflows.lookup import steps
from workflows.records import STEPS, MigrationStatus, Move, advance, to_document


def test_a_completed_move_has_the_time_of_every_step() -> None:
    """Milliseconds count from the step before."""
    move = Move(
        id="m1", plan_id="p1", unit="shard.1", shard=1, source="a", destination="b", created_at=10.0, started_at=10.5
    )
    for number, status in enumerate(list(MigrationStatus)[1:7]):
        move = advance(move, status, now=11.0 + number)

    found = steps(to_document(move))

    assert [step["step"] for step in found] == ["plan", "launch", *STEPS]
    assert [step["ms"] for step in found] == [None, 500.0, 500.0, 1000.0, 1000.0, 1000.0, 1000.0, 1000.0]


def test_a_move_that_was_rolled_back_ends_with_that() -> None:
    """The step it never reached is not listed."""
    move = Move(id="m1", plan_id="p1", unit="shard.1", shard=1, source="a", destination="b", created_at=10.0)
    move = advance(advance(move, MigrationStatus.PAUSED, now=11.0), MigrationStatus.ROLLED_BACK, now=12.0)

    found = [(step["step"], step["status"]) for step in steps(to_document(move))]

    assert found == [("plan", "planned"), ("pause", "paused"), ("end", "rolled_back")]


def test_a_table_without_a_terminal_is_aligned_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers to the right, None as a dash, no blanks at the ends of lines."""
    presentation.print_table(["node", "shards"], [["a", 100], ["bcdef", None]])

    assert capsys.readouterr().out == "NODE   SHARDS\na         100\nbcdef       -\n"


def a_row(**given: Any) -> dict[str, Any]:
    """As `ferry migrations --json` has it, as far as people are shown it."""
    return {
        "id": "m843080b0b442.0", "move_id": "m843080b0b442", "actor_id": "aircraft/N14228", "shard": 17, "source": "a",
        "destination": "b", "status": "rolled_back", "state_bytes": 2_000, "blackout_ms": 41.53, "error": None,
        "created_at": 10.0, "paused_at": 11.0, "finished_at": None, **given,
    }  # fmt: skip


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "dumb")


@pytest.mark.parametrize(("columns", "left_out"), [(120, set()), (80, {"SHARD", "SIZE"})])
def test_on_a_narrow_terminal_a_row_does_without_shard_and_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int, left_out: set[str]
) -> None:
    """Id, actor, status and time stay in one piece, each row on one line."""
    on_a_terminal(monkeypatch, columns)
    now = time.time()

    presentation.print_migrations([a_row(finished_at=now)])

    lines = capsys.readouterr().out.splitlines()
    headings = " ".join(lines[:-1]).split()
    assert (
        set(headings) == {"ID", "ACTOR", "SHARD", "FROM", "TO", "STATUS", "SIZE", "BLACKOUT", "(ms)", "AT"} - left_out
    )
    at = presentation.clock_time(now)
    assert lines[-1].split() == ["m843080b0b442.0", "aircraft/N14228", *(["17"] if not left_out else []), "a", "b",
                                 "rolled_back", *(["2.0", "KiB"] if not left_out else []), "41.5", at]  # fmt: skip
    assert all(len(line) <= columns for line in lines)


def test_what_is_too_wide_for_any_terminal_is_not_cut_short(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An id that somebody copies has to be whole."""
    on_a_terminal(monkeypatch, 40)
    actor = "aircraft/" + "N" * 60

    presentation.print_migrations([a_row(actor_id=actor)])

    assert actor in capsys.readouterr().out.splitlines()[-1].split()


def test_errors_stand_below_the_table_once_for_each_move(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sentence in a narrow column would be a word a line."""
    on_a_terminal(monkeypatch, 80)
    sentence = "send: node b did not take the state of 40 actors within 30 s, so the move was rolled back"

    presentation.print_migrations([a_row(error=sentence), a_row(id="m843080b0b442.1", error=sentence)])

    out = capsys.readouterr().out
    assert out.count(sentence) == 1
    assert out.endswith(f"errors:\n  - m843080b0b442: {sentence}\n")


def test_migrations_are_shown_by_the_time_that_stands_in_their_row(capsys: pytest.CaptureFixture[str]) -> None:
    """The latest change first, be it the end or a step; a plan's moves are created together, so that tells nothing."""
    ended = [a_row(id="first", finished_at=12.0), a_row(id="last", finished_at=14.0)]

    presentation.print_migrations([*ended, a_row(id="running", paused_at=13.0)])

    table = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in table] == ["last", "running", "first"]
    assert [row[-1] for row in table] == sorted((row[-1] for row in table), reverse=True)


WAITS = "balance waits with 5 shards until nodes with older code are upgraded: see `ferry status`"


@pytest.mark.parametrize(
    ("answer", "said"),
    [({}, "the map is balanced"), ({"waiting": 0}, "the map is balanced"), ({"waiting": 5}, WAITS)],
    ids=["earlier version", "balanced", "in the middle of an upgrade"],
)
def test_why_there_is_nothing_to_move(answer: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A map that is left as it is for now is not called balanced."""
    presentation.print_plan({"moves": 0, **answer})

    assert capsys.readouterr().out == f"nothing to move: {said}\n"


def test_a_plan_tells_what_it_leaves_for_later(capsys: pytest.CaptureFixture[str]) -> None:
    """What goes to nodes of the same code moves; the rest waits."""
    presentation.print_plan(
        {"moves": 1, "actors": 2, "state_bytes": 3, "estimate_s": 0.1, "reasons": {"balance": 1}, "routes": [
            {"source": "a", "destination": "b", "moves": 1, "actors": 2, "state_bytes": 3}
        ], "waiting": 5}
    )  # fmt: skip

    assert capsys.readouterr().out.endswith(f"\n\n{WAITS}\n")


def test_attempts_are_shown_when_a_step_was_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    """Six for six steps reads like five retries."""
    move = Move(id="m1", plan_id="p1", unit="shard.1", shard=1, source="a", destination="b", created_at=10.0)
    for number, status in enumerate(list(MigrationStatus)[1:7]):
        move = advance(move, status, now=11.0 + number)

    shown = []
    for attempts in (6, 7):
        document = to_document(replace(move, attempts=attempts))
        presentation.print_record(document | {"steps": steps(document)})
        shown.append("attempts" in capsys.readouterr().out)

    assert shown == [False, True]


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (300 * 2**20, "300 MiB")])
def test_sizes_are_rounded(count: int, text: str) -> None:
    assert presentation.size(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.0345, "34 ms"), (3.21, "3.2 s"), (200.0, "3 min 20 s")])
def test_durations_are_rounded(seconds: float, text: str) -> None:
    assert presentation.duration(seconds) == text
